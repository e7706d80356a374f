"""Odd files in the place of good ones, files that change, numbers that are none: one ValueError that says which, at
once."""

from __future__ import annotations

import copy
import ctypes
import io
import math
import mmap
import os
import shutil
import signal
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, random_weights, write_checkpoint
from sentencepiece import SentencePieceTrainer

from llama import Llama, model, rotary
from llama.commands import jobs
from llama.commands.console import given_text
from llama.commands.convert import convert
from llama.system.files import (
    MappedFiles,
    Number,
    contents,
    is_there,
    listed,
    parse_json,
    read_file,
    read_json,
    replace_file,
    user_path,
)
from llama.weights import gguf, huggingface, meta, peft, rope

NAN, INF = float("nan"), float("inf")
WQ, WK = "layers.0.attention.wq.weight", "layers.0.attention.wk.weight"


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """What waits for a pipe's writer, or is busy with a pickle, fails in place of hanging."""

    def ring(*_: Any) -> None:
        raise TimeoutError("this took too long")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def build(folder: Path, tokenizer_path: str, **options: Any) -> Llama:
    return Llama.build(str(folder), tokenizer_path, 48, 2, device="cpu", **options)


# What a name may stand for


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's name has 108 bytes at most
        s.bind(path.name)
        os.chdir(before)


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "is a pipe, and not a file"),
    "folder": (Path.mkdir, "is a folder, and not a file"),
    "socket": (make_socket, "is a socket, and not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, and not a file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which is not there"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> dict[str, Path]:
    """One in Meta's format, and two in Hugging Face's: of one file, and of parts (one of which is called so)."""
    root = tmp_path_factory.mktemp("folders")
    meta = write_checkpoint(root / "meta", random_weights())
    convert(meta, root / "hf", "hf", tokenizer_path=Path(tokenizer_path))
    shutil.copyfile(tokenizer_path, meta / "tokenizer.model")
    parts = shutil.copytree(root / "hf", root / "parts")
    (parts / "model.safetensors").rename(parts / "part.safetensors")
    (parts / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    return {"meta": meta, "hf": root / "hf", "parts": parts}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("meta", "params.json"), ("meta", "consolidated.00.pth"), ("meta", "tokenizer.model"), ("hf", "config.json"),
     ("hf", "model.safetensors"), ("parts", "model.safetensors.index.json"), ("parts", "part.safetensors")],
)  # fmt: skip
def test_other_things_than_files(kind: str, name: str, odd: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """A pipe called consolidated.00.pth was waited for, for ever; others were called missing, or another file was
    taken."""
    folder = shutil.copytree(folders[kind], tmp_path / "folder")
    make, message = ODD[odd]
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        Llama.build(str(folder), max_seq_len=8, device="cpu")


@pytest.mark.parametrize("odd", ODD)
def test_other_things_than_texts(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    make, message = ODD[odd]
    make(path)
    for read in (
        lambda: jobs.read_jobs(path, {}, 1),
        lambda: jobs.finished(path, []),
        lambda: given_text(None, str(path), "text"),
    ):
        with pytest.raises(ValueError, match=f"text {message}"):
            read()


def test_contents(tmp_path: Path) -> None:
    """What a message says of a folder: the names, sorted and escaped; that there are none; or why they are not
    known."""
    assert contents(tmp_path) == "nothing"
    for name in ["b\n", *(f"c{i:02d}" for i in range(12)), "a"]:
        (tmp_path / name).touch()
    assert contents(tmp_path) == "a, b\\n, " + ", ".join(f"c{i:02d}" for i in range(10)) + " and 2 more"
    assert contents(tmp_path / "none") == "what cannot be listed (No such file or directory)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be read: embedded null"),
        ("none", "none is missing"),
    ],
)
def test_names_that_no_file_has(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / name)
    with pytest.raises(ValueError, match="no checkpoint folder at"):
        Llama.build(str(tmp_path / name), device="cpu")


