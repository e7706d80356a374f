"""A model's name on the Hugging Face Hub -> a folder: found in the hub's cache, or fetched into it by huggingface_hub.

The cache is the one that all users of huggingface_hub share, so HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE mean here what they mean there.
"""

from __future__ import annotations

import errno
import glob
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Optional

from ..system.files import contents, is_there, listed, read_json
from ..system.printable import clipped, escaped, gigabytes
from .places import PART

# A name has letters, digits, "_", "-" and ".", the last two not at an end. A revision is a branch, a tag, refs/pr/N or
# a commit. A GGUF file follows a colon, by its name or by the end of its name.
NAME = re.compile(r"(\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?)(?:@(\w(?:[\w./-]*\w)?))?(?::(\w(?:[\w.-]*\w)?))?", re.ASCII)
MOST = 96  # characters of a name
PAGES = "https://huggingface.co/"

# The files of weights that are read, one kind in each line, the preferred one first: the file that tells that a
# repository has the kind, and all of it. Repositories hold the same weights in several kinds, and one is enough.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = (
    ("model.safetensors", ()),
    (INDEXES[0], ("*.safetensors",)),
    ("pytorch_model.bin", ()),
    (INDEXES[1], ("pytorch_model*.bin",)),
    ("consolidated.00.pth", ("consolidated.*.pth", "params.json")),
    ("adapter_model.safetensors", ()),
    ("adapter_model.bin", ()),
)
NOT_OF_AN_INDEX = ("consolidated*", "adapter_model*")
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
BESIDE = (
    "config.json", "generation_config.json", "adapter_config.json", *TOKENIZERS, "tokenizer_config.json",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Unreachable(ValueError):
    """The hub does not answer, or must not be asked."""


class Name(NamedTuple):
    """A model on the hub, the revision that is wanted of it (None: its main branch), and which of its GGUF files."""

    repo: str
    revision: Optional[str] = None
    gguf: Optional[str] = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.gguf}" if self.gguf else "")


class Listing(NamedTuple):
    """What the hub has of a model that is read here. nbytes: of the files that the cache lacks."""

    name: Name
    files: list[str]
    nbytes: int
    cache: Path
    free: int  # bytes on the cache's disk


def parse(text: str) -> Optional[Name]:
    """org/name, org/name@revision, org/name:Q4_K_M, or the address of a model's page; None for a text that cannot be a
    name on the hub."""
    if text.startswith(PAGES):
        text = text.removeprefix(PAGES).rstrip("/")
    found = NAME.fullmatch(text)
    if found is None or len(found[1]) > MOST or "--" in found[1] or ".." in text or found[1].endswith(".git"):
        return None
    return Name(found[1], found[2], found[3])


def locate(given: str, path: Path, fetching: bool = True) -> Path:
    """The folder that a caller named: `path` if it is there, or else the model of that name in the hub's cache; the
    GGUF file if the name tells which.

    What the cache lacks is fetched, or with fetching=False a ValueError. A text that cannot be a name on the hub stays
    a path.
    """
    name = None if is_there(path) else parse(given)
    if name is None:
        return _snapshot(path)
    found = _cached(name)
    if found is not None and not _lacks(name, found):
        return _place(name, found)
    try:
        if not fetching:
            raise Unreachable(
                f"there is no folder {name}, and the hub's cache of this process has no whole model of that name"
            )
        return fetch(look_up(name))
    except Unreachable:
        if found is None or _lacks_weights(name, found):
            raise
        return _place(name, found)  # the hub may have no tokenizer either; whoever misses it says so


def absent(given: str, path: Path) -> Optional[Name]:
    """The name of what `locate` would have to fetch; None if it need not."""
    name = None if is_there(path) else parse(given)
    found = None if name is None else _cached(name)
    return name if name is not None and (found is None or _lacks(name, found)) else None


def look_up(name: Name) -> Listing:
    """Ask the hub for a model's files. ValueError if the hub does not give them, or none of them is read here."""
    hub = _client(name)
    with _explained(name, hub):
        info = hub.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    siblings = {file.rfilename: file for file in info.siblings or []}
    if not (files := _chosen(siblings, name.gguf)):
        raise ValueError(_nothing(name, sorted(siblings)))
    cache = Path(hub.constants.HF_HUB_CACHE)
    blobs, nbytes = _folder(name, hub) / "blobs", 0
    for file in map(siblings.__getitem__, files):
        blob = blobs / str(getattr(file.lfs, "sha256", None) or file.blob_id)
        begun = blob.with_name(f"{blob.name}.incomplete")  # the client goes on with it
        nbytes += 0 if blob.exists() else (file.size or 0) - (begun.stat().st_size if begun.exists() else 0)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    return Listing(name, files, nbytes, cache, shutil.disk_usage(there).free)


