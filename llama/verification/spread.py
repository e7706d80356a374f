"""Every number of the weights, read once and piece by piece: whether it is finite, and whether it is like its
neighbours."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..model import Transformer
from ..system.files import listed
from ..system.printable import counted
from ..system.progress import bar
from ..weights.checkpoint import Checkpoint, cut
from .results import Result, failed, passed

PIECE_NUMBERS = 2**24  # read at a time: 64 MB in float32
LONE_ROW = 8.0  # times the next largest row of a matrix: no row of a trained one goes so far beyond the others
LONE_LAYER = 64.0  # times the median over the layers of the largest number of such a weight
LONE_SPREAD = 16.0  # the same for the standard deviation, up and down
NORMS = 1e-3, 1e3  # the mean of a norm: Llama 2's go from 0.02 to 2
MATRICES = 1e-5, 10.0  # the standard deviation of a matrix: Llama 2's go from 0.005 to 0.04
VOCABULARY = ("tok_embeddings", "output")  # rows of ids that nothing uses are equal numbers
DAMAGED = (
    "A file was damaged, or a program that converted or merged the weights went wrong. Compare its checksum with that "
    "of its source, and download or convert it again."
)


class Spread(NamedTuple):
    """The numbers of one weight. low, high: float32, of each of its rows; a norm's numbers count as rows of one."""

    name: str
    low: torch.Tensor
    high: torch.Tensor
    mean: float
    std: float
    is_matrix: bool

    @property
    def kind(self) -> str:
        """Its name without the number of its layer."""
        return re.sub(r"\.\d+\.", ".N.", self.name)

    @property
    def largest(self) -> torch.Tensor:
        """The largest size of a number in each row."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def in_vocabulary(self) -> bool:
        return self.name.startswith(VOCABULARY)


def check_weights(checkpoint: Checkpoint, model: Transformer) -> list[Result]:
    """The numbers of a folder. model: its own, on the meta device. Integers are left out, since any of them may
    occur."""
    spreads, numbers = [], 0
    plan = {name: where for name, where in cut(model).items() if checkpoint.dtypes[name].is_floating_point}
    for name, (shape, dim, _) in bar(iterable=plan.items(), desc="Weights", unit="tensor"):
        if 0 not in shape:
            spreads.append(_measure(checkpoint, name, shape, dim))
            numbers += torch.Size(shape).numel()
    left_out = len(cut(model)) - len(plan)
    beside = f"; {counted(left_out, 'tensor')} of integers left out" if left_out else ""
    if wrong := [line for spread in spreads for line in _not_finite(spread)]:
        return [failed("finite", listed(wrong, 4), DAMAGED)]
    finite = passed("finite", f"{numbers:,} numbers in {counted(len(spreads), 'tensor')}{beside}")
    if wrong := list(_unusual(spreads)):
        return [finite, failed("spread", listed(wrong, 4), DAMAGED)]
    return [finite, passed("spread", _in_words(spreads))]


def _measure(checkpoint: Checkpoint, name: str, shape: list[int], dim: int | None) -> Spread:
    lows, highs = [], []
    total, squares, count = 0.0, 0.0, 0
    for part in checkpoint.parts(name, dim, 0, 1 if dim is None else shape[dim]):
        part = part if part.ndim > 1 else part[:, None]
        step = max(1, PIECE_NUMBERS // part[0].numel())
        bounds = []
        for i in range(0, len(part), step):
            piece = part[i : i + step].float().reshape(-1, part.shape[-1])
            bounds.append(piece.aminmax(dim=1))
            total, squares = total + piece.sum().item(), squares + torch.linalg.vector_norm(piece).item() ** 2
            count += piece.numel()
            checkpoint.mapped.release(part[i : i + step])
        lows.append(torch.cat([low for low, _ in bounds]))
        highs.append(torch.cat([high for _, high in bounds]))
    if dim == 1:  # every part has a piece of all rows
        low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
    else:
        low, high = torch.cat(lows), torch.cat(highs)
    mean = total / count
    return Spread(name, low, high, mean, max(0.0, squares / count - mean**2) ** 0.5, len(shape) > 1)


def _not_finite(spread: Spread) -> Iterator[str]:
    for what, rows in (
        ("NaN", spread.low.isnan() | spread.high.isnan()),
        ("infinity", spread.low.isinf() | spread.high.isinf()),
    ):
        if count := int(rows.sum()):
            first = int(rows.nonzero()[0])
            more = f" and {counted(count - 1, 'more row')}" if count > 1 else ""
            yield f"{spread.name} has {what} in row {first}{more}"


def _unusual(spreads: Iterable[Spread]) -> Iterator[str]:
    kinds: dict[str, list[Spread]] = defaultdict(list)
    for spread in spreads:
        kinds[spread.kind].append(spread)
    for alike in kinds.values():
        usual_size = statistics.median(float(each.largest.max()) for each in alike)
        usual_std = statistics.median(each.std for each in alike)
        for each in alike:
            yield from _unusual_alone(each) or _unusual_among(
                each, usual_size, usual_std if len(alike) > 2 else each.std
            )


def _unusual_alone(spread: Spread) -> list[str]:
    name, largest = spread.name, spread.largest
    if len(largest) > 2:
        (first, second), (row, _) = (values.tolist() for values in largest.topk(2))
        if first > LONE_ROW * second:
            place = "row" if spread.is_matrix else "entry"
            bit = "one bit of an exponent has likely flipped" if second > 0 else "all others are zeros"
            return [f"{name} has {first:.3g} in {place} {row}, and no other {place} goes beyond {second:.3g}: {bit}"]
    if name.endswith((".scales", ".zeros")):
        return []
    if not spread.is_matrix:
        usual = NORMS[0] < spread.mean < NORMS[1]
        return [] if usual else [f"the mean of {name} is {spread.mean:.3g}, and that of a norm is near 1"]
    constant = int((spread.low == spread.high).sum())
    if constant > (len(largest) // 2 if spread.in_vocabulary else 0):
        return [f"{constant} of {counted(len(largest), 'row')} of {name} are the same number throughout"]
    if not MATRICES[0] < spread.std < MATRICES[1]:
        return [f"the standard deviation of {name} is {spread.std:.3g}, and that of a matrix is from 0.001 to 1"]
    return []


def _unusual_among(spread: Spread, usual_size: float, usual_std: float) -> list[str]:
    largest = float(spread.largest.max())
    if largest > LONE_LAYER * usual_size:
        return [f"{spread.name} goes to {largest:.3g}, and those of other layers to {usual_size:.3g}"]
    if spread.is_matrix and not usual_std / LONE_SPREAD < spread.std < usual_std * LONE_SPREAD:
        return [
            f"{spread.name} has a standard deviation of {spread.std:.3g}, and those of other layers {usual_std:.3g}"
        ]
    return []


def _in_words(spreads: list[Spread]) -> str:
    matrices = [each.std for each in spreads if each.is_matrix and not each.name.endswith((".scales", ".zeros"))]
    norms = [each.mean for each in spreads if not each.is_matrix and each.name.endswith("norm.weight")]
    padding = sum(int((each.low == each.high).sum()) for each in spreads if each.in_vocabulary and each.is_matrix)
    told = f"norms have means from {min(norms):.2g} to {max(norms):.2g}"
    if matrices:
        told = f"matrices have standard deviations from {min(matrices):.2g} to {max(matrices):.2g}, {told}"
    return told + (f"; {counted(padding, 'row')} of unused ids" if padding else "")
