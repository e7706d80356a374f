"""The bytes of a folder against the checksums that came with them: checklist.chk, the hub's hashes, those in .pth
files."""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..system.files import SETTINGS_BYTES, check_file, is_there, listed, read_file, replace_file
from ..system.printable import counted, escaped
from ..system.progress import bar
from ..weights.archive import map_tensors, read_directory
from .results import Result, failed, not_applicable, passed

CHECKLIST = "checklist.chk"
TOKENIZERS = "tokenizer_checklist.chk"  # Meta's download puts it beside the tokenizer of all its models
BLOCK = 2**22
# What zipfile raises for damage: a wrong bit may say that a part is encrypted, compressed, or of a later version.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError)
DAMAGED = "The file was damaged in a download, on the disk or in memory. Download it again, and verify once more."


class Expected(NamedTuple):
    """What the digest of a file must be. kind: md5, sha256, or git for git's SHA-1 of a blob. source: who says so."""

    kind: str
    digest: str
    source: str


def check_checksums(folder: Path, files: Iterable[Path]) -> Result:
    """Every file whose checksum is known. files: those that are loaded."""
    name, files = "checksums", list(files)
    try:
        expected = _expected(folder, files)
    except ValueError as error:
        return failed(name, str(error), "The list is damaged, or was made by something else than md5sum.")
    archives = [path for path in files if path not in expected and _is_archive(path)]
    problems = []
    with _bar(sum(path.stat().st_size for path in [*expected, *archives] if path.exists())) as done:
        for path, what in expected.items():
            if not path.exists():
                problems.append(f"{path.name} is missing, which {what.source} lists")
            elif (found := _digest(path, what.kind, done)) != what.digest:
                problems.append(f"{path.name} has {what.kind} {found}, and {what.source} says {what.digest}")
        for path in archives:
            if (damage := _damage(path, done)) is not None:
                problems.append(f"{path.name}: {damage}")
    if problems:
        return failed(name, listed(problems, 4), DAMAGED)
    bare = [path.name for path in files if path not in expected and path not in archives]
    if not expected and not archives:
        told = f"there is none for {listed(bare, 3)}, so a wrong bit that leaves a number plausible stays unseen"
        return not_applicable(name, f"{told}; --record writes {CHECKLIST} now, by which later damage is found")
    alike: dict[str, int] = Counter(f"{what.source} ({what.kind})" for what in expected.values())
    alike |= {"the checksum in it (crc32)": len(archives)} if archives else {}
    told = " and ".join(f"{counted(count, 'file')} as {source} says" for source, count in alike.items())
    return passed(name, told + (f"; there is none for {listed(bare, 3)}" if bare else ""))


def _expected(folder: Path, files: list[Path]) -> dict[Path, Expected]:
    home = folder if folder.is_dir() else folder.parent
    found = {path: what for path in files if (what := _of_hub(path)) is not None}
    places = dict.fromkeys([home, *(path.parent for path in files)])  # Meta's tokenizer lies above its folders
    for place, source in product(places, (TOKENIZERS, CHECKLIST)):
        for digest, name in _lines(place / source) if is_there(place / source) else ():
            # Only a folder's own list is about all that it holds; one beside GGUF files may be about others.
            if (place, source) == (folder, CHECKLIST) or place / name in files:
                found[place / name] = Expected("md5", digest, source)
    return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The digests and names that a list of md5sum has. ValueError for a line of another form."""
    for line in read_file(path, SETTINGS_BYTES, "a checklist has a few lines").decode(errors="replace").splitlines():
        found = re.fullmatch(r"([0-9a-fA-F]{32}) [ *]([^/\\]+)", line.strip())
        if found is None and line.strip():
            raise ValueError(
                f"{path} has the line {escaped(line)!r}, which is no md5 and a name; write it again with md5sum"
            )
        if found is not None:
            yield found[1].lower(), found[2]


def _of_hub(path: Path) -> Optional[Expected]:
    """What the hub says of a file: the blobs of its cache are called by their hash, and `hf download --local-dir` notes
    it."""
    target = path.resolve()
    said = target.name if target.parent.name == "blobs" else ""
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if not said and note.is_file():
        lines = read_file(note, SETTINGS_BYTES, "it has three lines").decode(errors="replace").splitlines()
        said = lines[1].strip() if len(lines) > 1 else ""
    kind = {64: "sha256", 40: "git"}.get(len(said)) if re.fullmatch("[0-9a-f]+", said) else None
    return None if kind is None else Expected(kind, said, "the hub")


def _bar(total: Optional[int] = None) -> Any:
    """A bar of the bytes that were read."""
    return bar(total=total, desc="Checksums", unit="B", unit_scale=True)


def _digest(path: Path, kind: str, done: Any) -> str:
    size = check_file(path).st_size
    digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":
        digest.update(b"blob %d\0" % size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done.update(len(block))
    return digest.hexdigest()


def _is_archive(path: Path) -> bool:
    """Whether this is a file of torch.save as it is written since 2020, which has checksums in it."""
    if path.suffix not in (".pth", ".bin"):
        return False
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _damage(path: Path, done: Any) -> Optional[str]:
    """What is wrong with a file of torch.save, which has a checksum of each part; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                try:
                    with archive.open(record) as part:
                        while block := part.read(BLOCK):
                            done.update(len(block))
                except zipfile.BadZipFile:
                    return f"{_tensor_name(path, record.filename)} does not match the checksum in the file (crc32)"
                except ZIP_ERRORS as error:
                    return f"the directory at its end is damaged, or a header in it: {error}"
    except NotImplementedError as error:
        return f"the directory at its end is damaged: {error}"
    except ZIP_ERRORS:
        return (
            f"it ends after {path.stat().st_size:,} bytes without the directory that such a file ends with: it is "
            f"cut short"
        )
    return None


def _tensor_name(path: Path, part: str) -> str:
    """The name of the tensor whose numbers are this part of the archive; the part's own if it is not known."""
    try:
        parts, tensors = read_directory(path)[0], map_tensors(path)
    except (*ZIP_ERRORS, LookupError):
        # The directory is damaged too. Or a small part is, whose checksum is compared whenever the file is opened.
        return part
    first = min(place.start for name, place in parts.items() if "/data/" in name)
    base = min(tensor.data_ptr() for tensor in tensors.values()) - first
    names = {tensor.data_ptr() - base: name for name, tensor in tensors.items()}
    return names.get(parts[part].start, part)


def new_checklist(folder: Path) -> Path:
    """Where `record` writes. ValueError if something is there."""
    target = (folder if folder.is_dir() else folder.parent) / CHECKLIST
    if is_there(target):
        raise ValueError(f"{target} is there already; remove it first if it is to be written anew")
    return target


def record(folder: Path, files: Iterable[Path]) -> Path:
    """Write checklist.chk for these files, as md5sum would. ValueError if there is one."""
    target = new_checklist(folder)
    with _bar() as done:
        lines = [f"{_digest(path, 'md5', done)}  {path.name}\n" for path in files if path.parent == target.parent]
    replace_file(target, "".join(lines).encode())
    return target
