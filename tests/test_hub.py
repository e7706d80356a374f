"""Names of models on the Hugging Face Hub: the client's own code, against a hub on this machine."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from conftest import ROOT
from forks import Forks
from helpers import command
from hub_server import TOKEN, Hub, Repo
from workers import Pool

from llama import Llama
from llama.commands.convert import convert
from llama.loading import checkpoint_folder
from llama.system.launch import Launch
from llama.weights import hub as names

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, errors, file_download  # noqa: E402

NAME = "some-org/Tiny-1.0"


@pytest.fixture(scope="module")
def files(tiny: Path, tokenizer_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A Hugging Face folder of the tiny model, with what repositories have beside it."""
    folder = tmp_path_factory.mktemp("hub") / "hf"
    convert(tiny, folder, "hf", tokenizer_path=Path(tokenizer_path))
    extra = {"README.md": b"of no use", "pytorch_model.bin": b"the same weights", "original/params.json": b"{}"}
    return {path.name: path.read_bytes() for path in folder.iterdir()} | extra


READ = [
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json",
]  # fmt: skip


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with that model, and an empty cache."""
    with Hub({NAME: Repo({"main": dict(files)})}) as hub:
        changes = {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True,
        }  # fmt: skip
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        waits = SimpleNamespace(**{**vars(file_download.time), "sleep": lambda seconds: None})
        monkeypatch.setattr(file_download, "time", waits)
        yield hub


def test_a_name_is_fetched_once_and_only_what_is_read(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint_folder(NAME)
    assert sorted(path.name for path in folder.iterdir()) == READ
    assert hub.gets() == READ
    hub.asked.clear()
    assert checkpoint_folder(NAME) == folder
    assert Llama.build(NAME, max_seq_len=16, max_batch_size=1, device="cpu", draft=NAME).draft_model is not None
    assert checkpoint_folder(str(folder.parents[1])) == folder  # models--some-org--Tiny-1.0
    command("info", NAME)
    command("tokenize", "a dog", ckpt_dir=NAME)
    assert f"{folder}: Hugging Face format, 1 file of weights" in capsys.readouterr().out
    assert hub.asked == []


def test_a_path_that_exists_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert checkpoint_folder(NAME) == Path(NAME)
    assert hub.asked == []


def test_the_address_of_a_models_page_is_its_name() -> None:
    for text in ("https://huggingface.co/org/name", "https://huggingface.co/org/name/"):
        assert names.parse(text) == names.parse("org/name")


@pytest.mark.parametrize(
    "name",
    [("o/n", None, None), (f"org/{'n' * 92}", None, "Q8_0"), ("org/a-b.c_d", "a--b/c.git", None), ("o/n", "v1", "b-c")],
)
def test_parts_of_a_name(name: tuple[str, Optional[str], Optional[str]]) -> None:
    """Only the first has rules of the hub's own."""
    assert names.parse(str(names.Name(*name))) == name


@pytest.mark.parametrize("text", [
    "https://huggingface.co/org", "https://huggingface.co/org/name/tree/main", "https://example.org/org/name",
    "org", "org/", "/org/name", "~/name", "./org/name", "../name", "org/../name", "org//name", "a/b/c", "org/na me",
    "org/naïve", "org/-name", "org/name-", ".org/name", "org/name.git", "org/na--me", "org/na..me",
    f"org/{'n' * 93}", "org/name@", "org/name@../x", "org/name@-f", "org/name@a b", "org/name\n", "C:\\org/name",
])  # fmt: skip
def test_what_is_no_name_stays_a_path(text: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names.parse(text) is None
    with pytest.raises(ValueError, match="no checkpoint folder at|begins with a home folder"):
        Llama.build(text, device="cpu")
    assert hub.asked == []


def test_revisions(hub: Hub, files: dict[str, bytes]) -> None:
    """A branch, a pull request and a commit; what one has is not loaded for another."""
    read = ["config.json", "model.safetensors", "tokenizer.model"]
    hub.repos[NAME].files["main"] = files = {name: files[name] for name in read}
    older = {**files, "config.json": files["config.json"] + b"\n"}
    hub.repos[NAME].files |= {"v0.1": older, "refs/pr/3": older}
    commit = hub.repos[NAME].commit("v0.1")
    folders = [checkpoint_folder(f"{NAME}@{revision}") for revision in ("v0.1", "refs/pr/3", commit)]
    assert {folder.name for folder in folders} == {commit}
    assert hub.gets() == read
    assert checkpoint_folder(NAME).name == hub.repos[NAME].commit("main")
    assert hub.gets() == sorted([*read, "config.json"])  # the other files are the same
    with pytest.raises(
        ValueError, match=f"{NAME} has no revision v9; leave @v9 out, or take one of http.*/commits/main"
    ):
        checkpoint_folder(f"{NAME}@v9")


INDEX = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
PICKLED = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
METAS = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]


