"""A checkpoint and a LoRA adapter -> the checkpoint of their sum, computed slice by slice while it is read."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch

from ..layers.parallel import is_first_process
from ..layers.rounding import Quantization
from ..system.files import MappedFiles, is_there
from ..system.printable import escaped
from .checkpoint import Checkpoint
from .huggingface import NAMES, ROTATED, base_of_adapter, other_name, to_meta_rows
from .peft import CONFIG, Change, find_weights, read_adapter

SUM_BYTES = 2 * 2**20  # size of the rows that are added at a time: what fits a processor's cache is fastest
WITH_IDS = {"tok_embeddings.weight": 1, "output.weight": 0}  # matrices with a row for each id, and how Meta cuts them


def add_adapter(checkpoint: Checkpoint, folder: Optional[Path]) -> Checkpoint:
    """The checkpoint with the adapter in `folder` added; itself if None. Copies no weight.

    Warns of another adapter in the checkpoint's own folder. ValueError if the adapter is damaged, is of a kind that is
    not computed, or was made for another base.
    """
    adapted = checkpoint if folder is None else AdaptedCheckpoint(checkpoint, folder)
    is_own = folder is not None and os.path.samefile(folder, checkpoint.folder)
    if is_there(checkpoint.folder / CONFIG) and not is_own and is_first_process():
        own = escaped(str(checkpoint.folder))
        warnings.warn(
            f"{own} also holds an adapter ({CONFIG}), which is not added to the weights; adapter={own!r} (--adapter) "
            f"adds it, and without {CONFIG} this warning ends",
            stacklevel=4,
        )
    return adapted


def tokenizer_folder(folder: Path, adapter: Optional[Path], given: Optional[Path] = None) -> Path:
    """The folder whose files describe the tokenizer: the adapter's, if a tokenizer was saved there, as trainings do
    that add tokens or a chat template; else the checkpoint's. given: what the caller named, which may lie in either."""
    if adapter is None or not any(is_there(adapter / name) for name in ("tokenizer.model", "tokenizer.json")):
        return folder
    return adapter if given is None or adapter.absolute() in (given.absolute(), given.absolute().parent) else folder


