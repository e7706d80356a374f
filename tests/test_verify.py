"""`llama verify`: a good folder passes, and each fault is found and named. The faults are made in copies of
stories260K."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_weights, shared, write_checkpoint
from helpers import command

from llama import Llama, ModelArgs, Transformer
from llama.commands import cli
from llama.loading import DEMO
from llama.system.launch import Launch
from llama.tokenizer import Tokenizer
from llama.verification import child, faults, itself, repairs, spread
from llama.verification.checksums import check_checksums, record
from llama.verification.checkup import Asked, files_of, verify
from llama.verification.known import check_perplexities, check_published, recognise
from llama.verification.results import FAIL, NOT_APPLICABLE, PASS, Result
from llama.verification.texts import STORIES
from llama.weights.checkpoint import open_checkpoint
from llama.weights.huggingface import to_hf_rows

Weights = dict[str, torch.Tensor]
EVERY_REPAIR = repairs.repairs


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, one fault, and only the repairs that change all layers, or exchange two."""
    monkeypatch.setattr(faults, "LENGTH", 128)
    monkeypatch.setattr(faults, "ROUNDS", 1)
    monkeypatch.setattr(
        repairs, "repairs", lambda model: [r for r in EVERY_REPAIR(model) if " in layer " not in r.fault]
    )


@pytest.fixture(scope="module")
def stories() -> Llama:
    return Llama.build(str(shared("models/stories260K")), max_seq_len=128, device="cpu")


def copied(
    folder: Path, change: Callable[[Weights], None] = lambda _: None, source: Path = DEMO, **params: Any
) -> Path:
    """A copy of a folder in Meta's format, with other weights or other params."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.md", "__pycache__"))
    for path in folder.iterdir():
        path.chmod(0o644)
    weights = {name: weight.clone() for name, weight in torch.load(folder / "consolidated.00.pth").items()}
    change(weights)
    torch.save(weights, folder / "consolidated.00.pth")
    settings = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**settings, **params}))
    return folder


def as_hf(folder: Path, change: Callable[[Weights], None] = lambda _: None, source: Path = DEMO) -> Path:
    """The same in Hugging Face's format, which has no checksums."""
    made = copied(folder.with_name(f"{folder.name}-meta"), change, source)
    command("convert", str(made), str(folder), to="hf")
    return folder


def flip(path: Path, at: int) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def exchanged(i: int, j: int) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith(f"layers.{i}.")]:
            other = name.replace(f"layers.{i}.", f"layers.{j}.")
            weights[name], weights[other] = weights[other], weights[name]

    return change


def as_converters_leave_it(weights: Weights) -> None:
    """q and k in Hugging Face's order of rows."""
    for name in weights:
        if name.split(".")[-2] in ("wq", "wk"):
            weights[name] = to_hf_rows(weights[name], 8)


def with_number(name: str, number: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].view(-1)[70] = number

    return change


def until_failure(folder: Path, check: str, **asked: Any) -> str:
    """What the failure of this check says."""
    results: list[Result] = []
    for result in verify(Asked(folder, processes=1, texts=STORIES[:1], device="cpu", **asked)):
        results.append(result)
        if result.verdict == FAIL and result.name == check:
            assert result.means.endswith(".")
            return result.told
    raise AssertionError("\n".join(map(str, results)))