def test_a_file_that_may_not_be_read(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tests may be run by root, whom nothing is forbidden, the system's answer is put in."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"params.json cannot be read: Permission denied"):
        build(tiny, tokenizer_path)
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(ValueError, match=r"tokenizer.model cannot be read: Permission denied"):
        read_file(Path(tokenizer_path))


def test_sizes_at_their_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"{}" + b" " * (2**20 - 2))
    assert read_file(path, 2**20) == path.read_bytes()
    assert read_json(path, "a few") == {}
    path.write_bytes(b"{}" + b" " * (2**20 - 1))
    with pytest.raises(ValueError, match="a.json has 1048577 bytes; a few"):
        read_json(path, "a few")
    with pytest.raises(ValueError, match="a.json has 1048577 bytes; some"):
        read_file(path, 2**20, "some")
    assert (listed("abc", 3), listed("abc", 2)) == ("a, b, c", "a, b and 1 more")
    assert (listed("x" * 12), listed("x" * 13)) == (", ".join("x" * 12), ", ".join("x" * 12) + " and 1 more")


# least, most, and whether it must be there
BOUNDS = {
    "dim": (1, 2**20, True), "n_layers": (1, 1000, True), "n_heads": (1, 2**16, True), "n_kv_heads": (1, 2**16, False),
    "vocab_size": (-1, 2**24, False), "multiple_of": (1, 2**20, False), "ffn_dim_multiplier": (1e-3, 1e3, False),
    "norm_eps": (1e-12, 1.0, False), "rope_theta": (1.0, 1e12, False), "head_dim": (2, 2**16, False),
}  # fmt: skip
OTHER_BOUNDS = {**BOUNDS, "vocab_size": (1, 2**24, True), "ffn_dim": (1, 2**24, True)}
GGUF_BOUNDS = {**OTHER_BOUNDS, "vocab_size": (1, 2**24, False), "norm_eps": (1e-12, 1.0, True)}
ROTARY_BOUNDS = {
    "factor": (1.0, 1e4, True), "original_max_position_embeddings": (1, 2**31 - 1, True),
    "positions": (1, 2**31 - 1, False), "attention_factor": (1e-3, 1e3, False), "beta_fast": (1e-3, 1e6, True),
    "beta_slow": (1e-3, 1e6, True), "mscale": (0.0, 1e3, False), "mscale_all_dim": (0.0, 1e3, False),
    "low_freq_factor": (1e-3, 1e6, False), "high_freq_factor": (1e-3, 1e6, False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "number", "bounds"),
    [*[(field, number, BOUNDS[field]) for field, number in meta.PARAMS.items()],
     *[(field, number, OTHER_BOUNDS[field]) for _, field, number in huggingface._CONFIG],
     *[(field, number, GGUF_BOUNDS[field]) for _, field, number in gguf._METADATA],
     *[(field, number, ROTARY_BOUNDS[field]) for field, number in rotary.NUMBERS.items()],
     ("max_position_embeddings", rope.POSITIONS, (1, 2**31 - 1, True)),
     ("r", peft.RANK, (1, 2**20, True)), ("lora_alpha", peft.ALPHA, (-1e9, 1e9, True))],
)  # fmt: skip
def test_numbers_of_a_model_at_their_bounds(field: str, number: Number, bounds: tuple[float, float, bool]) -> None:
    """Each bound is a good value, and the next one beyond is told with both."""
    least, most, required = bounds
    for bound, away in ((least, -INF), (most, INF)):
        assert number.problem(field, {field: bound}) == []
        beyond = bound + (1 if away > 0 else -1) if number.kind is int else math.nextafter(bound, away)
        assert number.problem(field, {field: beyond}) == [f"{field}={beyond} is not {number}"]
    assert f"{number}".endswith(f"from {least:g} to {most:g}")
    assert bool(number.problem(field, {})) == bool(number.problem(field, {field: None})) == required
    for wrong in (True, "3", [3], NAN, 10**400, *[2.0] * (number.kind is int)):
        assert number.problem(field, {field: wrong})
    assert number.kind is int or not number.problem(field, {field: 1})


def test_a_key_that_stands_there_twice(tmp_path: Path, tokenizer_path: str) -> None:
    """The last one counted."""
    folder = write_checkpoint(tmp_path, random_weights())
    text = (folder / "params.json").read_text()
    (folder / "params.json").write_text(text.replace("{", '{"norm_eps": 0.5, ', 1))
    with pytest.raises(ValueError, match="params.json is not JSON: the key 'norm_eps' stands there twice"):
        build(folder, tokenizer_path)