class AdaptedCheckpoint:
    """A checkpoint whose matrices are those of its base with the adapter's product added. It is a
    `checkpoint.Checkpoint`, which documents its methods. Sums are float32, and rounded once, to the dtype or the
    quantized kind that is asked for."""

    quantization: Optional[Quantization] = None

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        if base.quantization is not None:
            kind = base.quantization.kind
            raise ValueError(
                f"{base.folder} is stored as {kind}, which no adapter can be added to; pass the folder with the "
                f"original weights, the adapter and quantize={kind!r}"
            )
        self.base, self.adapter = base, folder
        self.format, self.config, self.folder, self.tables = base.format, base.config, base.folder, base.tables
        self.dtype, self.dtypes, self.positions = base.dtype, base.dtypes, base.positions
        file = find_weights(folder)
        self.paths = [*base.paths, file]
        mapped = MappedFiles([file])
        theirs = {name: (other_name(name, NAMES) or name).removesuffix(".weight") for name in base.dtypes}
        changes = read_adapter(folder, theirs.values(), base.tied)
        self.changes: dict[str, Change] = {name: changes[theirs[name]] for name in theirs if theirs[name] in changes}
        self.mapped = base.mapped.joined(mapped)
        self.tied = base.tied and _are_one(*(self.changes.get(name) for name in WITH_IDS))
        self.args = base.args
        shapes = {name: base.shape(name, dim) for name, dim in WITH_IDS.items() if name in base.dtypes}
        # A tensor without dimensions is no matrix, and refused later.
        self._rows = {name: shape[0] for name, shape in shapes.items() if shape}
        before = dict(self._rows)
        for name in self._rows:
            if name in self.changes and (saved := self.changes[name].whole) is not None:
                self._rows[name] = len(saved)
        if self._rows != before:
            if len(set(self._rows.values())) > 1:
                raise ValueError(f"the adapter in {folder} has weights for other ids than {base.folder}: "
                                 f"{_counts(self._rows)}; both have to be saved with it")  # fmt: skip
            self.args = replace(base.args, vocab_size=max(self._rows.values()))
        self._ids = max(self._rows.values(), default=0)

    def leave_out_ids(self, pieces: int) -> bool:
        saved = all(name in self.changes and self.changes[name].whole is not None for name in WITH_IDS)
        if saved or self.base.leave_out_ids(pieces):
            self._ids = pieces
            return True
        return False

    def missing_shards(self, width: int) -> int:
        return self.base.missing_shards(width)

    def check_copies(self, name: str) -> None:
        self.base.check_copies(name)

    def shape(self, name: str, shard_dim: Optional[int]) -> list[int]:
        """The base's shape. ValueError if the adapter has another: it was made for another base."""
        shape = self.base.shape(name, shard_dim)
        if name in self._rows:
            shape[0] = self._rows[name]
        if (change := self.changes.get(name)) is not None:
            found = [] if change.whole is None else [list(change.whole.shape)]
            if change.a is not None and change.b is not None:
                found.append([change.b.shape[0], change.a.shape[1]])
            if wrong := [other for other in found if other != shape]:
                raise ValueError(
                    f"the adapter in {self.adapter} was made for another base than {self.folder} (its own is "
                    f"{base_of_adapter(self.adapter)}): it changes {name} of shape {wrong[0]}, which is {shape} here"
                )
        if name in self._rows:
            shape[0] = min(shape[0], self._ids)
        return shape

    def parts(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> list[torch.Tensor]:
        """The base's parts, or one that is computed."""
        if name in self.changes:
            return [self.read(name, shard_dim, start, stop)]
        return self.base.parts(name, shard_dim, start, stop)

    def read(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> torch.Tensor:
        """What the base reads, or, in float32, those entries of the sum alone."""
        change = self.changes.get(name)
        if change is None:
            return self.base.read(name, shard_dim, start, stop)
        shape = self.shape(name, shard_dim)
        low, high = (start, stop) if shard_dim == 0 else (0, shape[0])
        columns = slice(start, stop) if shard_dim == 1 else slice(None)
        if change.whole is None:
            stored = self.base.read(name, shard_dim, start, stop)
        else:
            stored = self._in_order(name, change.whole, low, high)
            stored = stored[:, columns] if stored.ndim == 2 else stored
        if change.a is None or change.b is None:
            return stored
        # In float64, so that the sum does not depend, to the bit, on how many processes share the matrix.
        a, b = change.a[:, columns].double(), self._in_order(name, change.b, low, high)
        total = torch.empty(stored.shape, dtype=torch.float32, device="cpu")
        rows = max(1, SUM_BYTES // max(1, 8 * stored.shape[1]))
        for i in range(0, len(stored), rows):
            some = stored[i : i + rows]
            total[i : i + rows] = some.double().addmm_(b[i : i + rows].double(), a, alpha=change.scale)
            self.mapped.release(some)
        return total

    def _in_order(self, name: str, matrix: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Rows low … high, in Meta's order, of a matrix of the adapter."""
        if not name.endswith(ROTATED):
            return matrix[low:high]
        head = self.args.head_size  # whole heads, because their rows are interleaved
        first, last = low // head * head, -(-high // head) * head
        return to_meta_rows(matrix[first:last], head)[low - first : high - first]


def _are_one(embedding: Optional[Change], output: Optional[Change]) -> bool:
    """Whether two tied matrices stay so: neither is changed, or one saved matrix takes the place of both."""
    if embedding is None or output is None:
        return embedding is output
    return embedding.whole is output.whole and embedding.a is None and output.a is None


def _counts(rows: dict[str, int]) -> str:
    return " and ".join(f"{count} rows of {name}" for name, count in rows.items())