@pytest.mark.parametrize(
    ("there", "read"),
    [
        ([*PARTS, *PICKLED, "config.json", "LICENSE", "consolidated.safetensors", "params.json"],
          [*PARTS, "config.json"]),
        ([*PICKLED, "config.json", "training_args.bin", "tf_model.h5"], [*PICKLED, "config.json"]),
        ([*METAS, "checklist.chk", "USE_POLICY.md"], METAS),
        (["model.safetensors", *PARTS, "model.fp16.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "chat_template.jinja", "onnx/model.onnx", "added_tokens.json"],
         ["pytorch_model.bin", "chat_template.jinja", "added_tokens.json"]),
        (["adapter_config.json", "adapter_model.safetensors", "optimizer.pt"],
         ["adapter_config.json", "adapter_model.safetensors"]),
        (["llama.Q4_0.gguf", "config.json"], ["llama.Q4_0.gguf"]),
        (["llama.Q4_0.gguf", "llama.Q8_0.gguf"], []),
        (["llama.Q4_0.gguf", "model.safetensors", "config.json"], ["model.safetensors", "config.json"]),
    ],
)  # fmt: skip
def test_one_kind_of_weights_is_read(there: list[str], read: list[str]) -> None:
    assert names._chosen(there) == sorted(read)


GGUFS = [
    "llama-2-7b.Q4_K_M.gguf", "llama-2-7b.Q4_K_S.gguf", "big-Q8_0-00001-of-00002.gguf", "big-Q8_0-00002-of-00002.gguf",
    "f16.gguf", "mmproj-model-f16.gguf", "old/llama-2-7b.Q2_K.gguf", "model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "read"),
    [
        ("Q4_K_M", GGUFS[:1]), ("q4_k_s", GGUFS[1:2]), ("Q8_0", GGUFS[2:4]), ("F16", ["f16.gguf"]),
        ("big-Q8_0", GGUFS[2:4]),
        ("llama-2-7b.Q4_K_M.gguf", GGUFS[:1]), ("Q4_K", []), ("K_M", []), ("Q2_K", []), ("safetensors", []),
        ("gguf", []),
    ],
)  # fmt: skip
def test_gguf_files_by_name(wanted: str, read: list[str]) -> None:
    assert names._chosen(GGUFS, wanted) == read


def test_gguf_repositories(
    hub: Hub, tiny: Path, tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """One of several files, as users of llama.cpp name it. Before: no weights that are read here."""
    for name, kind in {"a.Q8_0": "q8_0", "a.F16": None}.items():
        convert(tiny, tmp_path / f"{name}.gguf", "gguf", tokenizer_path=Path(tokenizer_path), quantize=kind)
    ggufs = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    hub.repos |= {
        "org/all": Repo({"main": {**ggufs, "README.md": b""}}),
        "org/one": Repo({"main": {"a.gguf": ggufs["a.F16.gguf"]}}),
    }
    for given in ("org/all", "org/all:Q4_K_M"):
        with pytest.raises(
            ValueError, match=rf"{given} on the hub has 2 GGUF models.*a.F16.gguf, a.Q8_0.gguf.*like org/all:Q8_0"
        ):
            checkpoint_folder(given)
    with pytest.raises(ValueError, match=f"{NAME} on the hub has no GGUF files; leave :Q8_0 out"):
        checkpoint_folder(f"{NAME}:Q8_0")
    command("pull", "org/all:q8_0")
    path = Path(capsys.readouterr().out.strip())
    assert path.read_bytes() == ggufs["a.Q8_0.gguf"]
    assert hub.gets() == ["a.Q8_0.gguf"]
    commit = hub.repos["org/all"].commit("main")
    assert checkpoint_folder("org/all:F16").name == "a.F16.gguf"  # now both lie in one folder
    hub.asked.clear()
    assert checkpoint_folder(f"org/all@{commit}:Q8_0") == checkpoint_folder("org/all:a.Q8_0.gguf") == path
    assert Llama.build("org/all:Q8_0", max_seq_len=16, max_batch_size=1, device="cpu").tokenizer.n_words == 400
    assert hub.asked == []
    assert Llama.build("org/one", max_seq_len=16, max_batch_size=1, device="cpu").tokenizer.n_words == 400
    hub.asked.clear()
    assert checkpoint_folder("org/one").is_dir()
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_folder("org/all:Q8_0") == path


@pytest.mark.parametrize("several", [False, True])
def test_a_broken_connection_is_resumed_and_a_broken_download_goes_on(
    several: bool, hub: Hub, files: dict[str, bytes]
) -> None:
    """The second run fetches what the first one lacks, which the cache's folder alone did not tell for Meta's
    shards."""
    weights = files["model.safetensors"]
    repo = {
        "params.json": b"{}",
        "tokenizer.model": b"t",
        **{f"consolidated.0{i}.pth": weights + bytes([i]) for i in range(3)},
    }
    hub.repos[NAME].files["main"] = repo
    hub.cut["consolidated.01.pth"] = 99 if several else 1
    if several:
        with pytest.raises(ValueError, match=f"cannot be reached for a model of that name.*pull {NAME}"):
            checkpoint_folder(NAME)
        hub.cut.clear()
        hub.asked.clear()
    folder = checkpoint_folder(NAME)
    assert all((folder / name).read_bytes() == data for name, data in repo.items())
    resumed = [f"consolidated.01.pth?from={len(weights) // 2}"] * (not several)
    assert hub.gets() == ["consolidated.01.pth"] if several else sorted([*repo, *resumed])


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.model tokenizer.json"])
@pytest.mark.parametrize("noted", [True, False])
def test_a_part_of_a_model_in_the_cache_is_completed(missing: str, noted: bool, hub: Hub) -> None:
    """As other programs leave it there, which read only the tokenizer or only the weights. noted: whether the client
    wrote down what the hub has, as it does in `snapshot_download` since 2.0."""
    folder = checkpoint_folder(NAME)
    for name in missing.split():
        (folder / name).resolve().unlink()
        (folder / name).unlink()
    if not noted:
        shutil.rmtree(folder.parents[1] / "trees")
        huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    hub.asked.clear()
    assert checkpoint_folder(NAME) == folder
    assert hub.gets() == sorted(missing.split())


def test_an_adapter_needs_no_tokenizer(hub: Hub) -> None:
    """In a cache that other programs filled, nothing notes what the hub has."""
    hub.repos["some-org/lora"] = Repo({"main": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}})
    folder = checkpoint_folder("some-org/lora")
    shutil.rmtree(folder.parents[1] / "trees")
    huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    hub.asked.clear()
    assert checkpoint_folder("some-org/lora") == folder
    assert hub.asked == []


def test_parts_that_an_index_names_are_missed(tmp_path: Path) -> None:
    for name in PARTS[:2]:
        (tmp_path / name).touch()
    (tmp_path / PARTS[2]).write_bytes(INDEX)
    assert not names._lacks_weights(names.Name("org/name"), tmp_path)
    (tmp_path / PARTS[1]).unlink()
    assert names._lacks_weights(names.Name("org/name"), tmp_path)


def test_parts_that_a_gguf_file_names_are_missed(tmp_path: Path) -> None:
    name = names.Name("org/name", gguf="Q8_0")
    assert names._lacks_weights(name, tmp_path)
    for i, lacks in ((1, True), (3, True), (2, False)):
        (tmp_path / f"big-Q8_0-0000{i}-of-00003.gguf").touch()
        assert names._lacks_weights(name, tmp_path) == lacks
    (tmp_path / "big-Q8_0-00001-of-00003.gguf").unlink()
    assert names._lacks_weights(name, tmp_path)


def _refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, str]]:
    """Case -> what makes it, and what is said."""
    setattr_ = monkeypatch.setattr
    return {
        "nobody's": (lambda: hub.repos.clear(), (f"there is no folder {NAME}, and {hub.url} has no model of that name "
                                                f"for you")),
        "private": (lambda: setattr_(hub.repos[NAME], "private", True), ("if the model is private or gated, log in "
                                                                         "with "
                                                                        "`hf")),
        "gated": (lambda: setattr_(hub.repos[NAME], "gated", True), (f"{NAME} is gated: ask for access at "
                                                                    f"{hub.url}/{NAME}")),
        "refused": (lambda: setattr_(hub, "status", 403), "the hub refuses some-org/Tiny-1.0 .status 403: .*log in"),
        "ill": (lambda: setattr_(hub, "status", 503), ("the hub answers status 503 for some-org/Tiny-1.0 .*; try again "
                                                      "later")),
        "offline": (lambda: setattr_(constants, "HF_HUB_OFFLINE", True), (f"{NAME}, the hub's cache .* HF_HUB_OFFLINE "
                                                                         f"forbids")),
        "no network": (
            lambda: setattr_(constants, "ENDPOINT", "http://127.0.0.1:9"),
            f"no folder {NAME}, and http://127.0.0.1:9 cannot be reached .*check the network, HF_ENDPOINT and proxies",
        ),
        "no client": (
            lambda: monkeypatch.setitem(sys.modules, "huggingface_hub.constants", None),
            f"no folder {NAME}, and to look it up .* needs huggingface_hub: pip install huggingface_hub",
        ),
        "little room": (
            lambda: setattr_(names.shutil, "disk_usage", lambda _: SimpleNamespace(free=9)),
            "to fetch, but the disk of .*cache has 0.0 KB free; free some, or set HF_HOME",
        ),
        "full disk": (lambda: setattr_(huggingface_hub, "snapshot_download", _fills_the_disk),
          "is full while .* set HF_HOME"),
        "read-only": (lambda: setattr_(huggingface_hub, "snapshot_download", _may_not_write),
          "cannot be put into .*cache"),
        "no weights": (
            lambda: setattr_(hub.repos[NAME], "files", {"main": {"llama.onnx": b"ONNX"}}),
            "has no weights that are read here .*, but llama.onnx; a single file",
        ),
    }  # fmt: skip