def fetch(listing: Listing) -> Path:
    """Fetch what the cache lacks, with the client's progress bars, and return the model's folder there."""
    name, hub = listing.name, _client(listing.name)
    if listing.nbytes > listing.free:
        raise ValueError(
            f"{name} has {gigabytes(listing.nbytes)} to fetch, but the disk of {listing.cache} has "
            f"{gigabytes(listing.free)} "
            "free; free some, or set HF_HOME to a folder on another disk"
        )
    with _explained(name, hub):
        wanted = list(map(glob.escape, listing.files))
        return _place(name, Path(hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=wanted)))


def _place(name: Name, folder: Path) -> Path:
    """What is loaded of a snapshot: the folder, or the first file of the GGUF model that was named."""
    return folder if name.gguf is None else folder / _chosen((path.name for path in folder.iterdir()), name.gguf)[0]


def _nothing(name: Name, files: list[str]) -> str:
    """Why nothing of a repository is read, for a message."""
    if models := _gguf_models(files):
        ending = re.split(r"[.-]", list(models)[-1])[-2]
        which = "" if name.gguf is None else f" that is called {name.gguf}, or ends in it"
        return (
            f"{name} on the hub has {len(models)} GGUF models, and not one{which}: {listed(models, 30)}; name one by "
            f"its file or by the end of it, like {name._replace(gguf=ending)}"
        )
    if name.gguf is not None:
        return f"{name.repo} on the hub has no GGUF files; leave :{name.gguf} out"
    return (
        f"{name} on the hub has no weights that are read here (safetensors, pytorch_model.bin, consolidated.NN.pth or "
        f"GGUF), but {listed(files) or 'nothing'}; a single file of another kind can be fetched with `hf download`"
    )