# What a .pth file may hold


class Sub(torch.Tensor):
    pass


TENSORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "meta": (lambda t: t.to("meta"), "it holds 'torch._utils._rebuild_meta_tensor_no_storage'"),
    "sparse": (lambda t: t.to_sparse(), "it holds "),
    "nested": (lambda t: torch.nested.nested_tensor([t]), "it holds 'torch._utils._rebuild_nested_tensor'"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "it holds "),
    "subclass": (lambda t: t.as_subclass(Sub), "it holds "),
    "complex": (lambda t: t.to(torch.complex64), "wq.weight is torch.complex64"),
    "conjugate": (lambda t: torch.conj(t.to(torch.complex64)), "negative or conjugate"),
    "negative": (torch._neg_view, "negative or conjugate"),
    "expanded": (lambda t: t[:1].expand(64, 64), r"shape \(64, 64\) whose numbers overlap; save it with contiguous"),
    "overlapping": (lambda t: t.flatten().as_strided((64, 64), (1, 1)), "whose numbers overlap"),
    "9 dimensions": (lambda t: t.view(*[1] * 7, 64, 64), "it has a tensor with an impossible shape"),
    "0 dimensions": (lambda t: torch.tensor(1.0), r"wq.weight has shape \[\] instead of \[64, 64\]"),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore:.*(sparse|nested|quantiz|The PyTorch API).*")
def test_tensors_of_other_kinds(kind: str, tmp_path: Path, tokenizer_path: str) -> None:
    """One on the meta device became memory that nobody had written to: another text at each run."""
    change, message = TENSORS[kind]
    weights = random_weights()
    folder = write_checkpoint(tmp_path, weights)
    torch.save({**weights, WQ: change(weights[WQ])}, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match=message) as caught:
        build(folder, tokenizer_path)
    assert str(folder) in str(caught.value)


def test_tensors_that_lie_otherwise(tmp_path: Path, tokenizer_path: str) -> None:
    """Parts of larger tensors, transposed ones, parameters; a file of another protocol; what hangs on a state dict."""
    weights = random_weights()
    folder = write_checkpoint(tmp_path, weights)
    odd = {
        name: torch.nn.Parameter(w) if i % 2 else torch.cat((w, w))[len(w) :]
        for i, (name, w) in enumerate(weights.items())
    }
    odd[WQ] = weights[WQ].t().contiguous().t()
    for protocol in (2, 3, 4, 5):
        state = OrderedDict(odd)
        state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as a module's state_dict has it
        torch.save(state, folder / "consolidated.00.pth", pickle_protocol=protocol)
        found = build(folder, tokenizer_path).model.state_dict()
        assert all(torch.equal(found[name], w) for name, w in weights.items())


def test_embeddings_without_dimensions(tmp_path: Path, tokenizer_path: str) -> None:
    folder = write_checkpoint(tmp_path, random_weights())
    torch.save({**random_weights(), "tok_embeddings.weight": torch.tensor(1.0)}, folder / "consolidated.00.pth")
    with pytest.raises(
        ValueError, match=r"consolidated.00.pth has tok_embeddings.weight in shape \[\]; it is no matrix"
    ):
        build(folder, tokenizer_path)


def with_pickle(path: Path, change: Callable[[bytes], bytes], drop: str = "") -> None:
    """The archive with another pickle, and with the checksums that belong to it."""
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    path.unlink()
    with zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            if record.filename != drop:
                data = source.read(record)
                target.writestr(record.filename, change(data) if record.filename.endswith("data.pkl") else data)


