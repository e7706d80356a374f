"""Memory of this process, as the system has it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Optional

STATUS = Path("/proc/self/status")


def megabytes(key: str) -> Optional[float]:
    """VmHWM: the most that was resident, mapped files included. RssAnon: what is its own now. None where it is not
    told."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024 / 1e6
    if key == "VmHWM":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return None
