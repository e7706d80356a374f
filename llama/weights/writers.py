"""Writes .pth, safetensors and GGUF files tensor by tensor; torch.save and safetensors need all tensors at once."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .gguf_header import ALIGNMENT as GGUF_ALIGNMENT
from .gguf_header import ARRAY, KINDS, MAGIC, STRING
from .huggingface import SAFETENSORS_DTYPES

STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
}
GGUF_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30, torch.uint8: 8}  # bytes are blocks of Q8_0
ALIGNMENT = 64  # alignment of a tensor's first byte in a .pth file, as in torch.save


class Entry(NamedTuple):
    """A tensor of a file to write. `read` makes it when its turn comes; `done` gets it afterwards, to free it."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    read: Callable[[], torch.Tensor]
    done: Callable[[torch.Tensor], None]

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, file: Any) -> None:
        """Append the tensor's bytes to an open file."""
        tensor = self.read()
        file.write(tensor.to(self.dtype).contiguous().flatten().view(torch.uint8).numpy())
        self.done(tensor)


def write_safetensors(path: Path, entries: Sequence[Entry], progress: Any) -> None:
    """8 bytes for the header's length, the header in JSON, the tensors one after another: the whole format."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": codes[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            entry.write(file)
            progress.update()


class _Stored(NamedTuple):
    """Stands for a tensor in the pickle, as torch.save writes it: its numbers are in another part of the archive."""

    entry: Entry
    key: str

    def __reduce__(self) -> Any:
        strides = [math.prod(self.entry.shape[i + 1 :]) for i in range(len(self.entry.shape))]
        return torch._utils._rebuild_tensor_v2, (
            _Numbers(self),
            0,
            (*self.entry.shape,),
            (*strides,),
            False,
            OrderedDict(),
        )


class _Numbers:
    """Stands for the storage of a tensor."""

    def __init__(self, stored: _Stored) -> None:
        self.stored = stored


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Numbers):
            return None
        entry, key = obj.stored
        return "storage", STORAGES[entry.dtype], key, "cpu", math.prod(entry.shape)


def write_pth(path: Path, entries: Sequence[Entry], progress: Any) -> None:
    """A zip archive, nothing compressed: a pickle of names and shapes, and the numbers of each tensor."""
    index = io.BytesIO()
    _Pickler(index, protocol=2).dump({entry.name: _Stored(entry, str(i)) for i, entry in enumerate(entries)})
    with path.open("wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), index.getvalue())
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for i, entry in enumerate(entries):
            info = zipfile.ZipInfo(f"archive/data/{i}")
            info.file_size = entry.nbytes
            large = entry.nbytes * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule; the header is then 20 bytes longer
            header = raw.tell() + 30 + len(info.filename) + 20 * large + 4
            padding = -header % ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            with archive.open(info, "w") as file:
                entry.write(file)
            progress.update()
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def write_gguf(path: Path, entries: Sequence[Entry], progress: Any, metadata: dict[str, Any]) -> None:
    """A header of metadata, names and shapes; the tensors. An entry of uint8 has the bytes of Q8_0, which its shape
    counts."""
    header = [MAGIC, struct.pack("<IQQ", 3, len(entries), len(metadata))]
    for key, value in metadata.items():
        kind, data = _gguf_value(value)
        header += [_gguf_text(key), struct.pack("<I", kind), data]
    at = 0
    for entry in entries:
        code = GGUF_CODES[entry.dtype]
        columns = entry.shape[-1] * entry.dtype.itemsize // KINDS[code].nbytes * KINDS[code].block
        shape = [columns, *entry.shape[-2::-1]]
        header += [_gguf_text(entry.name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, at)]
        at += entry.nbytes + -entry.nbytes % GGUF_ALIGNMENT
    text = b"".join(header)
    with path.open("wb") as file:
        file.write(text + bytes(-len(text) % GGUF_ALIGNMENT))
        for entry in entries:
            entry.write(file)
            file.write(bytes(-entry.nbytes % GGUF_ALIGNMENT))
            progress.update()


def _gguf_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _gguf_value(value: Any) -> tuple[int, bytes]:
    """The code of a value's type, and its bytes. Whole numbers have 32 bits, in lists with a sign; llama.cpp reads them
    so."""
    if isinstance(value, str):
        return STRING, _gguf_text(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(_gguf_text, value))
        kind, code = (6, "f") if isinstance(value[0], float) else (5, "i")
        return ARRAY, struct.pack(f"<IQ{len(value)}{code}", kind, len(value), *value)
    kind, code = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return kind, struct.pack(f"<{code}", value)