DEEP = b"\x80\x02Nq\x00" + b"h\x00h\x00\x86q\x00" * 200 + b"}h\x00Ns."  # a tuple of 2^200 parts
COPIES = b"\x80\x02ccollections\nOrderedDict\nq\x00(" + b"K\x01" * 10**5 + b"tq\x01" + b"h\x00h\x01R0" * 10**5 + b"."
PICKLES: dict[str, tuple[bytes, str]] = {
    "marks": (b"\x80\x02" + b"(" * 60 * 2**20 + b".", "has 62914563 bytes"),
    "fewer marks": (b"\x80\x02" + b"(" * 10**5 + b".", "cannot be read"),
    "tuples": (b"\x80\x02N" + b"\x85" * 10**5 + b".", "is not a flat dictionary"),
    "hash of a deep tuple": (DEEP, "it has a tuple for a name"),
    "place 2^31 of the memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "is not a flat dictionary"),
    "a copy of a long tuple, often": (COPIES, "it holds 'collections"),
    "a number of 10^6 digits": (b"\x80\x02I" + b"9" * 10**6 + b"\n.", "cannot be read"),
    "code": (b"cos\nsystem\n(X\x04\x00\x00\x00truetR.", "could run code.*it holds 'os.system'"),
    "nothing": (b"", "cannot be read"),
    "half": (b"\x80\x02}(", "cannot be read"),
    "a list": (b"\x80\x02].", "is not a flat dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_of_other_things(kind: str, tmp_path: Path, tokenizer_path: str) -> None:
    """Marks alone kept torch.load busy for a minute, a deep tuple as a key for ever."""
    folder = write_checkpoint(tmp_path, random_weights())
    pickled, message = PICKLES[kind]
    with_pickle(folder / "consolidated.00.pth", lambda _: pickled)
    signal.alarm(5)
    with pytest.raises(ValueError, match=f"consolidated.00.pth .*{message}"):
        build(folder, tokenizer_path)


INDEXES: dict[str, tuple[tuple[bytes, bytes], str, str]] = {
    "more numbers than there are": ((b"M\x00d", b"M\x00e"), "", "has 102400 bytes, and its index says another"),
    "a part twice": ((b"X\x01\0\0\x003", b"X\x01\0\0\x002"), "", "3' belongs to no tensor"),
    "a part that is not there": ((b"", b""), "data/3", "names a part that is not there, '3'"),
    "a shape beyond the part": ((b"M\x90\x01K@\x86", b"M\x91\x01K@\x86"), "", r"shape \(401, 64\) in a part of 102400"),
    "fewer steps than dimensions": ((b"K@K\x01\x86", b"K@\x85"), "", "it has a tensor with an impossible shape"),
    "a negative step": ((b"K@K\x01\x86", b"K@J\xff\xff\xff\xff\x86"), "", "it has a tensor with an impossible shape"),
    "the other byte order": ((b"", b""), "byteorder", "'big' byte order"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_indexes_that_lie(kind: str, tmp_path: Path, tokenizer_path: str) -> None:
    """With checksums that are right. More numbers than the part has were read from the part behind it."""
    folder = write_checkpoint(tmp_path, random_weights())
    path = folder / "consolidated.00.pth"
    (old, new), drop, message = INDEXES[kind]
    with_pickle(path, lambda pickled: pickled.replace(old, new, 1), f"consolidated.00/{drop}")
    if drop == "byteorder":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("consolidated.00/byteorder", "big")
    with pytest.raises(ValueError, match=message):
        build(folder, tokenizer_path)


def test_a_wrong_bit_in_a_norm(tmp_path: Path, tokenizer_path: str) -> None:
    """The checksums of small parts are compared; those of matrices would have to be read whole."""
    folder = write_checkpoint(tmp_path, random_weights())
    path = folder / "consolidated.00.pth"
    at = path.read_bytes().index(random_weights()["norm.weight"].numpy().tobytes())
    data = bytearray(path.read_bytes())
    data[at + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="has not the checksum that its directory says"):
        build(folder, tokenizer_path)


# Tokenizers


def trained(**options: Any) -> bytes:
    target = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 5), model_writer=target, model_type="bpe", vocab_size=400,
        byte_fallback=True, minloglevel=2, **options,
    )  # fmt: skip
    return target.getvalue()


def last_replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    head, _, tail = data.rpartition(old)
    return head + new + tail


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trained(eos_id=-1), "<s> has the id 1, </s> -1"),
        (lambda: trained(bos_id=-1, eos_id=1), "<s> has the id -1, </s> 1"),
        (
            lambda: last_replaced(trained(bos_piece="<bb>", eos_piece="<ee>"), b"<ee>", b"<bb>"),
            "<s> has the id 1, </s> 1",
        ),
        (lambda: trained().replace("▁the".encode(), b"\xe2\xb6\x81the", 1), "is not a SentencePiece model, or damaged"),
        (lambda: trained().replace("▁the".encode(), b"\xe2\x16\x81the", 1), "is not a SentencePiece model, or damaged"),
    ],
)
def test_tokenizers_without_marks_or_with_wrong_bits(make: Any, message: str, tiny: Path, tmp_path: Path) -> None:
    """Without `</s>` the id -1 got into prompts; a wrong bit was a UnicodeDecodeError, or one in the middle of a
    text."""
    data = make()
    (tmp_path / "tokenizer.model").write_bytes(data)
    if b"\xe2\xb6\x81" in data:  # another character, which nothing can tell
        assert build(tiny, str(tmp_path / "tokenizer.model"))
        return
    with pytest.raises(ValueError, match=f"tokenizer.model .*{message}"):
        build(tiny, str(tmp_path / "tokenizer.model"))