def with_checklist(folder: Path) -> Path:
    record(folder, sorted(folder.iterdir()))
    return folder


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "layers": (
        {"change": exchanged(1, 2)},
        "order of layers",
        "layer 1 is the model's layer 2, .*; layers 1 and 2 are exchanged: mended, a token is .* nats likelier",
    ),
    "q and k": (
        {"change": as_converters_leave_it},
        "order of q and k",
        "^q and k are in Hugging Face's order of rows .* in all layers: mended, a token is .* nats likelier",
    ),
    "rope_theta": (
        {"rope_theta": 1e6},
        "rope_theta",
        r"that of stories260K is 10000; rope_theta is 1e\+06, and the model's is 10000: mended, a token is .* likelier",
    ),
    "norm_eps": ({"norm_eps": 1e-6}, "norm_eps", "norm_eps is 1e-06, and that of stories260K is 1e-05"),
    "NaN": (
        {"change": with_number("layers.1.feed_forward.w2.weight", float("nan"))},
        "finite",
        "^layers.1.feed_forward.w2.weight has NaN in row 0$",
    ),
    "an exponent": (
        {"change": with_number("layers.2.attention.wo.weight", 3e37)},
        "spread",
        r"^layers.2.attention.wo.weight has 3e\+37 in row 1, and no other row goes beyond .*: one bit of an exponent",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_are_found_and_named(fault: str, tmp_path: Path) -> None:
    made, check, told = BAD[fault]
    folder = copied(tmp_path / "bad", source=shared("models/stories260K"), **made)
    assert re.search(told, found := until_failure(folder, check, quick=fault == "norm_eps")), found


@pytest.mark.parametrize(
    ("mender", "fault"),
    [
        (
            "q and k are in Hugging Face's order of rows (a converter left them so), in all layers",
            "q and k were put in Meta's",
        ),
        ("k was put in Meta's order of rows twice, in all layers", "k is in Hugging Face's order of rows"),
        ("w1 and w3 are exchanged in all layers", "w1 and w3 are exchanged in all layers"),
        ("n_heads is 8, and the model's is 4", None),
    ],
)
def test_faults_of_all_layers(mender: str, fault: str | None, stories: Llama) -> None:
    """What would mend one fault makes the opposite one of a good model. (Other heads would need another start.)"""
    candidates = {repair.fault: repair for repair in repairs.repairs(stories.model)}
    with ExitStack() as stack:
        candidates[mender].change(stories.model, stack)
        _, readings = faults.read_likeliest(stories, STORIES[:1])
        same = [repair for repair in candidates.values() if repair.check == candidates[mender].check]
        found = faults.search(readings, same, 60.0).found
    assert [repair.fault[: len(fault or "")] for repair, _ in found] == ([] if fault is None else [fault])


def test_two_faults_and_one_of_a_layer(stories: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model keeps no repair: it is as it was built, and computes what it did."""
    llama = stories
    ids = llama.tokenizer.encode(STORIES[0], bos=True, eos=False)[:64]
    before = itself.one_pass(llama, ids)
    monkeypatch.setattr(faults, "ROUNDS", 3)
    candidates = {r.fault: r for r in EVERY_REPAIR(llama.model)}
    broken = [
        candidates["w1 and w3 are exchanged in layer 0"],
        candidates["layers 0 and 1 are exchanged"],
    ]
    others = [r for fault, r in candidates.items() if "exchanged in layer" in fault or fault.endswith("are exchanged")]
    with ExitStack() as stack:
        for fault in broken:
            fault.change(llama.model, stack)
        _, readings = faults.read_likeliest(llama, STORIES[:1])
        found = faults.search(readings, others, 60.0).found
    assert {repair.fault for repair, _ in found} == {repair.fault for repair in broken}
    assert faults.search(readings, others, 0.0).untried == len(others)
    assert llama.model.as_built
    assert torch.equal(itself.one_pass(llama, ids), before)


def test_every_repair_is_undone() -> None:
    llama = Llama.build(max_seq_len=64, device="cpu")
    ids = llama.tokenizer.encode(STORIES[0], bos=True, eos=False)[:32]
    before = itself.one_pass(llama, ids)
    tried = list(EVERY_REPAIR(llama.model))
    some: list[Any] = list(tried)
    one_of_each = {(repair.check, repair.change.func, repair.first > 0): repair for repair in some}
    for repair in one_of_each.values():
        with ExitStack() as stack:
            repair.change(llama.model, stack)
            assert not torch.equal(itself.one_pass(llama, ids), before) or repair.check == repairs.EPS
        assert torch.equal(itself.one_pass(llama, ids), before), repair.fault
    assert len({repair.fault for repair in tried}) == len(tried)


def test_many_layers() -> None:
    """Neighbours, what the norms suggest, and an order by names as texts. Layers 2 and 9 of these 12 were exchanged."""
    params = {"dim": 8, "n_layers": 12, "n_heads": 2, "multiple_of": 4}
    model = Transformer(ModelArgs(**params, vocab_size=8, max_batch_size=1, max_seq_len=1))
    for i, layer in enumerate(model.layers):
        layer.attention_norm.weight.data.fill_({2: 9, 9: 2}.get(i, i) + 1.0)
    found = {repair.fault for repair in EVERY_REPAIR(model) if repair.check == repairs.LAYERS}
    assert "layers 2 and 9 are exchanged" in found
    assert {f"layers {i} and {i + 1} are exchanged" for i in range(11)} <= found
    assert len(found) < 4 + 12 * 11 / 2  # not all pairs
    assert "the layers are sorted as texts are (0, 1, 10, 11, …, 2, 20, …)" in found


def outcome(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The status and the output of a command line."""
    try:
        cli.run(["verify", *words])
        status = 0
    except SystemExit as end:
        status = int(str(end.code))
    return status, capsys.readouterr().out


def test_a_good_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Everything, as a user asks for it; in one process. --record then makes a later change visible."""
    folder = as_hf(tmp_path / "good", source=shared("models/stories260K"))
    capsys.readouterr()
    status, out = outcome(capsys, str(folder), "--processes", "1", "--device", "cpu", "--record", "--json")
    told = json.loads(out)
    assert (status, told["verdict"]) == (0, "pass")
    verdicts = {check["name"]: check["verdict"] for check in told["checks"]}
    absent = {"checksums", "compiled step", "several processes"}
    assert {name for name, verdict in verdicts.items() if verdict == NOT_APPLICABLE} == absent
    assert set(verdicts.values()) == {PASS, NOT_APPLICABLE}
    assert {"published text 1", "int8", "int4", "step by step", "order of layers", "known model"} <= set(verdicts)
    flip(folder / "model.safetensors", 1_000_000)
    status, out = outcome(capsys, str(folder), "--quick")
    assert status == 1
    first, *others = out.splitlines()
    assert first == str(folder)
    assert first not in others
    assert re.search(r"checksums +FAIL +model.safetensors has md5 .*, and checklist.chk", out)
    assert "1 failed" in out
    assert "checksums: The file was damaged in a download, on the disk or in memory." in out
    with pytest.raises(ValueError, match="checklist.chk is there already"):
        cli.run(["verify", str(folder), "--record"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("seconds", "None", "seconds=None must be a number of 0 or more"),
        ("seconds", "-1", "seconds=-1 must be"),
        ("text", "{empty}", "empty is empty"),
        ("quick --text", "{empty}", "--quick runs no model, and --text would do nothing; leave out one or the other"),
        ("wikitext", "{empty}", "empty is empty"),
    ],
)
def test_what_is_refused(option: str, value: str, message: str, tmp_path: Path) -> None:
    """Before anything is checked."""
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ValueError, match=message):
        cli.run(["verify", str(DEMO), *f"--{option}={value.format(empty=tmp_path / 'empty')}".split()])


def test_a_text_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row shows what that text becomes, and not another."""
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decode(self, ids).replace("Tim", "Tom"))
    told = until_failure(DEMO, "tokenizer", quick=True)
    assert told.startswith("'One day, a boy named Tim")
    assert "becomes 'One day, a boy named Tom" in told


def test_the_bound_of_a_divergence_is_within_it() -> None:
    p, q = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    bound = itself.divergence(p, q)
    assert itself.compare("step by step", "told", p, q, bound).verdict == PASS
    assert itself.compare("step by step", "told", p, q, math.nextafter(bound, 0)).verdict == FAIL


def test_the_demo_model_is_known() -> None:
    """If this fails for a new demo model, `published.json` needs its digests and texts."""
    llama = Llama.build(max_seq_len=128, device="cpu")
    known = recognise(open_checkpoint(DEMO), llama.model.params)
    assert known.names == "the demo model"
    assert {result.verdict for result in check_published(llama, known)} == {PASS}


def test_a_model_that_overflows_ends_in_a_row(tmp_path: Path) -> None:
    """Generation would raise ValueError, and no table would be written. Another number makes all tokens equally
    likely."""
    source = shared("models/stories260K")
    within = copied(tmp_path / "within", with_number("layers.2.attention.wo.weight", 3e37), source)
    assert until_failure(within, "published text 1").startswith("no token is likelier than chance has it")
    folder = copied(tmp_path / "bad", with_number("output.weight", 3.4e38), source)
    assert until_failure(folder, "running the model") == "its numbers are NaN or infinite after a text"


def test_untrained_weights_are_no_failure(tmp_path: Path) -> None:
    """No text is likely under them, so nothing of meaning can be told; all else passes. In two shards."""
    folder = write_checkpoint(tmp_path / "random", random_weights(vocab_size=2048), shards=2)
    shutil.copy(DEMO / "tokenizer.model", folder)
    results = {result.name: result for result in verify(Asked(folder, processes=1, texts=STORIES[:1], device="cpu"))}
    assert not [result for result in results.values() if result.verdict == FAIL]
    told = "the weights are untrained, or trained on something else"
    assert told in results["likely text"].told
    for name in ("likely text", *faults.CHECKS):
        assert results[name].verdict == NOT_APPLICABLE


def test_files_and_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bit of the weights, a file that was cut, one that is missing, other settings: with a list of checksums, and by
    what a .pth file has of its own."""
    good = copied(tmp_path / "good")
    listed = with_checklist(copied(tmp_path / "listed"))
    assert check_checksums(listed, []).verdict == PASS
    (listed / "params.json").write_text((listed / "params.json").read_text().replace("1e-05", "1e-06"))
    assert until_failure(listed, "checksums").startswith("params.json has md5 ")
    (listed / "params.json").unlink()
    assert until_failure(listed, "checksums").startswith("params.json is missing, which checklist.chk lists")
    (listed / "checklist.chk").write_text("nonsense\n")
    assert "has the line 'nonsense', which is no md5 and a name" in until_failure(listed, "checksums")
    weights = good / "consolidated.00.pth"
    data = weights.read_bytes()
    flip(weights, 500_000)
    assert "tok_embeddings.weight does not match the checksum in the file (crc32)" in until_failure(good, "checksums")
    for field, value, told in (
        (6, 0x40, "zip file version 6.4"),
        (8, 1, "is encrypted"),
        (10, 8, "decompressing data"),
    ):
        record_at = data.rindex(b"PK\x01\x02")
        weights.write_bytes(data[: record_at + field] + bytes([value]) + data[record_at + field + 1 :])
        found = check_checksums(good, [weights]).told  # zipfile has an error of its own for each
        assert "the directory at its end is damaged" in found
        assert told in found
    weights.write_bytes(data[:-5000])
    assert "is cut short" in until_failure(good, "files")
    assert "without the directory that such a file ends with: it is cut short" in until_failure(good, "checksums")
    with pytest.raises(ValueError, match="there is no folder and no file"):
        cli.run(["verify", str(tmp_path / "none")])
    assert capsys.readouterr().out == ""


def test_the_bar_counts_bytes(tmp_path: Path, bars: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What takes less than a second shows none."""
    folder = with_checklist(copied(tmp_path / "a"))
    files = [path for path in folder.iterdir() if path.name != "checklist.chk"]
    assert check_checksums(folder, files).verdict == PASS
    assert [each.n for each in bars] == [sum(path.stat().st_size for path in files)] * 2
    assert re.match(r"Checksums: 100%.*\b[\d.]+M/[\d.]+M .*B/s\]", str(bars[1]))
    assert capsys.readouterr().err == ""


def test_the_tokenizer_above(tmp_path: Path) -> None:
    """Meta's download puts the tokenizer of all models, and its checksum, above their folders. The rest of such a list,
    and other lists there, are about other files."""
    folder = copied(tmp_path / "model")
    tokenizer = (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    record(tmp_path, [tokenizer]).rename(tmp_path / "tokenizer_checklist.chk")
    (tmp_path / "checklist.chk").write_text(f"{'0' * 32}  other.pth\n")
    assert "1 file as tokenizer_checklist.chk (md5) says" in check_checksums(folder, files_of(folder, None)).told
    flip(tokenizer, 5000)
    assert until_failure(folder, "checksums").startswith("tokenizer.model has md5 ")


def test_a_file_without_checksums_in_it_is_not_counted(tmp_path: Path) -> None:
    """torch.save wrote such files until 2020, and can still."""
    folder = copied(tmp_path / "model")
    weights = folder / "consolidated.00.pth"
    torch.save(torch.load(weights), weights, _use_new_zipfile_serialization=False)
    found = check_checksums(folder, [weights])
    assert found.verdict == NOT_APPLICABLE
    assert found.told.startswith("there is none for consolidated.00.pth")


def test_the_hubs_hashes(tmp_path: Path) -> None:
    """Large files are called by their SHA-256 in the hub's cache, small ones by git's SHA-1 of a blob."""
    model = as_hf(tmp_path / "hf")
    cache = tmp_path / "models--org--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots/0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        data = path.read_bytes()
        small = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = blobs / (hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else small)
        blob.write_bytes(data)
        (snapshot / path.name).symlink_to(blob)
    files = sorted(snapshot.iterdir())
    assert re.fullmatch(r"1 file as the hub \(sha256\) says and \d files as the hub \(git\) says|"
                        r"\d files as the hub \(git\) says and 1 file as the hub \(sha256\) says",
                        check_checksums(snapshot, files).told)  # fmt: skip
    for name, kind in (("model.safetensors", "sha256"), ("config.json", "git")):
        flip((snapshot / name).resolve(), 3)
        assert f"{name} has {kind} " in check_checksums(snapshot, files).told
    notes = model / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(
        f"0123abcd\n{'0' * 40}\n1.5\n"
    )  # as `hf download --local-dir` leaves it
    assert "config.json has git " in check_checksums(model, [model / "config.json"]).told


def spread_of(folder: Path, n_layers: int, name: str, change: Callable[[torch.Tensor], object]) -> Result:
    """What is said of random weights, of which one is changed."""
    params = {"dim": 64, "n_layers": n_layers, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32, "norm_eps": 1e-5}
    weights = random_weights(params)
    change(weights[name])
    checkpoint = open_checkpoint(write_checkpoint(folder, weights, shards=2, params=params))
    with torch.device("meta"):
        model = Transformer(ModelArgs(**params, vocab_size=400, max_batch_size=1, max_seq_len=1))
    return spread.check_weights(checkpoint, model)[-1]


def test_the_spreads_of_two_layers_are_not_compared(tmp_path: Path) -> None:
    """Nothing tells which of them is unusual."""
    for layers, verdict in ((2, PASS), (3, FAIL)):
        result = spread_of(tmp_path / f"{layers}", layers, "layers.0.feed_forward.w2.weight", lambda w: w.mul_(40))
        assert result.verdict == verdict


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("layers.1.attention.wq.weight", lambda w: w[3].fill_(0.0), "1 of 64 rows of layers.1.attention.wq.weight are"),
        ("tok_embeddings.weight", lambda w: w[201:].fill_(0.0), None),
        ("output.weight", lambda w: w[:201].fill_(0.0), "201 of 400 rows of output.weight are the same number"),
        ("norm.weight", lambda w: w.neg_(), "the mean of norm.weight is -1"),
        ("norm.weight", lambda w: w[5].fill_(100.0), "norm.weight has 100 in entry 5, and no other entry goes beyond"),
        ("layers.0.feed_forward.w2.weight", lambda w: w.mul_(100), "goes to .*, and those of other layers to"),
        ("layers.0.feed_forward.w2.weight", lambda w: w.mul_(20), ("deviation of 1.44, and those of other layers "
                                                                  "0.0725")),
        ("layers.0.feed_forward.w2.weight", lambda w: w[9, 7].fill_(-float("inf")), "w2.weight has infinity in row 9$"),
    ],
)  # fmt: skip
def test_spread(name: str, change: Callable[[torch.Tensor], object], told: str | None, tmp_path: Path) -> None:
    result = spread_of(tmp_path / "made", 3, name, change)
    if told is None:
        assert result.verdict == PASS
        assert "199 rows of unused ids" in result.told
    else:
        assert result.verdict == FAIL
        assert re.search(told, result.told), result.told


