"""Which systems take part, and the files that each of them reads: made once, and kept under the temp folder."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from checkpoints import SHAPES, random_checkpoint
from children import System
from ggufs import quantize, step_bytes, write_gguf
from tasks import Profile

from llama import ModelArgs
from llama.commands.convert import convert
from llama.generation import DEMO
from llama.tokenizer import user_path
from llama.weights.checkpoint import open_checkpoint

# The form of the weights, by what `quantize` says.
FORMS = {"none": "bf16", "int8": "int8", "int4": "int4", "w8a8": "int8", "w4a8": "int4"}
PEERS = {
    "meta": [],
    "transformers": ["transformers"],
    "llama.cpp": ["llama_cpp", "gguf"],
}  # and the modules that each needs
READ_BYTES = 2**30


@dataclass
class Setting:
    """What all systems have in common."""

    source: Path  # a checkpoint folder in either format
    args: ModelArgs
    tokenizer: Path
    device: torch.device
    profile: Profile

    def spec(self, system: str, path: Path, **more: Any) -> dict[str, Any]:
        return {
            "system": system,
            "path": str(path),
            "tokenizer_path": str(self.tokenizer),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "max_seq_len": self.profile.max_seq_len,
            "max_batch_size": max(task.batch for task in self.profile.tasks.values()),
            **more,
        }

    @property
    def cache(self) -> Path:
        """Where this checkpoint's other formats are; another place once its files change."""
        files = sorted(
            (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self.source.iterdir() if f.is_file()
        )
        name = f"{self.source.name}-{hashlib.sha256(repr(files).encode()).hexdigest()[:12]}"
        folder = Path(tempfile.gettempdir()) / "llama-benchmarks" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def find_source(shape: str, ckpt_dir: Optional[str]) -> Path:
    if ckpt_dir is not None:
        return user_path(ckpt_dir)
    if shape == "stories":
        return DEMO
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} must be one of {', '.join([*SHAPES, 'stories'])}; or pass --ckpt_dir")
    return random_checkpoint(shape, Path(tempfile.gettempdir()) / f"llama-{shape}")


def ours(setting: Setting, modes: list[str], compiled: bool) -> list[System]:
    """Each mode, and each again compiled: on a CPU only what can be, which quantized weights cannot."""
    systems = []
    for compile in (None, True) if compiled else (None,):
        for mode in modes:
            if compile and mode != "none" and setting.device.type == "cpu":
                continue
            options = {} if mode == "none" else {"quantize": mode}
            options |= {"compile": True} if compile else {}
            name = "ours" + f" {mode}" * (mode != "none") + ", compiled" * bool(compile)
            systems.append(System(name, "ours", FORMS[mode], [setting.spec("ours", setting.source, **options)]))
    return systems


def peers(setting: Setting, wanted: list[str], notes: list[str]) -> list[System]:
    """Those of the wanted ones that are installed; a note about each of the others."""
    systems = []
    for name in wanted:
        missing = [module for module in PEERS[name] if importlib.util.find_spec(module) is None]
        if missing:
            notes.append(f"{name}: left out, {' and '.join(missing)} not installed (pip install -e '.[bench]')")
        elif name == "meta":
            systems.append(System("Meta's way", "peer", "bf16", [setting.spec("meta", setting.source)]))
        elif name == "transformers":
            systems.append(System(name, "peer", "bf16", [setting.spec(name, _in_hf_format(setting))]))
        else:
            systems += _llama_cpp(setting, notes)
    return systems


def _in_hf_format(setting: Setting) -> Path:
    if open_checkpoint(setting.source).format != "Meta":
        return setting.source
    target = setting.cache / "hf"
    if not target.exists():
        convert(setting.source, target, "hf", tokenizer_path=setting.tokenizer)
    return target


def _llama_cpp(setting: Setting, notes: list[str]) -> list[System]:
    """One for each form of the weights that llama.cpp can make of them."""
    systems = []
    whole = setting.cache / "bf16.gguf"
    for name, form in (("bf16", "bf16"), ("Q8_0", "int8"), ("Q4_0", "int4")):
        path = setting.cache / f"{name}.gguf"
        try:
            if not path.exists() and path == whole:
                write_gguf(setting.source, whole)
            elif not path.exists():
                quantize(whole, path, name, torch.get_num_threads())
        except RuntimeError as error:
            notes.append(str(error))
            continue
        # On some machines the kernels that use extra buffers (AMX and such) crash.
        specs = [
            setting.spec(
                "llama.cpp", path, weights_bytes=step_bytes(path), extra_buffers=extra, way=f"{how} extra buffers"
            )
            for extra, how in ((True, "with"), (False, "without"))
        ]
        systems.append(System(f"llama.cpp {name}", "peer", form, specs))
    return systems


def limits(setting: Setting, quick: bool) -> System:
    """Products of the model's shapes, with as many rows as a long prompt has."""
    args, rows = setting.args, 64 if quick else 2048
    shapes = [(rows, args.dim, args.ffn_width), (rows, args.ffn_width, args.dim), (rows, args.dim, args.dim)]
    nbytes = 2**22 if quick else READ_BYTES
    return System("limits", "limits", "", [setting.spec("limits", setting.source, shapes=shapes, read_bytes=nbytes)])
