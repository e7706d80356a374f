"""Tells files of weights apart without reading them whole, so that processes can see whether all load the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

# The ends hold a format's names and shapes, and in .pth files a checksum of each tensor. The blocks between are for
# formats without checksums: a fine-tune changes nearly every number.
END_BYTES = 256 * 1024
BLOCKS, BLOCK_BYTES = 64, 4096


def fingerprints(paths: Iterable[Path], whose: str = "") -> dict[str, str]:
    """Name -> `fingerprint`, for each file. whose: goes before the names."""
    return {whose + path.name: fingerprint(path) for path in paths}


def fingerprint(path: Path) -> str:
    """The size of a file, and a digest of parts of it; of all of it, if it is small."""
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
