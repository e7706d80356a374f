"""What a file of a checkpoint must be before it is believed: JSON with numbers in range, an archive with its parts in place.

And how to let go of the pages of a mapped file, so that what was copied out of it does not count twice.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

PICKLE_BYTES = 64 * 2**20  # the most that the index of a .pth file may have; 70B's has 0.1 MB
COPY_BYTES = 16 * 2**20  # what a processor's cache may hold: twice as fast as larger pieces
DESCRIPTOR = b"PK\x07\x08"  # after the data, where sizes were not known before it


class Number(NamedTuple):
    """What a JSON file may hold under a key: `kind` from `least` to `most`; null too, unless `required`."""

    kind: type
    least: float
    most: float
    required: bool = False

    def problem(self, key: str, values: Mapping[str, Any]) -> list[str]:
        value = values.get(key)
        if value is None:
            return [f"missing key {key!r}" if key not in values else f"{key}=None is not {self}"] * self.required
        kinds = (int,) if self.kind is int else (int, float)
        good = isinstance(value, kinds) and not isinstance(value, bool) and self.least <= value <= self.most
        return [] if good and math.isfinite(value) else [f"{key}={shortened(value)} is not {self}"]

    def __str__(self) -> str:
        return f"{'a whole number' if self.kind is int else 'a number'} from {self.least:g} to {self.most:g}"


def listed(items: Iterable[str], most: int = 12) -> str:
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def contents(folder: Path) -> str:
    return listed(sorted(path.name for path in folder.iterdir())) or "nothing"


def shortened(value: Any, most: int = 80) -> str:
    text = f"a {value.bit_length()}-bit number" if isinstance(value, int) and value.bit_length() > 4096 else repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def read_json(path: Path, usual: str, most: int = 2**20) -> dict[str, Any]:
    """A JSON object of at most `most` bytes. ValueError where there is none; `usual` says what one has."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; it comes with the checkpoint, and the folder holds {contents(path.parent)}")
    if path.stat().st_size > most:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; {usual}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object; {usual}")
    return value


def check_archive(path: Path) -> None:
    """That a .pth file is a zip archive whose index is intact. ValueError (or one of zipfile's errors) where it is not.

    torch believes the archive's directory and headers: a wrong bit there would move a tensor by some bytes, silently. So
    every record must lie where both say, the records must fill the file, and all but the tensors' data must have their
    checksum. The data's checksums are not computed: that would read the whole file.
    """
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
            gap = end - (record.header_offset + 30 + name_bytes + extra_bytes + record.file_size)
            file.seek(end - gap)
            if (
                header[:4] != b"PK\x03\x04"
                or name != record.orig_filename.encode()
                or record.compress_type != zipfile.ZIP_STORED
                or record.compress_size != record.file_size
                or (gap != 0 and (gap not in (16, 24) or file.read(4) != DESCRIPTOR))
            ):
                raise ValueError(f"its part {record.filename} is not where its directory says")
            if "/data/" not in record.filename:
                if record.file_size > PICKLE_BYTES:
                    raise ValueError(f"its part {record.filename} has {record.file_size} bytes")
                archive.read(record)  # which compares its checksum


class MappedFiles:
    """Where the files of a checkpoint are mapped in this process's memory. Empty where the system does not tell (not Linux)."""

    def __init__(self, paths: Iterable[Path]) -> None:
        names = {str(path.resolve()) for path in paths}
        self.ranges: list[tuple[int, int]] = []
        maps = Path("/proc/self/maps")
        if maps.exists():
            for line in maps.read_text(errors="replace").splitlines():
                place, *_, name = line.split(maxsplit=5)
                if name in names:
                    low, high = (int(end, 16) for end in place.split("-"))
                    self.ranges.append((low, high))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """target[...] = source, some rows at a time, each of which is let go: never is much of the file counted as ours."""
        rows = max(1, COPY_BYTES // max(1, source.stride(0) * source.element_size()))
        for i in range(0, len(source), rows):
            target[i : i + rows].copy_(source[i : i + rows])
            self.release(source[i : i + rows])

    def release(self, tensor: torch.Tensor) -> None:
        """Let the pages of a tensor that was copied go: they count as this process's memory as long as they are mapped.

        They stay in the system's page cache, and come back from there when they are looked at again. Nothing happens to
        a tensor that lies elsewhere, so it is safe for what may or may not be a view of the file.
        """
        start = tensor.data_ptr()
        entries = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        low = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        high = (start + entries * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
        if low < high and any(first <= low and high <= last for first, last in self.ranges):
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)