def _cached_or(error: OSError, options: dict[str, Any]) -> Any:
    raise errors.LocalEntryNotFoundError("not there") if options.get("local_files_only") else error


def _fills_the_disk(repo: str, **options: Any) -> Any:
    _cached_or(OSError(28, "No space left on device"), options)


def _may_not_write(repo: str, **options: Any) -> Any:
    _cached_or(PermissionError(13, "Permission denied", "/cache"), options)


CASES = (
    "nobody's,private,gated,refused,ill,offline,no network,no client,little room,full disk,read-only,no weights".split(
        ","
    )
)


@pytest.mark.parametrize("case", CASES)
def test_what_the_hub_refuses_is_one_clear_error(case: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    make, told = _refused(hub, monkeypatch)[case]
    make()
    with pytest.raises(ValueError, match=told) as refused:
        Llama.build(NAME, device="cpu")
    assert "\n" not in str(refused.value)


def test_a_token_opens_what_is_gated_or_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME].gated = hub.repos[NAME].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert sorted(path.name for path in checkpoint_folder(NAME).iterdir()) == READ


def test_wrong_arguments_fetch_nothing(hub: Hub) -> None:
    with pytest.raises(ValueError, match="max_seq_len"):
        Llama.build(NAME, max_seq_len=0, device="cpu")
    assert hub.asked == []