# Files that change under a model


def test_pages_that_are_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that lie within a tensor, and no others. Here they were written to, so the file's zeros come back to them."""
    page = mmap.PAGESIZE
    path = tmp_path / "zeros"
    path.write_bytes(bytes(16 * page))
    files = MappedFiles([path])
    whole = torch.from_file(str(path), shared=False, size=16 * page, dtype=torch.uint8)
    pages = whole.view(16, page)
    if not files.ranges:
        pytest.skip("the system does not say what is mapped")

    def released(*tensors: torch.Tensor) -> list[int]:
        whole.fill_(1)
        for tensor in tensors:
            files.release(tensor)
        assert {int(line.sum()) for line in pages} <= {0, page}
        return [i for i, line in enumerate(pages) if not line.any()]

    assert released(whole) == list(range(16))
    assert released(whole[page : 3 * page], whole[5 * page :]) == [1, 2, *range(5, 16)]
    assert released(whole[page + 1 : 4 * page - 1]) == [2]
    assert released(whole[page : 2 * page - 1], whole[1 : page + 1]) == []
    assert released(whole.view(torch.float32)[page // 4 : page]) == [1, 2, 3]
    assert released(pages[2:6, :100], pages[9:11, 1:]) == [2, 3, 4, 10]
    assert released(whole[page:page], pages[:, :0], pages[3:3], torch.empty(0), torch.zeros(4 * page)) == []
    monkeypatch.setattr("llama.system.files.COPY_BYTES", 3 * page)
    pieces: list[int] = []
    release = files.release
    monkeypatch.setattr(files, "release", lambda tensor: pieces.append(len(tensor)) or release(tensor))
    for source, rows in (
        (pages, [3, 3, 3, 3, 3, 1]), (pages.view(64, -1), [12, 12, 12, 12, 12, 4]), (pages.view(2, -1), [1, 1]),
        (pages[:, :5], [3, 3, 3, 3, 3, 1]), (whole[: 4 * page], [3 * page, page]), (whole[:1].expand(9), [9]),
        (whole[:0], []),
    ):  # fmt: skip
        whole.copy_(torch.arange(len(whole)) % 251)
        expected, target = source.clone(), torch.zeros(source.shape, dtype=torch.uint8)
        pieces.clear()
        files.copy(source, target)
        assert torch.equal(target, expected)
        assert pieces == rows
        assert source.numel() < len(whole) or not whole.any()


def test_what_lies_in_a_file(tmp_path: Path) -> None:
    """From the first byte to the last; the next one's memory may be another's."""
    path = tmp_path / "zeros"
    path.write_bytes(bytes(mmap.PAGESIZE))
    files = MappedFiles([path])
    whole = torch.from_file(str(path), shared=False, size=mmap.PAGESIZE, dtype=torch.uint8)
    if not files.ranges:
        pytest.skip("the system does not say what is mapped")

    def at(place: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_uint8 * 1).from_address(whole.data_ptr() + place), dtype=torch.uint8)

    path.write_bytes(b"another length")
    for place, inside in ((-1, False), (0, True), (mmap.PAGESIZE - 1, True), (mmap.PAGESIZE, False)):
        assert files.holds(at(place)) == inside
        with pytest.raises(ValueError, match="was written to after it was loaded") if inside else nullcontext():
            files.check_unchanged([at(place)])


@pytest.mark.parametrize("kind", ["meta", "hf", "gguf"])
def test_weights_that_are_edited_change_no_file(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """They are mapped."""
    path = tmp_path / "a.gguf"
    if kind == "gguf":
        convert(folders["hf"], path, "gguf", dtype=torch.float32, tokenizer_path=folders["meta"] / "tokenizer.model")
    else:
        path = shutil.copytree(folders[kind], tmp_path / "folder")
    files = {file: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}
    model = Llama.build(str(path), max_seq_len=8, device="cpu").model
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert model.files is not None
    assert any(low <= weight.data_ptr() < high for weight in model.parameters() for low, high, _ in model.files.ranges)
    assert {file: file.read_bytes() for file in files} == files


def test_files_that_are_written_to_under_a_model(tmp_path: Path, tokenizer_path: str) -> None:
    """What is mapped is read later. A file that was cut ends the process; one of the same length gives other
    weights."""
    folder = write_checkpoint(tmp_path, random_weights())
    path = folder / "consolidated.00.pth"
    llama = build(folder, tokenizer_path)
    expected = llama.score(["the tree"])
    shutil.copyfile(path, tmp_path / "new")
    (tmp_path / "new").rename(path)  # the way to replace one
    assert llama.score(["the tree"]) == expected
    path.unlink()
    assert llama.score(["the tree"]) == expected
    shutil.copyfile(write_checkpoint(tmp_path / "again", random_weights()) / "consolidated.00.pth", path)
    llama = build(folder, tokenizer_path)
    os.utime(path, (1, 1))
    for call in (llama.score, llama.embed, llama.text_completion):
        with pytest.raises(ValueError, match=r"consolidated.00.pth was written to after it was loaded"):
            call(["the tree"])
    copied = copy.deepcopy(llama)
    llama.model.load_state_dict(random_weights(), assign=True)  # and nothing lies in the file any more
    for other in (copied, llama):
        assert other.text_completion(["the tree"], max_gen_len=2)
    llama = build(folder, tokenizer_path, dtype="bfloat16")  # of which nothing lies in the file
    os.truncate(path, 1000)
    assert llama.text_completion(["the tree"], max_gen_len=2)


# Numbers that are none


TEXTS = ["a", "the tree", "the little dog found a red ball under the tree"]
HIDING = {
    "wq NaN": (WQ, NAN), "wq inf": (WQ, INF), "wk NaN": (WK, NAN), "wk inf": (WK, INF), "wk -inf": (WK, -INF),
    "a norm": ("layers.1.attention_norm.weight", NAN), "output": ("output.weight", INF),
}  # fmt: skip


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("kind", HIDING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_nan_hides_in_attention(
    dtype: str, kind: str, tiles: bool, tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused attention on CPUs makes zeros of a row whose scores are all NaN, and no error came of it.

    tiles: as on processors with AMX, where single tokens go through fused attention too.
    """
    monkeypatch.setattr(model, "AMX", tiles)
    llama = build(tiny, tokenizer_path, dtype=dtype)
    name, value = HIDING[kind]
    weight = llama.model.get_parameter(name)
    weight.data = torch.full_like(weight, value)
    for text in TEXTS:
        ids = torch.tensor([llama.tokenizer.encode(text, bos=True, eos=False)])
        assert not llama.model(ids, 0).isfinite().all()
        calls: list[Any] = [llama.score, lambda texts: llama.text_completion(texts, max_gen_len=1, temperature=0)]
        for call in calls if name == "output.weight" else [*calls, llama.embed]:
            with pytest.raises(ValueError, match=r"for prompt 0 are not finite in torch\.(float32|bfloat16)"):
                call([text])


@pytest.mark.parametrize("columns", [*range(1, 20), 33])
def test_attention_shows_every_nan(columns: int) -> None:
    """Of one query or key, wherever it stands, beside the softmax written out."""
    generator = torch.Generator().manual_seed(columns)
    for dtype in (torch.float32, torch.bfloat16):
        for place in range(columns):
            q, k, v = (torch.randn(1, columns, 2, 16, generator=generator).to(dtype) for _ in range(3))
            (q if place % 2 else k)[0, place, 1] = NAN
            seen = torch.ones(columns, columns, dtype=torch.bool).tril()[None] if columns < model.NAN_COLUMNS else None
            out = model.attend(q, k, v, seen, causal=True).view(columns, 2, 16)
            assert out[place, 1].isnan().all()
            assert out[place, 0].isfinite().all()


def test_keys_that_overflow_float16(tmp_path: Path, tokenizer_path: str) -> None:
    """A key whose score is -infinity gets no weight: 0.1 to 0.2 off in the logits, without a word. These ids have one
    such key, and no other that overflows (of 200 random prompts, two had)."""
    weights = random_weights()
    weights[WK], weights[WQ] = weights[WK] * 2e4, weights[WQ] / 2e4
    write_checkpoint(tmp_path, weights)
    ids = torch.tensor([[63, 206, 217, 175, 384, 260, 39, 270], [142, 134, 348, 191, 33, 357, 277, 80]])
    assert build(tmp_path, tokenizer_path, dtype="float32").model(ids, 0).isfinite().all()
    llama = build(tmp_path, tokenizer_path, dtype="float16")
    assert llama.model(ids[:1], 0)[0, -1].isnan().all()
    for at in range(8):
        logits = llama.model(ids[1:, at : at + 1], at)
    assert logits.isnan().all()
    hook = llama.model.layers[0].register_forward_hook(lambda *_: None)  # by Meta's way
    assert llama.model(ids[:1], 0)[0, -1].isnan().all()
    hook.remove()
    with pytest.raises(ValueError, match="not finite in torch.float16; build it with dtype='float32'"):
        llama.generate(ids[:1].tolist(), 1, temperature=0)


def test_a_prompt_after_one_that_failed(tmp_path: Path, tokenizer_path: str) -> None:
    """NaN stayed in the slot, and counted for the next prompt there as soon as a longer one ran beside it."""
    weights = random_weights()
    llama = build(write_checkpoint(tmp_path, weights), tokenizer_path, dtype="bfloat16")
    llama.model.tok_embeddings.weight[7] = NAN
    good = [[1, 5, 9], list(range(10, 30))]
    expected = llama.generate(good, 4, temperature=0)
    with pytest.raises(ValueError, match="not finite"):
        llama.generate([[1, *range(30, 50), 7]], 4, temperature=0)
    with pytest.raises(ValueError, match="not finite"):
        llama.generate([[1, 7, 7, 7, 7, 7, 7, 7]], 4, temperature=0)
    assert llama.generate(good, 4, temperature=0) == expected


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("int8", "scales", NAN),
        ("int8", "scales", 0.0),
        ("int8", "scales", -1.0),
        ("int4", "scales", INF),
        ("int4", "zeros", NAN),
    ],
)
def test_scales_that_no_rounding_makes(
    kind: str, name: str, value: float, tiny: Path, tmp_path: Path, tokenizer_path: str
) -> None:
    convert(tiny, tmp_path / "q", "meta", quantize=kind)
    path = tmp_path / "q" / "consolidated.00.pth"
    stored = torch.load(path)
    stored[f"layers.1.feed_forward.w2.{name}"].view(-1)[5] = value
    torch.save(stored, path)
    with pytest.raises(ValueError, match=rf"layers.1.feed_forward.w2.{name} goes from .* to .*the file is damaged"):
        build(tmp_path / "q", tokenizer_path)


def test_weights_that_cannot_be_rounded(tmp_path: Path, tokenizer_path: str) -> None:
    weights = random_weights()
    weights[WQ][3, 3] = NAN
    with pytest.raises(ValueError, match=r"layers.0.attention.wq.scales goes from nan to nan.* rounded have NaN"):
        build(write_checkpoint(tmp_path, weights), tokenizer_path, quantize="int8")


def test_an_empty_path_is_told() -> None:
    """A shell's variable that is not set was once the current folder."""
    with pytest.raises(ValueError, match=r"the path is empty; write \. for the current folder"):
        user_path("")
    assert user_path(".") == user_path(Path(".")) == Path(".")


def test_paths_in_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/here")
    assert user_path("~/models") == Path("/here/models")
    assert user_path(7) == Path("7")  # type: ignore[arg-type]  # as fire reads the name
    with pytest.raises(ValueError, match="~nobody1/a begins with a home folder that does not exist"):
        user_path("~nobody1/a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "it is nested too deep"),
        (b'{"a": "\xff"}', "it is not UTF-8 at byte 7; save it as UTF-8"),
        (b"[1, NaN]", "'NaN' is not a finite number"),
        (b"[-Infinity]", "'-Infinity' is not a finite number"),
        (b"[1e999]", "'1e999' is not a finite number"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands there twice"),
    ],
)
def test_what_json_must_be(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(data)
    assert parse_json(b'{"a": [1.5, null, -3]}') == {"a": [1.5, None, -3]}
    assert parse_json(b"[1e999, -Infinity]", finite=False) == [INF, -INF]


def test_what_is_no_json_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert not is_there(path)
    with pytest.raises(
        ValueError, match="a.json is missing; it comes with the checkpoint, and the folder holds nothing"
    ):
        read_json(path, "it has some")
    for data, message in (
        (b"[1]", "holds a list, not an object; it has some"), (b"{", "is not JSON: Expecting"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, and not the file itself"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"a.json {message}"):
            read_json(path, "it has some")
    path.write_bytes(b'{"a": NaN}')
    assert math.isnan(read_json(path, "it has some")["a"])
    path.unlink()
    path.symlink_to("nowhere")
    assert is_there(path)


def test_a_large_file_is_no_pointer(tmp_path: Path) -> None:
    """Only a small one is looked into."""
    for size, pointer in ((1023, True), (1024, False)):
        (tmp_path / "a").write_bytes(b"version https://git-lfs.github.com/".ljust(size))
        with pytest.raises(ValueError, match="pointer of Git LFS") if pointer else nullcontext():
            assert len(read_file(tmp_path / "a")) == size
        with pytest.raises(ValueError, match="pointer of Git LFS") if pointer else nullcontext():
            MappedFiles([tmp_path / "a"])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its permissions, and a link its place; nothing is left beside it."""
    before = os.umask(0o022)
    try:
        path, link = tmp_path / "a", tmp_path / "link"
        replace_file(path, b"new")
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o644)
        path.chmod(0o606)
        link.symlink_to("a")
        modes: list[int] = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: modes.append(os.fstat(file).st_mode & 0o777) or fsync(file))
        replace_file(link, b"newer")
        assert modes == [0o600]  # until it is written nobody else may read it
        assert link.is_symlink()
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"newer", 0o606)
    finally:
        os.umask(before)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"newest")
    assert path.read_bytes() == b"newer"
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["a", "link"]
    with pytest.raises(ValueError, match="is no file that could be written over; name another one"):
        replace_file(tmp_path, b"")
    with pytest.raises(FileNotFoundError) as missing:
        replace_file(tmp_path / "none" / "b", b"")
    assert missing.value.filename == str(tmp_path / "none" / "b")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as the tests may be run by root
    with pytest.raises(PermissionError) as forbidden:
        replace_file(path, b"")
    assert (forbidden.value.errno, forbidden.value.filename, path.read_bytes()) == (13, str(path), b"newer")


def test_files_of_two_checkpoints(tmp_path: Path) -> None:
    """An adapter's beside its base's: each is watched from when it was first seen. One that is removed stays mapped."""
    for name in "ab":
        (tmp_path / name).write_bytes(b"12345678")
    first = MappedFiles([tmp_path / "a"])
    both = first.joined(MappedFiles([tmp_path / "b"]))
    assert [path.name for path in both.paths] == ["a", "b"]
    both.check_unchanged()
    (tmp_path / "a").unlink()
    both.check_unchanged()
    (tmp_path / "b").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"b was written to after it was loaded \(8 bytes then, 3 now\)"):
        both.check_unchanged()
