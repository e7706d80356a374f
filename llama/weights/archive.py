"""A .pth file of torch.save -> its tensors, mapped: a zip archive of one pickle and the numbers of each tensor.

torch.load would make whatever the pickle asks for (tensors on other devices and without numbers, sparse ones, parts
that reach into their neighbours' numbers), and some pickles keep it busy for minutes. This file reads the pickle word
by word, and knows only the words that describe a flat dictionary of tensors. None of them runs code, and each costs the
same.
"""

from __future__ import annotations

import pickletools
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from ..system.files import check_file
from ..system.printable import escaped, shortened

PICKLE_BYTES = 2**20  # largest pickle of a .pth file; 70B's has 0.1 MB. Reading it takes a second at most
# Largest part that is compared with its checksum: norms and scales, whose numbers matter most. Reading the matrices too
# would take a minute; mapping them takes no time.
CHECKED_BYTES = 2**18
DESCRIPTOR = b"PK\x07\x08"  # begins a record after the data, if the writer did not know the sizes before

DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "ShortStorage": torch.int16,
    "IntStorage": torch.int32, "LongStorage": torch.int64, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES",
}  # fmt: skip
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins a file of torch.save before 1.6


class Foreign(Exception):
    """The pickle asks for something other than tensors."""


class Part(NamedTuple):
    """The bytes of a part of the archive."""

    start: int
    size: int


class Name(NamedTuple):
    """A function or class that the pickle names. It is never imported."""

    module: str
    name: str


