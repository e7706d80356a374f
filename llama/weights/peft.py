"""LoRA adapters as PEFT saves them: adapter_config.json, adapter_model.safetensors or .bin -> what becomes of each
weight."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from ..runtime import DTYPES
from ..system.checks import whole
from ..system.files import Number, contents, is_there, listed, read_json
from ..system.patterns import matches
from ..system.printable import shortened
from .archive import map_tensors
from .huggingface import SAFETENSORS_DTYPES, base_of_adapter, map_part

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
CONFIG_BYTES, USUAL = (
    2**18,
    "an adapter_config.json has a thousand bytes, or some ten thousand with a rank for each module",
)
PREFIX = "base_model.model."  # before every name of a tensor
EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"
# The ends of the names of tensors, and what each is of its module. The embedding has A and B in other shapes and names.
ENDS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b",
    ".base_layer.weight": "whole", ".weight": "whole",
}  # fmt: skip
NEEDED = {"a": "lora_A", "b": "lora_B", "whole": "weight"}
RANK, ALPHA = Number(int, 1, 2**20, True), Number(float, -1e9, 1e9, True)
DEFAULT_TARGETS = ["q_proj", "v_proj"]  # PEFT's for Llama, if none are given
# Keys of the config that are read below, and those that say how it was trained. Any other must be empty.
READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
}  # fmt: skip
TRAINING = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout",
    "peft_version",
    "eva_config", "megatron_core", "qalora_group_size", "runtime_config",
    "fan_in_fan_out",  # PEFT sets it back for the layers that a Llama has
}  # fmt: skip
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the weights of the base as they are
WAY_OUT = "merge it into its base with PEFT (merge_and_unload), and save that"


class Change(NamedTuple):
    """What an adapter makes of one weight: `whole` in its place, if there is one, and scale · b @ a more, if there are
    these. Rows are in Hugging Face's order."""

    whole: Optional[torch.Tensor]  # (rows, columns), or (dim,) of a norm
    a: Optional[torch.Tensor]  # (rank, columns)
    b: Optional[torch.Tensor]  # (rows, rank)
    scale: float


