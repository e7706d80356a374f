"""Files cut short and bytes changed, in bulk: one clear error, or exactly the right weights; no crash, no hang, nothing else.

All in a process of its own, whose end shows a crash that a test could not catch.
"""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, random_weights, write_checkpoint
from forks import Forks

TRUNCATIONS, FLIPS = 30, 100
SMALL = {**PARAMS, "n_layers": 1}


def header_bytes(path: Path, format: str) -> list[int]:
    """Where a file has anything else than numbers: pickles, headers, directories."""
    import zipfile

    if format == "hf":
        return list(range(8 + int.from_bytes(path.read_bytes()[:8], "little")))
    data: set[int] = set()
    raw = path.read_bytes()
    for record in zipfile.ZipFile(path).infolist():
        if "/data/" in record.filename:
            at = record.header_offset
            begin = at + 30 + sum(struct.unpack("<HH", raw[at + 26 : at + 30]))
            data |= set(range(begin, begin + record.file_size))
    return [i for i in range(len(raw)) if i not in data]


def damaged(whole: bytes, places: list[int], truncations: int, flips: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    for _ in range(truncations):
        yield "cut", whole[: rng.randrange(len(whole))]
    for _ in range(flips):
        at = rng.choice(places)
        yield "flip", whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :]


def outcomes(folder: str, tokenizer_path: str, format: str, truncations: int, flips: int, seed: int) -> dict[str, int]:
    """How many of the damaged files were refused, and how many were loaded rightly. Anything else raises."""
    from llama import Llama

    path = next(p for p in sorted(Path(folder).iterdir()) if p.suffix in (".pth", ".safetensors"))
    whole = path.read_bytes()
    places = header_bytes(path, format)
    expected = Llama.build(folder, tokenizer_path, 8, 1, device="cpu").model.state_dict()
    expected = {name: weight.clone() for name, weight in expected.items()}
    counts: Counter[str] = Counter()
    for kind, content in damaged(whole, places, truncations, flips, seed):
        path.unlink()  # not written over: what is loaded is mapped
        path.write_bytes(content)
        try:
            found = Llama.build(folder, tokenizer_path, 8, 1, device="cpu").model.state_dict()
        except ValueError as error:
            if folder not in str(error) or len(str(error)) > 2000:
                raise AssertionError("not a clear error") from error
            counts[f"{kind} refused"] += 1
            continue
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert weight.dtype == found[name].dtype, name
            assert torch.equal(weight, found[name]), name
        counts[f"{kind} loaded rightly"] += 1
    return counts


def write(format: str, root: Path) -> Path:
    source = write_checkpoint(root / "meta", random_weights(SMALL), params=SMALL)
    if format == "meta":
        return source
    from llama.convert import convert

    convert(source, root / format, "hf" if format == "hf" else "meta")
    return root / format


@pytest.mark.parametrize("format", ["meta", "hf", "converted"])
def test_damage_in_bulk(format: str, tmp_path: Path, tokenizer_path: str, forks: Forks) -> None:
    """`converted` is Meta's format as our own converter writes it."""
    folder = write(format, tmp_path)
    call = f"""
import json, sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_faults import outcomes
print(json.dumps(outcomes(*{(str(folder), tokenizer_path, format, TRUNCATIONS, FLIPS, 4)!r})))
"""
    result = forks.run(call, seconds=200)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["cut refused"] == TRUNCATIONS
    assert counts["flip refused"] + counts.get("flip loaded rightly", 0) == FLIPS
    assert counts["flip refused"] > FLIPS / 3