class Numbers(NamedTuple):
    """A storage: the mapped bytes of a part, as numbers of this dtype."""

    bytes: Any
    dtype: torch.dtype


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file of torch.save, by name, mapped into memory. Nothing in it is run. ValueError if it is
    damaged, or holds other things."""
    check_file(path)
    with path.open("rb") as file:
        if file.read(len(LEGACY)) == LEGACY:
            name = escaped(str(path))
            raise ValueError(
                f"{name} is in the format of torch before 1.6, which cannot be mapped; save it again: import torch; "
                f"torch.save(torch.load({name!r}, map_location='cpu', weights_only=True), {name!r})"
            )
    try:
        tensors = read_archive(path)
    except Foreign as error:
        raise ValueError(
            f"{path} holds something other than tensors, which could run code, so it was not loaded ({error}); save a "
            "dictionary of plain tensors that lie on the CPU"
        ) from error
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(
            f"{path} cannot be read: it is cut short, damaged, or not in the zip format of torch.save "
            f"({escaped(str(error).splitlines()[0]) if str(error) else type(error).__name__}); download or save it "
            f"again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(
            f"{path} is not a flat dictionary of tensors; pass a checkpoint in Meta's or Hugging Face's format"
        )
    return tensors


def read_archive(path: Path) -> Any:
    """The object that was given to torch.save, usually a dictionary of tensors, with its tensors mapped into memory.

    `Foreign` if it holds anything but tensors; ValueError or almost any other error if the archive is damaged.
    """
    parts, index = read_directory(path)
    prefix, _, _ = index.partition("/")
    with path.open("rb") as file:
        file.seek(parts[index].start)
        pickled = file.read(parts[index].size)
        if order := parts.get(f"{prefix}/byteorder"):
            file.seek(order.start)
            if (said := file.read(order.size).decode()) != sys.byteorder:
                raise ValueError(f"its numbers are in {said!r} byte order, and this machine's are {sys.byteorder!r}")
    whole: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)  # a private mapping
    data = f"{prefix}/data/"
    numbers = {name.removeprefix(data): part for name, part in parts.items() if name.startswith(data)}
    return _Reader(whole, numbers).read(pickled)


def read_directory(path: Path) -> tuple[dict[str, Part], str]:
    """The parts of a .pth file by their names, and the name of its pickle. ValueError (or one of zipfile's errors) if
    the directory is damaged.

    A wrong bit in a directory or header would move a tensor by some bytes, silently. So every part must lie at the
    place that both state, the parts must fill the file, and all but large ones must match their checksum.
    """
    parts: dict[str, Part] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        if len({record.filename for record in records}) < len(records) or not records or records[0].header_offset:
            raise ValueError("its directory is damaged")
        for record, end in zip(records, ends):
            file.seek(record.header_offset)
            header = file.read(30)
            name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
            name = file.read(name_bytes)
            start = record.header_offset + 30 + name_bytes + extra_bytes
            gap = end - (start + record.file_size)
            file.seek(end - gap)
            if (
                header[:4] != b"PK\x03\x04"
                or name != record.orig_filename.encode()
                or record.compress_type != zipfile.ZIP_STORED
                or record.compress_size != record.file_size
                or (gap != 0 and (gap not in (16, 24) or file.read(4) != DESCRIPTOR))
            ):
                raise ValueError(f"its part {shortened(record.filename)} is not where its directory says")
            is_data = "/data/" in record.filename
            if not is_data and record.file_size > PICKLE_BYTES:
                raise ValueError(f"its part {shortened(record.filename)} has {record.file_size} bytes")
            if not is_data or record.file_size <= CHECKED_BYTES:
                file.seek(start)
                if zlib.crc32(file.read(record.file_size)) != record.CRC:
                    raise ValueError(
                        f"its part {shortened(record.filename)} has not the checksum that its directory says"
                    )
            parts[record.filename] = Part(start, record.file_size)
    index = [name for name in parts if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(index) != 1:
        raise ValueError("it has no data.pkl, or several")
    return parts, index[0]


def _text(value: Any) -> str:
    """The value, a str. Only that is compared or shown: for deeply nested tuples either takes as long as a file
    wants."""
    if not isinstance(value, str):
        raise Foreign(f"it has a {type(value).__name__} for a name")
    return value


class _Reader:
    """A stack machine for the few words of pickles that describe tensors."""

    def __init__(self, whole: torch.UntypedStorage, parts: dict[str, Part]) -> None:
        self.whole, self.parts = whole, parts
        self.unused = set(parts)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Any] = {}

    def read(self, pickled: bytes) -> Any:
        """The object that the pickle describes. Use a reader for one pickle."""
        stack, memo = self.stack, self.memo
        for opcode, arg, _ in pickletools.genops(pickled):
            word = opcode.name
            if word in VALUES:
                stack.append(arg)
            elif word in CONSTANTS:
                stack.append(CONSTANTS[word])
            elif word in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])  # type: ignore[index]
            elif word in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]  # type: ignore[index]
            elif word == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif word == "MARK":
                stack.append(MARK)
            elif word == "EMPTY_DICT":
                stack.append({})
            elif word == "EMPTY_LIST":
                stack.append([])
            elif word == "TUPLE":
                stack.append(tuple(self._marked()))
            elif word in TUPLES:
                stack[-TUPLES[word] :] = [tuple(stack[-TUPLES[word] :])]
            elif word == "APPEND":
                stack[-2].append(stack.pop())
            elif word == "APPENDS":
                items = self._marked()
                stack[-1].extend(items)
            elif word in ("SETITEM", "SETITEMS"):
                items = self._marked() if word == "SETITEMS" else [stack.pop(-2), stack.pop()]
                self._set(stack[-1], items)
            elif word == "GLOBAL":
                stack.append(Name(*str(arg).split(" ", 1)))
            elif word == "STACK_GLOBAL":
                stack[-2:] = [Name(*map(_text, stack[-2:]))]
            elif word == "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            elif word == "REDUCE":
                stack[-2:] = [self._call(*stack[-2:])]
            elif word == "BUILD":
                stack.pop()  # attributes of a dictionary: versions of modules
            elif word == "STOP":
                break
            elif word not in ("PROTO", "FRAME"):
                raise Foreign(f"its pickle has {word}")
        (value,) = stack
        if self.unused and isinstance(value, dict):
            raise ValueError(f"its part {shortened(min(self.unused))} belongs to no tensor")
        return value

    def _marked(self) -> list[Any]:
        """Take the items above the last mark off the stack, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    @staticmethod
    def _set(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise ValueError("its index is damaged")
        for key, value in zip(map(_text, items[::2]), items[1::2]):
            if key in target:
                raise ValueError(f"it has {shortened(key)} twice")
            target[key] = value

    def _storage(self, kind: str, dtype: Any, key: str, location: str, count: int) -> Numbers:
        """The numbers of a part. `location`, the device that they were saved from, does not matter."""
        if _text(kind) != "storage" or not isinstance(dtype, Name) or dtype.name not in DTYPES:
            raise Foreign(f"it holds {shortened(getattr(dtype, 'name', '?'))}")
        if _text(key) not in self.parts:
            raise ValueError(f"its index names a part that is not there, {shortened(key)}")
        part, of = self.parts[key], DTYPES[dtype.name]
        if type(count) is not int or part.size != count * of.itemsize:
            raise ValueError(
                f"its part {shortened(key)} has {part.size} bytes, and its index says another number of {of}"
            )
        self.unused.discard(key)
        if key not in self.storages:
            self.storages[key] = self.whole[part.start : part.start + part.size]
        return Numbers(self.storages[key], of)

    def _call(self, what: Any, args: Any) -> Any:
        name = what if isinstance(what, Name) else Name("", "something that is no function")
        if name == ("collections", "OrderedDict") and args == ():
            return {}
        if name.module == "torch._utils":
            if name.name == "_rebuild_tensor_v2":
                return self._tensor(*args)
            if name.name == "_rebuild_tensor_v3":
                *first, dtype = args[:7]
                return self._tensor(*first, *args[7:], dtype=dtype)
            if name.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return args[0]
        raise Foreign(f"it holds {shortened('.'.join(name))}")

    def _tensor(
        self, numbers: Numbers, offset: int, shape: Any, stride: Any, grad: bool, hooks: Any, marks: Any = None, *,
        dtype: Optional[Name] = None,
    ) -> torch.Tensor:  # fmt: skip
        """A tensor over a storage. grad and hooks belong to a training that has ended."""
        kind = numbers.dtype if dtype is None else getattr(torch, dtype.name, None)
        if not isinstance(kind, torch.dtype):
            raise Foreign(f"it holds {shortened('.'.join(dtype or ()))}")
        if marks:
            raise ValueError("it has a tensor that stands for the negative or conjugate of its numbers")
        if (
            len(shape) != len(stride)
            or len(shape) > 8
            or any(type(n) is not int or n < 0 for n in (offset, *shape, *stride))
        ):
            raise ValueError("it has a tensor with an impossible shape")
        last = 0
        for n, step in sorted(zip(shape, stride), key=lambda pair: pair[1]):
            if n > 1 and step <= last:
                raise ValueError(f"it has a tensor of shape {shape} whose numbers overlap; save it with contiguous()")
            last += (n - 1) * step
        if 0 not in shape and (offset + last + 1) * kind.itemsize > numbers.bytes.nbytes():
            raise ValueError(f"it has a tensor of shape {shape} in a part of {numbers.bytes.nbytes()} bytes")
        return torch.empty(0, dtype=kind, device="cpu").set_(numbers.bytes, offset, shape, stride)