def find_weights(folder: Path) -> Path:
    """The file of an adapter's tensors. ValueError if the folder holds no adapter."""
    found = [folder / name for name in WEIGHTS if is_there(folder / name)]
    if not is_there(folder / CONFIG) or not found:
        held = f"it holds {contents(folder)}" if os.path.isdir(folder) else "it is no folder"
        raise ValueError(
            f"{folder} is no adapter: {held}; pass the folder that holds {CONFIG} and {' or '.join(WEIGHTS)}"
        )
    return found[0]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, mapped. Nothing in the file is run. ValueError if it is damaged, or a number is not
    finite."""
    if path.suffix == ".bin":
        tensors = map_tensors(path)
        dtypes = SAFETENSORS_DTYPES.values()
        other = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in dtypes]
    else:
        file = map_part(path)
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        other = [f"{name} is stored as {kind}" for name, kind in stored.items() if kind not in SAFETENSORS_DTYPES]
        tensors = {} if other else {name: file.get_tensor(name) for name in stored}
    if other:
        raise ValueError(f"{path} has what is not computed here: {listed(other)}; use {' or '.join(DTYPES)}")
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"{path} has numbers that are not finite: {listed(bad)}; the file is damaged, or training diverged"
        )
    return tensors


class Settings:
    """The config of an adapter, for a base with these modules (Hugging Face's names, without ".weight")."""

    def __init__(self, path: Path, modules: Collection[str]) -> None:
        """ValueError, with every reason, if it is damaged or asks for what is not computed."""
        config = read_json(path, USUAL, CONFIG_BYTES)
        problems = _problems(config)
        if problems:
            raise ValueError(f"{path} describes an adapter that cannot be added here: {listed(problems)}; {WAY_OUT}")
        self.config = config
        matrices = [module for module in modules if not module.endswith("norm")]
        self.saved = {module for module in modules if _is_saved(module, config.get("modules_to_save") or [])}
        try:
            left_out = _matched(config.get("exclude_modules") or [], matrices)
            self.targets = self._targets(matrices) - left_out - self.saved
            self.ranks = _by_pattern(config.get("rank_pattern") or {}, matrices)
            self.alphas = _by_pattern(config.get("alpha_pattern") or {}, matrices)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _targets(self, modules: Iterable[str]) -> set[str]:
        targets = self.config.get("target_modules")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return set(modules) - {EMBEDDING, OUTPUT}
        if targets is None:
            targets = DEFAULT_TARGETS
        found, layers = _matched(targets, list(modules)), self.config.get("layers_to_transform")
        if layers in (None, []):
            return found
        numbers = {str(n) for n in ([layers] if whole(layers) is not None else layers)}
        return {module for module in found if module in targets or re.sub(r"\D", "", module) in numbers}

    def rank(self, module: str) -> int:
        return int(self.ranks.get(module, self.config["r"]))

    def scale(self, module: str) -> float:
        """What b @ a is multiplied by."""
        alpha, rank = float(self.alphas.get(module, self.config["lora_alpha"])), self.rank(module)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _problems(config: dict[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type={shortened(config.get('peft_type'))} is not 'LORA'")
    problems += RANK.problem("r", config) + ALPHA.problem("lora_alpha", config)
    for key, number in (("rank_pattern", RANK), ("alpha_pattern", ALPHA)):
        pattern = config.get(key) or {}
        if isinstance(pattern, dict):
            problems += [f"{key}: {problem}" for name in pattern for problem in number.problem(name, pattern)]
        else:
            problems.append(f"{key}={shortened(pattern)} is no table of numbers by names")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(key)
        if not (value is None or _are_texts(value) or (isinstance(value, str) and key != "modules_to_save")):
            problems.append(f"{key}={shortened(value)} is no list of names")
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern") or "layers"
    if layers not in (None, []):
        numbers = layers if isinstance(layers, list) else [layers]
        if any(whole(n) is None for n in numbers) or isinstance(config.get("target_modules"), str):
            problems.append(
                f"layers_to_transform={shortened(layers)} is no list of layers beside a list of target_modules"
            )
        if pattern != "layers" and (not _are_texts(pattern) or "layers" not in pattern):
            problems.append(f"layers_pattern={shortened(pattern)} does not name 'layers', which a Llama has")
    if config.get("use_rslora") not in (None, True, False):
        problems.append(f"use_rslora={shortened(config['use_rslora'])} is neither true nor false")
    if config.get("bias") not in (None, "none", "all", "lora_only"):  # a Llama has none
        problems.append(f"bias={shortened(config['bias'])} is not 'none', 'all' or 'lora_only'")
    if not any(
        config.get("init_lora_weights") is start or config.get("init_lora_weights") == start for start in STARTS
    ):
        problems.append(
            f"init_lora_weights={shortened(config['init_lora_weights'])} changes the base too, or is unknown"
        )
    for key, value in config.items():
        if key not in READ | TRAINING and value not in (None, False, "", [], {}):
            problems.append(f"{shortened(key)[1:-1]}={shortened(value)} is not computed here")
    return problems


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _matched(names: Any, modules: list[str]) -> set[str]:
    """The modules that a list of names names by their end, or a regular expression (a str) matches."""
    if isinstance(names, str):
        return set(matches([names], modules)[0])
    return {module for module in modules if any(f".{module}".endswith(f".{name}") for name in names)}


def _by_pattern(values: dict[str, float], modules: list[str]) -> dict[str, float]:
    """Module -> the value of the first pattern that matches its end."""
    found: dict[str, float] = {}
    for value, matched in zip(values.values(), matches([rf"(.*\.)?({key})$" for key in values], modules)):
        found = dict.fromkeys(matched, value) | found
    return found


def _is_saved(module: str, names: list[str]) -> bool:
    """Whether modules_to_save names a module, or one that it lies in, by the end of its name (also without a dot
    before)."""
    parts = module.split(".")
    return any(".".join(parts[:i]).endswith(name) for i in range(1, len(parts) + 1) for name in names)


def read_adapter(folder: Path, modules: Collection[str], tied: bool) -> dict[str, Change]:
    """Module -> what the adapter in a folder makes of its weight. tied: the base's embedding is its output matrix too.

    ValueError, before anything is added, if the folder is damaged, or holds what is not computed here, or if its
    tensors are not those that its config describes for a base with these modules.
    """
    path = find_weights(folder)
    settings = Settings(folder / CONFIG, modules)
    found: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for name, tensor in read_tensors(path).items():
        module, what = _place(name)
        if module not in modules or (what != "whole" and module not in settings.targets):
            problems.append(f"{name} is unexpected")
        elif what == "whole" and module not in settings.saved | {EMBEDDING, OUTPUT}:
            problems.append(f"{name} is unexpected, as modules_to_save does not name it")
        elif what in found.setdefault(module, {}):
            problems.append(f"{name} is there under two names")
        else:
            found[module][what] = tensor
    needed = {module: {"a", "b"} for module in settings.targets} | {module: {"whole"} for module in settings.saved}
    for module, parts in sorted(needed.items()):
        problems += [f"{module} has no {NEEDED[what]}" for what in sorted(parts - found.get(module, {}).keys())]
    if not problems:
        problems = [problem for module, parts in found.items() for problem in _misshapen(module, parts, settings)]
    if problems or not found:
        raise ValueError(
            f"{path} does not hold what its {CONFIG} describes for this base (it is made for "
            f"{base_of_adapter(folder)}): {listed(problems) or 'it holds nothing'}; pass its own base, or save the "
            f"adapter again"
        )
    if tied:  # such a weight was saved as the base's own, which is both
        for one, other in ((EMBEDDING, OUTPUT), (OUTPUT, EMBEDDING)):
            if "whole" in found.get(one, {}) and one not in settings.saved:
                found.setdefault(other, {}).setdefault("whole", found[one]["whole"])
    return {module: _change(module, parts, settings) for module, parts in found.items()}


def _place(name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and what it is of it: "a", "b" or "whole". Two empty texts for other
    names."""
    for end, what in ENDS.items():
        if name.startswith(PREFIX) and name.endswith(end):
            module = name[len(PREFIX) : -len(end)]
            if what == "whole" or (module == EMBEDDING) == ("embedding" in end):
                return module, what
    return "", ""


def _misshapen(module: str, parts: dict[str, torch.Tensor], settings: Settings) -> list[str]:
    problems = []
    if "whole" in parts and parts["whole"].ndim != (1 if module.endswith("norm") else 2):
        problems.append(f"{module} has shape {list(parts['whole'].shape)}")
    if "a" in parts:
        rank, a, b = settings.rank(module), parts["a"], parts["b"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            problems.append(f"{module} has {list(a.shape)} and {list(b.shape)}, which are not of rank {rank}")
    return problems


def _change(module: str, parts: dict[str, torch.Tensor], settings: Settings) -> Change:
    a, b = parts.get("a"), parts.get("b")
    # An embedding has (rank, ids) and (dim, rank): its product is transposed.
    if module == EMBEDDING and a is not None and b is not None:
        a, b = b.t(), a.t()
    return Change(parts.get("whole"), a, b, settings.scale(module) if a is not None else 0.0)