def test_published_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-2-7B's numbers, in a model that is made to be it: its logits, and the perplexity of a text."""
    llama = Llama.build(max_seq_len=64, device="cpu", dtype="float32")
    ids = [1, 5, 9]
    logits = llama.model(torch.tensor([ids]), 0)[0]
    entry = {
        "name": "Llama-X", "names": ["llama-x"], "rope_theta": 1e4, "norm_eps": 1e-5,
        "shape": {"dim": 192, "n_layers": 4, "n_heads": 8, "kv_heads": 4, "ffn_width": 512, "vocab_size": 2048},
        "logits": {"ids": ids, "means": logits.mean(-1).tolist(), "means_within": 0.01, "first": logits[0, :5].tolist(),
                   "first_within": 0.05, "source": "here"},
        "perplexity": [{"method": method, "value": 100.0, "source": "there"} for method in ("joined-64", "lm-eval")],
    }  # fmt: skip
    monkeypatch.setattr("llama.verification.known.published", lambda: [entry])
    named, unnamed = (
        recognise(open_checkpoint(copied(tmp_path / name)), llama.model.params) for name in ("Llama-X-hf", "other")
    )
    assert (named.how, unnamed.how, unnamed.names) == ("its shape and its folder's name", "", "Llama-X")
    assert [result.verdict for known in (named, unnamed) for result in check_published(llama, known)] == [PASS, PASS]
    text = "\n".join(STORIES)
    wrong = list(check_perplexities(llama, named, text))
    assert [(result.name, result.verdict) for result in wrong] == [
        ("wikitext joined-64", FAIL),
        ("wikitext lm-eval", FAIL),
    ]
    assert [result.told.split(", in")[0].split()[-1] for result in wrong] == ["token", "word"]
    for number, result in zip(entry["perplexity"], wrong):
        number["value"] = float(result.told.split()[1])  # type: ignore[index]
    assert [result.verdict for result in check_perplexities(llama, named, text)] == [PASS, PASS]
    llama.model.output.weight.data = llama.model.output.weight + 0.01
    assert [next(check_published(llama, known)).verdict for known in (named, unnamed)] == [FAIL, NOT_APPLICABLE]