def _gguf_models(names: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models of a repository, and the files of each."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and "/" not in name and not name.startswith(("mmproj", "imatrix")):
            part = PART.fullmatch(name)
            found.setdefault(f"{part[1]}.gguf" if part else name, []).append(name)
    return found


def _chosen(names: Iterable[str], gguf: Optional[str] = None) -> list[str]:
    """The files of a repository that are read: one kind of weights, and what belongs to it; only the files of a GGUF
    model if one is named, or it is all that there is. None without weights."""
    top = sorted(name for name in names if "/" not in name)
    models = _gguf_models(top)
    if gguf is not None:
        wanted = re.compile(rf"(.*[.-])?{re.escape(gguf)}(\.gguf)?", re.IGNORECASE | re.DOTALL)
        models = {model: files for model, files in models.items() if model == gguf} or {
            model: files for model, files in models.items() if wanted.fullmatch(model)
        }
        return next(iter(models.values())) if len(models) == 1 else []
    for sign, patterns in WEIGHTS:
        if sign in top:
            shards = {name for name in top if any(fnmatchcase(name, pattern) for pattern in patterns)}
            if sign in INDEXES:
                shards -= {name for name in shards if any(fnmatchcase(name, pattern) for pattern in NOT_OF_AN_INDEX)}
            return [name for name in top if name == sign or name in shards or name in BESIDE]
    return next(iter(models.values())) if len(models) == 1 else []


def _client(name: Name) -> ModuleType:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ValueError(
            f"there is no folder {name}, and to look it up on the Hugging Face Hub needs huggingface_hub: "
            "pip install huggingface_hub, or pass the path of a folder"
        ) from error
    return huggingface_hub


def _folder(name: Name, hub: ModuleType) -> Path:
    return Path(hub.constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"


def _cached(name: Name) -> Optional[Path]:
    """The folder of a model in the cache, which may lack files. No request is made."""
    hub = _client(name)
    try:
        # Without patterns some releases of the client want all files of the repository there.
        found = hub.snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[])
    except hub.errors.LocalEntryNotFoundError:
        return None
    return Path(found)


def _lacks(name: Name, folder: Path) -> bool:
    """Whether files of a cached model are missing: those that the client has noted, or else those that a model must
    have."""
    noted = _noted(name, folder)
    if noted is not None:
        files = _chosen(noted, name.gguf)
        return not files or any(not (folder / file).exists() for file in files)
    if _lacks_weights(name, folder):
        return True
    needed = (*TOKENIZERS, "adapter_config.json", "*.gguf")  # one of them: the last two need no tokenizer beside them
    return not any(True for pattern in needed for _ in folder.glob(pattern))


def _noted(name: Name, folder: Path) -> Optional[list[str]]:
    """The names that the hub has for a cached commit, if the client has noted them, as those since 2.0 do."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        return [file.path for file in get_cached_repo_tree(name.repo, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        return None


def _lacks_weights(name: Name, folder: Path) -> bool:
    """Whether a snapshot has no weights of any kind, or not all files that its index, or the first of several GGUF
    files, names."""
    files = _chosen((path.name for path in folder.iterdir() if path.exists()), name.gguf)
    if files and (part := PART.fullmatch(files[0])) and len(files) < int(part[3]):
        return True
    for index in set(INDEXES).intersection(files):
        try:
            parts = read_json(folder / index, "an index has some thousand lines", 2**26).get("weight_map", {}).values()
        except (ValueError, AttributeError):  # whoever opens the folder says what is wrong
            parts = ()
        if any(not (folder / str(part)).exists() for part in parts):
            return True
    return not files


def _snapshot(path: Path) -> Path:
    """The one snapshot in a folder of the hub's cache (models--org--name). Any other path is returned unchanged."""
    snapshots = path / "snapshots"
    if not (path.name.startswith("models--") and snapshots.is_dir()):
        return path
    main = path / "refs" / "main"
    if main.is_file() and (found := snapshots / main.read_text().strip()).is_dir():
        return found
    several = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    if len(several) == 1:
        return several[0]
    what = f"{len(several)} snapshots ({contents(snapshots)}), and none is its main one" if several else "no snapshot"
    raise ValueError(f"{path} is a folder of the hub's cache with {what}; pass the path of one, or org/name@revision")


@contextmanager
def _explained(name: Name, hub: ModuleType) -> Iterator[None]:
    """A block of the client's own work: whatever it raises becomes one ValueError that says what to do."""
    try:
        yield
    except Exception as error:
        raise _explain(error, name, hub) from error


def _explain(error: BaseException, name: Name, hub: ModuleType) -> ValueError:
    errors, cache, page = hub.errors, hub.constants.HF_HUB_CACHE, f"{hub.constants.ENDPOINT}/{name.repo}"
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)

    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(e, kind) for e in chain)

    elsewhere = (
        f"or fetch it with `python -m llama pull {name}` where there is one, into a cache that this machine shares"
    )
    said = clipped(
        escaped(next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)), 300
    )
    responses = [response for e in chain if (response := getattr(e, "response", None)) is not None]
    status = responses[0].status_code if responses else None
    if has(errors.OfflineModeIsEnabled):
        return Unreachable(
            f"there is no folder {name}, the hub's cache ({cache}) does not have the whole model of that name, and "
            f"HF_HUB_OFFLINE forbids to ask the hub; unset that where there is a network, {elsewhere}"
        )
    if has(errors.GatedRepoError):
        return ValueError(f"{name} is gated: ask for access at {page}, and {LOG_IN}")
    if has(errors.RevisionNotFoundError):
        return ValueError(
            f"{name.repo} has no revision {name.revision}; leave @{name.revision} out, or take one of "
            f"{page}/commits/main"
        )
    if has(errors.RepositoryNotFoundError):
        return ValueError(
            f"there is no folder {name}, and {hub.constants.ENDPOINT} has no model of that name for you; check the "
            f"name, and if the model is private or gated, {LOG_IN}"
        )
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        return ValueError(
            f"the disk of {cache} is full while {name} is fetched; free some, or set HF_HOME to a folder on another "
            f"disk"
        )
    if status in (401, 403):
        return ValueError(f"the hub refuses {name} (status {status}: {said}); {LOG_IN}, with a token that may read it")
    if isinstance(error, errors.HfHubHTTPError) or status is not None:
        return Unreachable(f"the hub answers status {status} for {name} ({said}); try again later")
    if isinstance(error, OSError) and error.errno is not None:
        return ValueError(f"{name} cannot be put into {cache}: {said}")
    return Unreachable(
        f"there is no folder {name}, and {hub.constants.ENDPOINT} cannot be reached for a model of that name "
        f"({type(chain[-1]).__name__}: {said}); check the network, HF_ENDPOINT and proxies, {elsewhere}"
    )