def test_the_cache_serves_when_the_hub_does_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository without a tokenizer is never whole by itself; what is there is used when nobody can be asked."""
    for name in ("tokenizer.model", "tokenizer.json"):
        del hub.repos[NAME].files["main"][name]
    folder = checkpoint_folder(NAME)
    shutil.rmtree(folder.parents[1] / "trees")
    huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_folder(NAME) == folder


def test_the_folder_of_a_cache_names_its_snapshot(hub: Hub, files: dict[str, bytes]) -> None:
    """The main one, or the only one."""
    files = {name: files[name] for name in ("model.safetensors", "config.json", "tokenizer.model")}
    hub.repos[NAME].files["main"] = files
    hub.repos[NAME].files["v2"] = {**files, "config.json": files["config.json"] + b"\n"}
    second = checkpoint_folder(f"{NAME}@v2")
    cache = second.parents[1]
    assert checkpoint_folder(str(cache)) == second
    main = checkpoint_folder(NAME)
    assert checkpoint_folder(str(cache)) == main
    (cache / "refs/main").unlink()
    with pytest.raises(
        ValueError, match=f"2 snapshots .{'.*, '.join(sorted([main.name, second.name]))}.*none is its main one"
    ):
        checkpoint_folder(str(cache))
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    with pytest.raises(ValueError, match="no snapshot; pass the path of one, or org/name@revision"):
        checkpoint_folder(str(cache))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer", ["y\n", "\n", ""])
def test_a_terminal_is_asked_first(answer: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _Terminal()
    monkeypatch.setattr(sys, "stdin", _Terminal(answer))
    monkeypatch.setattr(sys, "stderr", shown)
    if answer == "y\n":
        command("complete", "a dog", ckpt_dir=NAME, max_gen_len=1, max_seq_len=8)
        assert hub.gets() == READ
    else:
        demo, adapter = str(ROOT / "llama/demo"), f"--adapter={NAME}"
        for words in (
            ("score", "a dog", f"--ckpt_dir={NAME}"), ("score", "a dog", f"--draft={NAME}"),
            ("score", "a dog", adapter),
            ("info", NAME), ("info", demo, adapter), ("convert", NAME, "new", "meta"),
            ("convert", demo, "new", "meta", adapter),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"{NAME} was not fetched; pass the path of a folder"):
                command(*words)
        assert hub.gets() == []
    assert f"{NAME}: 0.6 MB of 6 files" in shown.getvalue()
    assert f" to fetch into {constants.HF_HUB_CACHE}, where" in shown.getvalue()
    assert "fetch it? [y/N] " in shown.getvalue()


def test_pull(
    hub: Hub, files: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fetches, and the next time only what changed on the hub."""
    command("pull", NAME)
    shown = capsys.readouterr()
    first = checkpoint_folder(NAME)
    assert shown.out == f"{first}\n"
    assert f"python -m llama chat --ckpt_dir {NAME}" in shown.err
    hub.asked.clear()
    hub.repos[NAME].files["main"] = {**files, "config.json": files["config.json"] + b"\n"}
    assert checkpoint_folder(NAME) == first
    command("pull", NAME)
    assert hub.gets() == ["config.json"]
    assert checkpoint_folder(NAME).name == hub.repos[NAME].commit("main")
    with pytest.raises(ValueError, match="llama-2-7b is no name on the hub; one looks like org/name"):
        command("pull", "llama-2-7b")
    hub.asked.clear()
    capsys.readouterr()
    monkeypatch.setattr(Launch, "read", lambda: Launch(True, 1, 2, 1, 2))  # one process of a node fetches for all
    command("pull", NAME)
    assert (hub.asked, capsys.readouterr().out) == ([], "")


