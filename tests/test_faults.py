"""Damaged files in bulk: one clear error, or exactly the right answers; no crash, no hang, nothing else."""

from __future__ import annotations

from pathlib import Path

import mutate

MUTATIONS = 180


def test_mutated_files(tmp_path: Path) -> None:
    """Of every format; `python tests/mutate.py` does the same with thousands."""
    unexpected: list[str] = []
    counts = mutate.run(mutate.make_folders(tmp_path), MUTATIONS, 4, unexpected.append)
    assert unexpected == []
    assert counts.total() == MUTATIONS
    assert sum(n for key, n in counts.items() if key[2] == "refused") > MUTATIONS / 2
