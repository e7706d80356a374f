"""Reads and replaces files: checks a name before it is opened, reads JSON with numbers in range, watches mapped files.

Every file that a user names is read through `read_file`, or passes `check_file` before a library opens it by its name.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import mmap
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from .checks import real, whole
from .printable import escaped, shortened

if TYPE_CHECKING:
    import torch

KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
SETTINGS_BYTES = 2**20  # most bytes of a file of settings, or of a list
COPY_BYTES = 16 * 2**20  # size of a copied piece: one that fits a processor's cache is twice as fast


class Number(NamedTuple):
    """A number that a JSON file may hold: of `kind`, from `least` to `most`; null or nothing too, unless `required`."""

    kind: type
    least: float
    most: float
    required: bool = False

    def problem(self, key: str, values: Mapping[str, Any]) -> list[str]:
        """The problem with values[key], as a list with one line for a message; empty if there is no problem."""
        value = values.get(key)
        if value is None:
            return [f"missing key {key!r}" if key not in values else f"{key}=None is not {self}"] * self.required
        number = whole(value) if self.kind is int else real(value)
        return (
            []
            if number is not None and self.least <= number <= self.most
            else [f"{key}={shortened(value)} is not {self}"]
        )

    def __str__(self) -> str:
        return f"{'a whole number' if self.kind is int else 'a number'} from {self.least:g} to {self.most:g}"


def user_path(path: Union[str, PathLike[str]]) -> Path:
    """A path as a user gives it. fire, which reads the examples' flags, makes a number of a folder that is called 7."""
    if not str(path):
        raise ValueError("the path is empty; write . for the current folder")
    try:
        return Path(str(path)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} begins with a home folder that does not exist") from error


def listed(items: Iterable[str], most: int = 12) -> str:
    """The first `most` items, escaped and with commas, and how many more there are."""
    items = list(map(escaped, items))
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def contents(folder: Path) -> str:
    """The names in a folder, for a message."""
    try:
        return listed(sorted(path.name for path in folder.iterdir())) or "nothing"
    except OSError as error:
        return f"what cannot be listed ({error.strerror})"


def parse_json(data: bytes, finite: bool = True) -> Any:
    """The value of a JSON text. ValueError for no JSON, too deep nesting, a key twice, or (with `finite`) NaN or
    infinity."""
    number = _finite if finite else float
    try:
        return json.loads(data, parse_constant=number, parse_float=number, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not {error.encoding.upper()} at byte {error.start}; save it as UTF-8") from error


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shortened(text)} is not a finite number")
    return number


def is_there(path: Path) -> bool:
    """Whether the name is taken, even by a link to nothing: then the reader says what is wrong with it."""
    return os.path.lexists(path)


def check_file(path: Path) -> os.stat_result:
    """ValueError unless the name stands for a file. Opens nothing: to open a pipe would wait for its writer."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        what = f"a link to {escaped(os.readlink(path))}, which is not there" if path.is_symlink() else "missing"
        raise ValueError(f"{path} is {what}") from error
    except (OSError, ValueError) as error:  # no permission, a name too long, links in a circle, a name with a zero byte
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "a device")
        raise ValueError(f"{path} is {kind}, and not a file; copy what it holds or gives into a file")
    return found


def refuse_pointer(path: Path, size: int) -> None:
    """ValueError if the file only stands for one that Git LFS keeps elsewhere."""
    if size < 1024 and path.read_bytes().startswith(b"version https://git-lfs.github.com/"):
        raise ValueError(
            f"{path} is a pointer of Git LFS, and not the file itself; fetch it with `git lfs pull`, or download it "
            f"again"
        )


def read_file(path: Path, most: Optional[int] = None, usual: str = "") -> bytes:
    """The bytes of a file. ValueError if they cannot be read or are more than `most`; `usual` says what such a file
    has."""
    size = check_file(path).st_size
    if most is not None and size > most:
        raise ValueError(f"{path} has {size} bytes; {usual}")
    try:
        refuse_pointer(path, size)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path, usual: str, most: int = SETTINGS_BYTES) -> dict[str, Any]:
    """A JSON object of at most `most` bytes. ValueError if there is none; `usual` says what one has."""
    if not is_there(path):
        raise ValueError(
            f"{path} is missing; it comes with the checkpoint, and the folder holds {contents(path.parent)}"
        )
    data = read_file(path, most, usual)
    try:
        value = parse_json(data, finite=False)  # a key that is not read may have any number; `Number` checks the others
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object; {usual}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shortened(key)} stands there twice")
        found[key] = value
    return found


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. It is written beside the old one, and then takes its place and permissions.

    If `path` is a link, the file that it points to is replaced. ValueError if `path` is no file; OSError as `open`
    raises.
    """
    target = Path(os.path.realpath(path))
    mode = None
    if target.exists():
        if not target.is_file():
            raise ValueError(f"{path} is no file that could be written over; name another one")
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mode = stat.S_IMODE(target.stat().st_mode)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    beside = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(
            beside, "xb", opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else 0o600)
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            beside.chmod(mode)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


class MappedFiles:
    """The files that a checkpoint is mapped from. Make it before they are mapped: it notes their sizes and times."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self._found = [check_file(path) for path in self.paths]
        for path, found in zip(self.paths, self._found):
            refuse_pointer(path, found.st_size)

    def joined(self, other: MappedFiles) -> MappedFiles:
        """The files of both, with the sizes and times that each has noted."""
        both = MappedFiles(())
        both.paths, both._found = [*self.paths, *other.paths], [*self._found, *other._found]
        return both

    @cached_property
    def ranges(self) -> list[tuple[int, int, str]]:
        """The addresses, from and to, where the files are mapped, and each one's resolved name. Empty except on
        Linux."""
        names = {str(path.resolve()) for path in self.paths}
        maps = Path("/proc/self/maps")
        ranges: list[tuple[int, int, str]] = []
        for line in maps.read_text(errors="replace").splitlines() if maps.exists() else []:
            place, *_, name = line.split(maxsplit=5)
            if name in names:
                low, high = (int(end, 16) for end in place.split("-"))
                ranges.append((low, high, name))
        return ranges

    def check_unchanged(self, readers: Iterable[torch.Tensor] = ()) -> None:
        """ValueError if a file was written to since. A new file under its name does no harm, nor does a change if
        `readers` are given and none of them lies in the files any more."""
        for path, before in zip(self.paths, self._found):
            try:
                now = path.stat()
            except OSError:
                continue  # the file was removed; the mapping stays
            same_file = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
            changed = same_file and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
            if changed and self._is_read_by(path, list(readers)):
                raise ValueError(
                    f"{path} was written to after it was loaded ({before.st_size} bytes then, {now.st_size} now), and "
                    f"the "
                    "model reads its weights from it; build it again, and replace files by renaming new ones"
                )

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the files, or that is not known."""
        return not self.ranges or any(low <= tensor.data_ptr() < high for low, high, _ in self.ranges)

    def _is_read_by(self, path: Path, tensors: list[torch.Tensor]) -> bool:
        """Whether one of the tensors lies in the file, or that is not known."""
        places = [t.data_ptr() for t in tensors if not t.is_mkldnn]  # a packed one is a copy, which has no address
        ranges = [(low, high) for low, high, name in self.ranges if name == str(path.resolve())]
        return not (places and self.ranges) or any(low <= at < high for at in places for low, high in ranges)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """target[...] = source, some rows at a time. Their pages are released, so that little of the file counts as
        ours."""
        rows = max(1, COPY_BYTES // max(1, source.stride(0) * source.element_size()))
        for i in range(0, len(source), rows):
            target[i : i + rows].copy_(source[i : i + rows])
            self.release(source[i : i + rows])

    def release(self, tensor: torch.Tensor) -> None:
        """Release the pages of a tensor that was copied; until then they count as this process's memory.

        They stay in the system's page cache, and are mapped from there when they are read again. Nothing happens to a
        tensor that lies elsewhere, so any tensor may be passed.
        """
        start = tensor.data_ptr()
        entries = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        low = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        high = (start + entries * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
        if low < high and any(first <= low and high <= last for first, last, _ in self.ranges):
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)