def _found(url: str, cache: str, name: Optional[str]) -> Any:
    """On one process of several: the folder, or what is said."""
    from huggingface_hub import constants

    from llama import loading

    constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = url, cache, False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    loading.PATIENCE = 0.001  # many meetings
    try:
        return loading.checkpoint_folders(name, None)
    except ValueError as error:
        return str(error)


def test_one_process_of_several_fetches(hub: Hub, pool: Pool) -> None:
    cache = constants.HF_HUB_CACHE
    told = pool.run(_found, hub.url, cache, "some-org/Other")
    assert len(set(told)) == 1
    assert told[0].startswith("there is no folder some-org/Other, and http")
    assert told[0].endswith("(on process 0)")
    hub.asked.clear()
    folders = pool.run(_found, hub.url, cache, NAME)
    assert folders == [[checkpoint_folder(NAME), None]] * 4
    assert hub.gets() == READ


SCRIPT = f"""
import sys
from llama.loading import checkpoint_folder
assert "huggingface_hub" not in sys.modules
print(checkpoint_folder("{NAME}"))
"""


def test_its_users_variables_hold(hub: Hub, forks: Forks, tmp_path: Path) -> None:
    """Two processes that know nothing of each other, in an environment of its own."""
    there = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    both = forks.ranks(SCRIPT, env=there)
    assert [process.returncode for process in both] == [0, 0], both
    assert both[0].stdout == both[1].stdout == f"{next((tmp_path / 'home/hub').glob('models--*/snapshots/*'))}\n"
    assert hub.gets() == READ
