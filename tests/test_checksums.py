"""The lists of checksums that come with a folder, and those inside files of torch.save."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from llama.system.files import SETTINGS_BYTES
from llama.verification.checksums import check_checksums, new_checklist, record
from llama.verification.results import FAIL, NOT_APPLICABLE, PASS


def written(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).write_text(name)
    return [folder / name for name in names]


def md5_line(name: str, data: str) -> str:
    return f"{hashlib.md5(data.encode()).hexdigest()}  {name}\n"


def test_what_is_told(tmp_path: Path) -> None:
    """How many files there are sums for, and of which; the first problems."""
    files = written(tmp_path, "a", "b", "c", "d", "e", "f")
    told = check_checksums(tmp_path, iter(files)).told
    assert told.startswith("there is none for a, b, c and 3 more, so a wrong bit that leaves a number plausible stays")
    record(tmp_path, files[:5])
    found = check_checksums(tmp_path, files)
    assert (found.verdict, found.told) == (PASS, "5 files as checklist.chk (md5) says; there is none for f")
    torch.save({"x": torch.ones(99)}, tmp_path / "f.pth")
    found = check_checksums(tmp_path, [*files[:5], tmp_path / "f.pth"])
    both = "5 files as checklist.chk (md5) says and 1 file as the checksum in it (crc32) says"
    assert (found.verdict, found.told) == (PASS, both)
    for path in files:
        path.write_text("damaged")
    found = check_checksums(tmp_path, files)
    assert (found.verdict, found.told.count(" has md5 "), found.told[-11:]) == (FAIL, 4, " and 1 more")


def test_lines_of_a_checklist(tmp_path: Path) -> None:
    """As md5sum writes them, for texts and binaries, in small letters or large; empty ones are left out."""
    files = written(tmp_path, "a", "b b")
    lines = md5_line("a", "a"), md5_line("b b", "b b").replace("  ", " *", 1).upper().replace("B B", "b b")
    (tmp_path / "checklist.chk").write_text("\n".join(lines) + " \n\n")
    assert check_checksums(tmp_path, []).told == "2 files as checklist.chk (md5) says"
    for wrong in (b"\xff", b"0" * 31 + b"  a", b"0" * 32 + b"  ../a", b"0" * 32 + b"a"):
        (tmp_path / "checklist.chk").write_bytes(wrong)
        assert "which is no md5 and a name" in check_checksums(tmp_path, files).told
    (tmp_path / "checklist.chk").write_bytes(b"\n" * (SETTINGS_BYTES + 1))
    assert f"has {SETTINGS_BYTES + 1} bytes; a checklist has a few lines" in check_checksums(tmp_path, files).told


def test_lists_of_other_folders(tmp_path: Path) -> None:
    """Beside a GGUF file, or a tokenizer above the folder, a list counts for the files that are loaded."""
    (path,) = written(tmp_path, "a.gguf")
    (tmp_path / "checklist.chk").write_text(md5_line("a.gguf", "a.gguf") + md5_line("other", ""))
    assert check_checksums(path, [path]).told == "1 file as checklist.chk (md5) says"
    (tmp_path / "checklist.chk").unlink()
    assert new_checklist(path) == new_checklist(tmp_path) == tmp_path / "checklist.chk"
    above = written(tmp_path, "tokenizer.model")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert record(folder, written(folder, "b") + above).read_text() == md5_line("b", "b")


def test_notes_of_the_hub(tmp_path: Path) -> None:
    """Of another form they say nothing."""
    (path,) = written(tmp_path, "a")
    note = tmp_path / ".cache/huggingface/download/a.metadata"
    note.parent.mkdir(parents=True)
    good = f"0123abcd\n {hashlib.sha256(b'a').hexdigest()} \n1.5\n".encode()
    for data, known in (
        (good, True), (good.rstrip(b"\n1.5"), True), (b"one line", False), (b"\xff\n\xff", False),
        (b"\n" + b"0" * 63, False), (b"\n" + b"x" * 64, False),
    ):  # fmt: skip
        note.write_bytes(data)
        assert check_checksums(tmp_path, [path]).verdict == (PASS if known else NOT_APPLICABLE), data
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    path.rename(blobs / hashlib.sha256(b"a").hexdigest())
    path.symlink_to(blobs / hashlib.sha256(b"a").hexdigest())  # the name of the blob comes first
    note.write_bytes(b"\n" + b"0" * 64)
    assert check_checksums(tmp_path, [path]).told == "1 file as the hub (sha256) says"


def test_the_part_that_is_damaged(tmp_path: Path, bars: list[Any]) -> None:
    """Its tensor's name; the part's own where the file's directory does not match it, as of a small one. The bar counts
    the bytes of the parts."""
    path = tmp_path / "a.pth"
    weights = {name: torch.full((300_000,), float(i)) for i, name in enumerate(("first", "second", "last"), 1)}
    torch.save({**weights, "small": torch.arange(9.0)}, path)
    data = path.read_bytes()
    assert check_checksums(tmp_path, [path]).verdict == PASS
    (shown,) = bars
    assert (shown.total, shown.desc.strip(": ")) == (len(data), "Checksums")
    assert 0.9 * len(data) < shown.n <= len(data)
    for name, weight in weights.items():
        at = data.index(weight.numpy().tobytes()) + 5000
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        found = check_checksums(tmp_path, [path])
        assert (found.verdict, found.told) == (FAIL, f"a.pth: {name} does not match the checksum in the file (crc32)")
    at = data.index(torch.arange(9.0).numpy().tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert check_checksums(tmp_path, [path]).told == "a.pth: a/data/3 does not match the checksum in the file (crc32)"
