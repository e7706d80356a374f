"""Random checkpoints in Meta's format, in the shapes that the benchmarks measure."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llama import ModelArgs, Transformer
from llama.weights.checkpoint import cut

SHAPES: dict[str, dict[str, float]] = {
    "1.1B": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "multiple_of": 256, "norm_eps": 1e-5},
    "134M": {"dim": 768, "n_layers": 12, "n_heads": 12, "multiple_of": 256, "norm_eps": 1e-5},
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5},
}
VOCAB_SIZE = 32000


def random_checkpoint(shape: str, folder: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> Path:
    """Write the checkpoint into `folder` unless it is there. The weights keep activations near one."""
    return write_random(SHAPES[shape], VOCAB_SIZE, folder, dtype, shards)


def write_random(
    params: dict[str, float], vocab_size: int, folder: Path, dtype: torch.dtype, shards: int = 1, device: str = "cpu"
) -> Path:
    """As `random_checkpoint`, of any shape. device: that the numbers are drawn on."""
    if (folder / "params.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    args = ModelArgs(**params, vocab_size=vocab_size, max_seq_len=1, max_batch_size=1)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = Transformer(args)
    generator = torch.Generator(device).manual_seed(1)
    dims = {name: dim for name, (_, dim, _) in cut(model).items()}
    pieces: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, weight in model.named_parameters():
        full = torch.ones(weight.shape) if weight.ndim == 1 else torch.empty(weight.shape, device=device)
        if weight.ndim > 1:
            full.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
        dim = dims[name]
        for i, piece in enumerate(pieces):
            piece[name] = (full if dim is None else full.chunk(shards, dim)[i]).to(dtype).to("cpu").clone()
    for i, piece in enumerate(pieces):
        torch.save(piece, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": vocab_size}))
    return folder


def into_page_cache(path: Path) -> None:
    """Read a file, or the files of a folder, so that what is timed next does not wait for the disk."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass
