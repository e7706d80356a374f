"""Keeps files that are run as machine code in a folder: checks who can write there, and whether a file is whole.

Only this user (or root) may be able to change them, and each ends in a checksum. The bytes that were checked are copied
to a private folder, and loaded from there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

try:
    import fcntl
    import grp
    import pwd
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DIGITS = 64  # length of the SHA-256 at a file's end, in hexadecimal digits
MOST_BYTES = 2**30  # largest file that is read; compiled steps of 7B have about 30 MB
PREFIX = "tmp-"  # begins the names of temporary folders
LOCK = ".lock"  # locked by each process that has such a folder
# No link is followed, and no pipe waited for.
FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, for this user alone, whatever the umask is. ValueError if others can change
    it."""
    for place in (*reversed(folder.parents), folder):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """ValueError if somebody else can put files into a folder, or another folder in its place.

    Folders above it may be like /tmp: all can write there, but nobody can rename another's files. On Windows nothing is
    checked: files have lists of rights and no mode, and a user's own folders are closed to others.
    """
    place = folder.resolve()
    if not place.is_dir():
        raise ValueError(f"{folder} is not a folder; let LLAMA_CACHE name one")
    for above in (place, *place.parents):
        status = above.stat()
        _check_owner(above, status)
        if _others_write(status) and (above == place or not status.st_mode & stat.S_ISVTX):
            raise ValueError(
                f"others can write to {above}, so what lies in {place} may be theirs; "
                f"run chmod go-w {above}, or let LLAMA_CACHE name another folder"
            )


def _check_owner(path: Path, status: os.stat_result) -> None:
    if hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid()):
        raise ValueError(
            f"{path} belongs to user {status.st_uid}, and this is user {os.geteuid()}; let LLAMA_CACHE name a folder "
            f"of yours"
        )


def _others_write(status: os.stat_result) -> bool:
    """Whether somebody else can write. A group that has only this user, as many systems make one for each, is
    allowed."""
    if not hasattr(os, "geteuid"):
        return False
    if status.st_mode & stat.S_IWGRP:
        try:
            user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
        except KeyError:
            return True
        if not (user.pw_gid == group.gr_gid and user.pw_name == group.gr_name and not group.gr_mem):
            return True
    return bool(status.st_mode & stat.S_IWOTH)


def read(path: Path, way_out: str) -> bytes:
    """The content of a file. ValueError if somebody else could have written it, or its checksum is wrong; OSError if it
    cannot be read."""
    check_folder(path.parent)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | FLAGS)) as file:
            status = os.fstat(file.fileno())  # asks the open file: its name may mean another file by now
            _check_owner(path, status)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > MOST_BYTES:
                raise ValueError(f"{path} is not a plain file with one name, or is too large; {way_out}")
            if _others_write(status):
                raise ValueError(f"others can write to {path}, so it may be theirs; {way_out}")
            data = file.read(MOST_BYTES)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a symbolic link; {way_out}") from error
    content, digest = data[:-DIGITS], data[-DIGITS:]
    if digest != _digest(path, content):
        raise ValueError(f"{path} is damaged: its checksum is wrong; {way_out}")
    return content


def _digest(path: Path, content: bytes) -> bytes:
    """A digest of the content and of the name, which says what it is for."""
    return hashlib.sha256(path.name.encode() + content).hexdigest().encode()


def load(path: Path, loader: Callable[[str], object]) -> None:
    """Give a copy of a shared object's checked bytes to a loader. Raises the errors of `read`."""
    content = read(path, "delete it")
    with workspace(path.parent) as folder:
        write(folder / "kernels.so", content)
        loader(str(folder / "kernels.so"))


def keep(content: bytes, path: Path, folder: Path) -> None:
    """Put a file under its name, whole or not at all. folder: a `workspace` beside it."""
    sealed = folder / path.name
    write(sealed, content + _digest(path, content))
    os.replace(sealed, path)


def write(path: Path, data: bytes) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A block with a new folder for this process alone, in `folder`, or in the system's temporary one if that is
    read-only."""
    writable = os.access(folder, os.W_OK)
    with (
        _in_use(folder) if writable and fcntl is not None else nullcontext(),
        tempfile.TemporaryDirectory(
            prefix=PREFIX, dir=folder if writable else None, ignore_cleanup_errors=True
        ) as name,
    ):
        check_folder(Path(name))
        yield Path(name).resolve()


@contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """A block that holds the folder's lock, which the system frees however a process ends. A process that has it alone
    removes the folders of killed processes."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | FLAGS, 0o600)
    try:
        with suppress(OSError):  # a network disk without locks
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in folder.glob(f"{PREFIX}*"):
                    shutil.rmtree(left, ignore_errors=True)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
