"""What tells two files of weights apart without reading them whole: so can the processes see whether all load the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

# The ends hold what a format knows of its tensors: names and shapes, and in .pth files a checksum of each. The blocks between
# are for formats without checksums: a fine-tune changes nearly every number.
END_BYTES = 256 * 1024
BLOCKS, BLOCK_BYTES = 64, 4096


def fingerprints(paths: Iterable[Path]) -> dict[str, str]:
    """Of each file, by its name: its size and a digest of parts of it; of a small file, of all."""
    return {path.name: fingerprint(path) for path in paths}


def fingerprint(path: Path) -> str:
    size = path.stat().st_size
    if size <= 2 * END_BYTES + BLOCKS * BLOCK_BYTES:
        places = [(0, size)]
    else:
        room = size - 2 * END_BYTES - BLOCK_BYTES
        between = [(END_BYTES + room * i // (BLOCKS - 1), BLOCK_BYTES) for i in range(BLOCKS)]
        places = [(0, END_BYTES), *between, (size - END_BYTES, END_BYTES)]
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for at, length in places:
            file.seek(at)
            digest.update(file.read(length))
    return f"{size} bytes with digest {digest.hexdigest()[:12]}"
