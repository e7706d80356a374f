"""Compiled steps in their folder: archives of AOTInductor, kept as `sealed` files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..system import sealed
from ..system.sealed import make_folder, workspace

__all__ = ["keep", "load", "make_folder", "read", "workspace"]


def read(path: Path) -> dict[str, bytes]:
    """The `_parts` of a package. Raises the errors of `sealed.read`."""
    return _parts(sealed.read(path, "delete it, or pass compile=True"))


def _parts(content: bytes) -> dict[str, bytes]:
    """Ending -> bytes, of the shared object and, if it calls operators of ours, of the file that names them."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        ends = {name: end for name in archive.namelist() for end in (".so", ".wrapper.json") if name.endswith(end)}
        if [*ends.values()].count(".so") != 1:
            raise ValueError("it holds no shared object, or several")
        return {"." + end.rpartition(".")[2]: archive.read(name) for name, end in ends.items()}


def load(path: Path) -> Any:
    """The runner of a package: its `run` takes and returns a list of tensors. Raises the errors of `read`, and
    RuntimeError."""
    parts = read(path)
    with workspace(path.parent) as folder:
        for end, part in parts.items():
            sealed.write(folder / f"step{end}", part)
        # The archive's own loader would extract it to a folder that stays until the process ends.
        return torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / "step.so"), 1)


def keep(made: Path, path: Path, folder: Path) -> None:
    """Put an archive of AOTInductor under its name, whole or not at all. folder: a `workspace` beside it."""
    content = made.read_bytes()
    _parts(content)  # raises now, before a bad archive gets a good checksum
    sealed.keep(content, path, folder)