def test_several_processes_are_started_by_verify_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "read", lambda: Launch(True, 0, 2, 0, 2))
    with pytest.raises(ValueError, match="start verify as one process, without torchrun: it starts others itself"):
        command("verify", str(DEMO))


def test_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each process does, done here; and processes that end with an error."""
    llama = Llama.build(max_seq_len=64, device="cpu")
    ids = itself.sample(llama)
    reference = itself.one_pass(llama, ids)
    assert itself.startable(llama, 3) == [2]

    def run_here(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert words[-4:-1] == ["--nproc_per_node=2", "-m", "llama.verification.child"]
        monkeypatch.setattr("sys.argv", words[-2:])
        child.main()
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run_here)
    given = {"max_seq_len": 64, "device": "cpu"}
    assert itself.check_processes(2, given, reference, ids).verdict == PASS
    assert itself.check_processes(2, given, reference.roll(1, -1), ids).verdict == FAIL
    ended = subprocess.CompletedProcess([], 1, "", "[rank0]: ValueError: no room\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    found = itself.check_processes(2, given, reference, ids)
    assert (found.verdict, found.told) == (FAIL, "they ended with 1: [rank0]: ValueError: no room")
    ended.stderr = "[rank0]: ValueError: not enough memory: 2 processes need …\n"  # no fault of the folder
    assert itself.check_processes(2, given, reference, ids).verdict == NOT_APPLICABLE
