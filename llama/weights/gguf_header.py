"""The header of a GGUF file: its metadata, and where each tensor lies. Nothing that it claims is used before it is
checked.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from ..system.files import check_file
from ..system.printable import shortened

MAGIC = b"GGUF"
# A longer header is refused; Llama 2's has a million bytes. Reading one takes a few seconds at most.
HEADER_BYTES = 2**25
ALIGNMENT = 32  # bytes between the beginnings of tensors, unless "general.alignment" says another one
# type of a value in GGUF -> its letter in `struct`
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS, MOST_ENTRIES = 4, 2**40


class Kind(NamedTuple):
    """A kind of numbers: `block` numbers, which lie side by side in a row, take `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


KINDS = {
    0: Kind("F32", 1, 4), 1: Kind("F16", 1, 2), 30: Kind("BF16", 1, 2),
    2: Kind("Q4_0", 32, 18), 3: Kind("Q4_1", 32, 20), 6: Kind("Q5_0", 32, 22), 7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84), 11: Kind("Q3_K", 256, 110), 12: Kind("Q4_K", 256, 144), 13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
}  # fmt: skip
# Kinds that are not computed here.
OTHERS = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Bytes start … stop of the file. `shape` is in torch's order: rows first."""

    kind: Kind
    shape: list[int]
    start: int
    stop: int


class Header(NamedTuple):
    """What a file says of itself. Arrays are tuples."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """The header of a GGUF file. ValueError if it is damaged, cut short, or has tensors of a kind that is not
    computed."""
    size = check_file(path).st_size
    with path.open("rb") as file:
        data = file.read(min(size, HEADER_BYTES))
    if data[:4] != MAGIC:
        raise ValueError(
            f"{path} is no GGUF file: it begins with {shortened(data[:4])} and not with {MAGIC!r}; download it again"
        )
    reader = _Reader(data, size)
    try:
        return _read(reader, size)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it has a text that is not UTF-8; download it again") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _read(reader: _Reader, size: int) -> Header:
    version = reader.number("I")
    if version not in (2, 3):
        big_endian = " (its numbers are in big-endian order)" if version in (2 << 24, 3 << 24) else ""
        raise ValueError(
            f"it is of GGUF's version {version}{big_endian}, and 2 and 3 are read; convert it again with llama.cpp"
        )
    tensors, keys = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(keys):  # ends where the header does, whatever number it claims
        key = reader.text()
        if key in metadata:
            raise ValueError(f"it has the key {shortened(key)} twice; download it again")
        metadata[key] = reader.value(reader.number("I"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(
            f"general.alignment={shortened(alignment)} is not a power of 2 from 8 to {2**20}; download it again"
        )
    infos: dict[str, tuple[Kind, list[int], int]] = {}
    for _ in range(tensors):
        name = reader.text()
        if name in infos:
            raise ValueError(f"it has the tensor {shortened(name)} twice; download it again")
        infos[name] = reader.info(name)
    return Header(metadata, _placed(infos, -(-reader.at // alignment) * alignment, alignment, size))


def _placed(
    infos: dict[str, tuple[Kind, list[int], int]], start: int, alignment: int, size: int
) -> dict[str, TensorInfo]:
    """Where the tensors lie, `start` being where the first does. A wrong bit would move them silently, so each must
    begin where the one before it ends, and the last must end with the file."""
    placed: dict[str, TensorInfo] = {}
    end = next_start = start
    for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        if start + offset != next_start:
            raise ValueError(
                f"the tensor {shortened(name)} begins at {offset}, and not at {next_start - start}; download it again"
            )
        end = next_start + math.prod(shape) // kind.block * kind.nbytes
        placed[name] = TensorInfo(kind, shape, next_start, end)
        next_start = -(-end // alignment) * alignment
    if size < end:
        raise ValueError(f"it has {size} bytes, and its tensors end at {end}: it is cut short; download it again")
    if size > next_start:
        raise ValueError(f"it has {size} bytes, and its tensors end at {end}: it is damaged; download it again")
    return placed


class _Reader:
    """Takes values from the beginning of a file of `size` bytes, and never more than is there."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size, self.at = data, size, len(MAGIC)

    def take(self, nbytes: int) -> int:
        """Step over the next bytes. Returns where they begin."""
        start = self.at
        if nbytes > len(self.data) - start:
            if nbytes <= self.size - start:
                raise ValueError(f"its header has more than {len(self.data)} bytes, and Llama 2's has a million")
            raise ValueError("it ends within its header: it is damaged or cut short; download it again")
        self.at = start + nbytes
        return start

    def number(self, code: str) -> Any:
        """A number; `code` is struct's letter."""
        size = struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", self.data, self.take(size))[0]

    def text(self) -> str:
        start = self.take(self.number("Q"))
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        """A value of the metadata."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == STRING:
                return tuple(self.text() for _ in range(count))
            code = _code(inner)
            start = self.take(count * struct.calcsize(f"<{code}"))
            return struct.unpack_from(f"<{count}{code}", self.data, start)
        number = self.number(_code(kind))
        return as_written(number) if kind == 6 else number

    def info(self, name: str) -> tuple[Kind, list[int], int]:
        """Kind, shape and offset of a tensor."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(
                f"its tensor {shortened(name)} has {dimensions} dimensions, and not 1 to 4; download it again"
            )
        shape = [self.number("Q") for _ in range(dimensions)][::-1]
        number, offset = self.number("I"), self.number("Q")
        if number not in KINDS:
            raise ValueError(
                f"its tensor {shortened(name)} is of kind {OTHERS.get(number, number)}, which is not computed here; "
                f"take a file with {', '.join(kind.name for kind in KINDS.values())}"
            )
        kind = KINDS[number]
        if not all(1 <= n <= MOST_ENTRIES for n in shape) or shape[-1] % kind.block:
            blocks = f", and rows of {kind.name} are whole blocks of {kind.block}" if kind.block > 1 else ""
            raise ValueError(f"its tensor {shortened(name)} has the shape {shape}{blocks}; download it again")
        return kind, shape, offset


def _code(kind: int) -> str:
    if kind not in SCALARS:
        what = "an array of arrays" if kind == ARRAY else f"a value of type {kind}"
        raise ValueError(f"its metadata have {what}, which no model has; download it again")
    return SCALARS[kind]


def as_written(number: float) -> float:
    """The shortest decimal number that float32 rounds to the same: 1e-05, and not 9.999999747378752e-06."""
    if not math.isfinite(number):
        return number
    shorter = (float(f"{number:.{digits}g}") for digits in range(1, 9))
    return next((x for x in shorter if struct.unpack("<f", struct.pack("<f", x))[0] == number), number)
