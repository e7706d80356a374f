"""Reads what the launcher says about this process: torchrun's variables, or none. It needs no torch, unless the
launcher leaves something open."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Optional


@dataclass(frozen=True)
class Launch:
    """This process's place among those that were started together."""

    by_launcher: bool  # False: a plain script, a notebook, a debugger
    rank: int
    world_size: int
    local_rank: int  # rank on this node
    local_world_size: int
    launcher: Optional[int] = None  # torchrun's process id
    store: Any = None  # torch's store where they meet, if no launcher says it
    why_gone: Optional[Callable[[], str]] = None  # why one is gone of those that this process has started, or ""

    @staticmethod
    def read() -> Launch:
        """Read the environment, or an initialized process group. ValueError if a variable is missing, no number, or
        does not fit another."""
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if dist := joined():  # the caller did that, and needs no variables
            rank, world_size = dist.get_rank(), dist.get_world_size()
        else:
            world_size = _number("WORLD_SIZE", 1, least=1)
            rank = _number("RANK")
            if missing and (rank > 0 or world_size > 1):
                told = " and ".join(
                    f"{name} is {os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name not in missing
                )
                raise ValueError(
                    f"the environment says that {told}, and lacks {' and '.join(missing)}; start with torchrun, or "
                    "unset them all for a single process"
                )
            if missing:
                return ALONE
            _number("RANK", most=world_size - 1, why=f"WORLD_SIZE is {world_size}")
            _number("MASTER_PORT", most=65535)
        default = world_size if "LOCAL_WORLD_SIZE" in os.environ else min(world_size, _gpus() or world_size)
        local_world_size = _number("LOCAL_WORLD_SIZE", default, least=1)
        local_rank = _number("LOCAL_RANK", rank % local_world_size)
        if "LOCAL_WORLD_SIZE" in os.environ and not dist:
            _number("LOCAL_RANK", local_rank, most=local_world_size - 1, why=f"LOCAL_WORLD_SIZE is {local_world_size}")
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        return Launch(True, rank, world_size, local_rank, local_world_size, launcher)


ALONE = Launch(False, 0, 1, 0, 1)


def _number(name: str, default: int = 0, least: int = 0, most: int = 2**31, why: str = "") -> int:
    """An environment variable. ValueError if it is no whole number from `least` to `most`."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or not least <= int(value) <= most:
        bounds = f" from {least} to {most}" + (f", since {why}" if why else "") if value.isdecimal() else ""
        raise ValueError(
            f"the environment variable {name} is {value!r}; torchrun sets it to a number{bounds}, or unset it"
        )
    return int(value)


def api_key() -> Optional[str]:
    """The key that clients of a server have to know, if the environment names one."""
    return os.environ.get("LLAMA_API_KEY") or None


def error_file() -> Optional[Path]:
    """The file in which torchrun looks for the reason why this process failed."""
    named = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return None if named is None else Path(named)


def joined() -> Optional[ModuleType]:
    """torch.distributed, if this process has joined a group. It has not if nobody has imported torch."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def is_first_process() -> bool:
    """Whether this is the one process of all that speaks to the user."""
    dist = joined()
    return dist is None or dist.get_rank() == 0


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
