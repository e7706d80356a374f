"""Both formats, any shards, bit for bit; transformers as the authority; and what an interrupted run leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, ROOT, random_weights, shared, write_checkpoint
from helpers import TWINS, environment, write_twin
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from workers import Pool

from llama import Llama, ModelArgs, Tokenizer
from llama.commands import cli
from llama.commands.convert import _new_folder, convert, hf_tokenizer, meta_params
from llama.model import feed_forward_width
from llama.weights.checkpoint import open_checkpoint, quantized

TEXTS = ["The little dog", "  two  spaces\n\nand lines ", "你好,世界 é 😀", "x", "Well , it 's done ."]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The full matrices of a folder, cut over shards or not, in Meta's layout."""
    from conftest import META_SHARD_DIMS

    files = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]
    whole = {}
    for name in files[0]:
        dim = META_SHARD_DIMS.get(name.split(".")[-2])
        whole[name] = files[0][name] if dim is None else torch.cat([file[name] for file in files], dim)
    return whole


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert weight.dtype == b[name].dtype, name
        assert torch.equal(weight.flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


@pytest.mark.parametrize("name", ["stories260K", "toy-gqa", "toy-mha", "toy-gqa-mp4"])
def test_meta_to_hf_to_meta(name: str, tmp_path: Path) -> None:
    source = shared(f"models/{name}")
    shards = len(list(source.glob("*.pth")))
    convert(source, tmp_path / "hf", "hf", tokenizer_path=source / "tokenizer.model")
    convert(tmp_path / "hf", tmp_path / "meta", "meta", shards, tokenizer_path=source / "tokenizer.model")
    before = tensors(source)
    before.pop("rope.freqs", None)  # a table, which the other format has no name for
    assert_same(tensors(tmp_path / "meta"), before)
    params, ours = (json.loads((folder / "params.json").read_text()) for folder in (source, tmp_path / "meta"))
    # Two ways to say the same: the width as another multiple, the heads by their number, the vocabulary outright.
    one, two = (ModelArgs(**{**p, "vocab_size": 512}) for p in (params, ours))
    assert one.ffn_width == two.ffn_width
    assert one.kv_heads == two.kv_heads
    free = {"multiple_of": 1, "ffn_dim_multiplier": None, "n_kv_heads": None}
    assert replace(one, **free) == replace(two, **free)


@pytest.mark.parametrize("name", TWINS)
def test_hf_to_meta_to_hf(name: str, tmp_path: Path, tokenizer_path: str) -> None:
    """Tied and untied, wide heads, a long rotary base; and Meta's side computes what the other did."""
    source = write_twin(tmp_path / "twin", TWINS[name])
    convert(source, tmp_path / "meta", "meta", 2, tokenizer_path=Path(tokenizer_path))
    convert(tmp_path / "meta", tmp_path / "hf", "hf", tokenizer_path=Path(tokenizer_path))
    from safetensors.torch import load_file

    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    if name == "tied":
        assert torch.equal(after.pop("lm_head.weight"), before["model.embed_tokens.weight"])
    assert_same(before, after)
    tokens = torch.randint(0, 400, (2, 9))
    one, two = (Llama.build(str(f), tokenizer_path, 16, 2, device="cpu").model for f in (source, tmp_path / "meta"))
    assert torch.equal(one(tokens, 0), two(tokens, 0))


@pytest.mark.parametrize(("first", "second"), [(1, 2), (4, 1), (2, 4), (4, 2)])
def test_any_shards_to_any(first: int, second: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", random_weights(), first)
    convert(source, tmp_path / "b", "meta", second)
    convert(tmp_path / "b", tmp_path / "c", "meta", first)
    assert len(list((tmp_path / "b").glob("*.pth"))) == second
    for before, after in zip(sorted(source.glob("*.pth")), sorted((tmp_path / "c").glob("*.pth")), strict=True):
        assert_same(torch.load(before), torch.load(after))


def test_files_of_a_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are needed, none larger than it may be unless one tensor is; an index says what lies where."""
    weights = random_weights()
    source = write_checkpoint(tmp_path / "a", weights)
    largest = max(weight.nbytes for weight in weights.values())
    monkeypatch.setattr(
        "llama.commands.convert.PART_BYTES", 3 * 64 * 64 * 4
    )  # three square matrices; the embedding is larger
    convert(source, tmp_path / "hf", "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    parts = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [path.name for path in parts] == [
        f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))
    ]
    sizes: list[int] = []
    for path in parts:
        held = load_file(path)
        assert {name for name, part in index["weight_map"].items() if part == path.name} == held.keys()
        first = next(name for name, part in index["weight_map"].items() if part == path.name)
        assert not sizes or sizes[-1] + held[first].nbytes > 3 * 64 * 64 * 4  # it found no room in the file before
        sizes.append(sum(tensor.nbytes for tensor in held.values()))
        assert sizes[-1] <= 3 * 64 * 64 * 4 or len(held) == 1
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert max(sizes) == largest
    convert(tmp_path / "hf", tmp_path / "b", "meta")
    assert_same(tensors(tmp_path / "b"), weights)


@pytest.mark.parametrize(
    ("dtype", "rope_theta", "positions"),
    [(None, 10000.0, 4096), (torch.bfloat16, 1e6, 16384), (torch.float16, 10000.0, 4096)],
)
def test_what_a_config_says(dtype: Any, rope_theta: float, positions: int, tmp_path: Path) -> None:
    """All that transformers would take from its own defaults. Without a tokenizer the ids of BOS and EOS are Llama
    2's."""
    source = write_checkpoint(tmp_path / "a", random_weights(), params={**PARAMS, "rope_theta": rope_theta})
    convert(source, tmp_path / "hf", "hf", dtype=dtype)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == ids
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 400,
        "rms_norm_eps": 1e-5, "rope_theta": rope_theta, "rope_scaling": None, "hidden_act": "silu",
        "max_position_embeddings": positions, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "torch_dtype": str(dtype or torch.float32).removeprefix("torch."), **ids,
    }  # fmt: skip
    if os.name == "posix":
        assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_the_bar_counts_tensors(to: str, tiny: Path, tmp_path: Path, bars: list[Any]) -> None:
    convert(tiny, tmp_path / "new", to)
    shown = bars[0]
    assert shown.n == shown.total == len(random_weights()) + (to == "meta")  # a table of rotations is copied too
    assert (shown.desc, shown.unit, shown.leave) == ("Converting", "tensor", True)


def test_shards_are_those_of_torch_save(tmp_path: Path) -> None:
    """Readable by torch.load mapped or not, aligned, and with checksums that unzip agrees with."""
    import zipfile

    source = write_checkpoint(tmp_path / "a", random_weights(), 2)
    convert(source, tmp_path / "b", "meta", 2)
    for i in (0, 1):
        path = tmp_path / "b" / f"consolidated.{i:02d}.pth"
        for mapped in (False, True):
            assert_same(torch.load(path, mmap=mapped, weights_only=True), torch.load(source / path.name))
        for weight in torch.load(path, mmap=True).values():
            assert weight.data_ptr() % 64 == 0
            assert weight.is_contiguous()
        assert zipfile.ZipFile(path).testzip() is None


def test_dtypes(tmp_path: Path) -> None:
    weights = random_weights()
    mixed = {name: weight.bfloat16() if weight.ndim > 1 else weight for name, weight in weights.items()}
    source = write_checkpoint(tmp_path / "a", mixed)
    for to in ("meta", "hf"):
        convert(source, tmp_path / to, to)
        assert open_checkpoint(tmp_path / to).dtypes == {name: weight.dtype for name, weight in mixed.items()}
        convert(source, tmp_path / f"{to}16", to, dtype=torch.float16)
        checkpoint = open_checkpoint(tmp_path / f"{to}16")
        assert set(checkpoint.dtypes.values()) == {torch.float16}
        assert torch.equal(checkpoint.read("norm.weight", None, 0, 0), weights["norm.weight"].half())
    config = json.loads((tmp_path / "hf16/config.json").read_text())
    assert config["torch_dtype"] == "float16"


@pytest.mark.parametrize("name", ["toy-gqa", "stories260K"])
def test_transformers_opens_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, config, generation config and tokenizer; the same ids for a text, and the same greedy text."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = shared(f"models/{name}")
    convert(source, tmp_path / "hf", "hf", tokenizer_path=source / "tokenizer.model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Llama.build(str(source), None, 128, 1, device="cpu")
    told = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert told["clean_up_tokenization_spaces"] is False  # which transformers 4 would do if it were left out
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == ours.tokenizer.encode(text, bos=True, eos=False)
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == ours.tokenizer.decode(ids[0].tolist())
        generated = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        expected = ours.text_completion([text], temperature=0, max_gen_len=24)[0]["generation"]
        assert ours.tokenizer.decode(generated.tolist()).startswith(expected)


def test_the_tokenizer_is_the_same_in_transformers(tmp_path: Path) -> None:
    """Meta's own vocabulary, on text that a vocabulary can get wrong."""
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer(str(shared("tokenizers/llama2/tokenizer.model")))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer(ours)))
    texts = TEXTS + [
        "",
        " ",
        "def f(x):\n    return x  # \t tab",
        "a\r\nb\u200b",
        "L'été 1984, à 12h",
        "\U0001f468\u200d\U0001f469",
    ]
    if (text := shared("text/tinystories-2MiB.txt")).exists():
        texts += text.read_text(encoding="utf-8")[:40_000].split("<|endoftext|>")
    for text in texts:
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


def test_control_ids_in_transformers_stand_where_their_text_does(tokenizer: Tokenizer) -> None:
    """Wherever it stands; and spaces beside it stay, which models were trained with."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer(tokenizer)))

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False, eos=False)

    for left, right in (("one", "two"), ("one ", "two"), ("one", " two")):
        for i, special in enumerate(("<unk>", "<s>", "</s>")):
            assert theirs.encode(f"{left}{special}{right}").ids == [1, *ids(left), i, *ids(right)], (
                left,
                special,
                right,
            )
    assert theirs.encode("one", "two").ids == [1, *ids("one"), 1, *ids("two")]
    assert theirs.decode([1, *ids("one"), 2]) == "one"
    assert theirs.encode("<S>").ids == [1, *ids("<S>")]


@given(
    dim=st.integers(1, 2**14), ffn=st.integers(1, 2**16)
)  # fmt: skip
def test_any_width_can_be_said_in_params(dim: int, ffn: int) -> None:
    params = meta_params(ModelArgs(dim=2 * dim, n_heads=2, vocab_size=1, ffn_dim=ffn))
    assert feed_forward_width(8 * dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == ffn


def test_metas_own_widths_are_said_in_metas_way() -> None:
    """The largest multiple that gives them, with Meta's own multiplier only if there has to be one."""
    for dim, ffn, expected in [
        (4096, 11008, (256, None)), (5120, 13824, (512, None)), (8192, 28672, (4096, 1.3)), (3072, 8192, (4096, None)),
        (2, 5, (1, None)),
    ]:  # fmt: skip
        params = meta_params(ModelArgs(dim=dim, n_heads=1, vocab_size=1, ffn_dim=ffn))
        assert feed_forward_width(4 * dim, *expected) == ffn
        assert (params["multiple_of"], params.get("ffn_dim_multiplier")) == expected


def greedy(folder: str, processes: int) -> list[int]:
    llama = Llama.build(folder, None, 64, 1, processes, device="cpu")
    return llama.generate([[1, 5, 9]], 20, temperature=0)[0][0]


def test_a_converted_model_runs_on_any_processes(tmp_path: Path, pool: Pool) -> None:
    source = shared("models/toy-gqa")
    convert(source, tmp_path / "hf", "hf", tokenizer_path=source / "tokenizer.model")
    expected = greedy(str(source), 1)
    for processes in (1, 2, 4):
        assert pool.run(greedy, str(tmp_path / "hf"), processes) == [expected] * 4


def test_each_matrix_is_rounded_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its numbers and its scales are tensors of their own."""
    rounded: list[tuple[str, int]] = []

    def noted(checkpoint: Any, prefix: str, layer: Any, start: int, *more: Any) -> Any:
        rounded.append((prefix, start))
        return quantized(checkpoint, prefix, layer, start, *more)

    monkeypatch.setattr("llama.commands.convert.quantized", noted)
    convert(tiny, tmp_path / "new", "meta", 2, quantize="int8")
    assert len(rounded) == len(set(rounded)) == 2 * (2 * 7 + 1)


def test_folders_above_the_new_one_are_made(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "not" / "yet there" / "hf", "hf")
    assert open_checkpoint(tmp_path / "not" / "yet there" / "hf").shape("norm.weight", None) == [64]
    assert [path.name for path in (tmp_path / "not" / "yet there").iterdir()] == ["hf"]


def test_what_is_refused(tiny: Path, tmp_path: Path) -> None:
    def refuse(
        message: str, source: Path = tiny, to: str = "hf", target: Path = tmp_path / "new", **options: Any
    ) -> None:
        with pytest.raises(ValueError, match=message):
            convert(source, target, to, **options)
        assert not (tmp_path / "new").exists()
        assert not list(tmp_path.glob(".*"))

    refuse("to='onnx' must be 'meta', 'hf' or 'gguf'", to="onnx")
    (tmp_path / "old").mkdir()
    refuse("old exists, and nothing is written over", target=tmp_path / "old")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refuse("link exists, and nothing is written over", target=tmp_path / "link")
    refuse("shards=0 must be", to="meta", shards=0)
    refuse("cannot be shared by 3 shards; use 1 or 2 or 4 or 8", to="meta", shards=3)
    refuse("4 key/value heads cannot be cut into 8 shards; use a divisor of 4", to="meta", shards=8)
    odd = write_checkpoint(tmp_path / "odd", random_weights(vocab_size=401))
    refuse("401 ids cannot be cut into 2 shards; use a divisor", source=odd, to="meta", shards=2)
    refuse("no checkpoint folder", source=tmp_path / "gone")
    refuse("no tokenizer at", tokenizer_path=tmp_path / "tokenizer.model")
    broken = write_checkpoint(tmp_path / "broken", random_weights(), params={**PARAMS, "n_layers": 3})
    refuse("layers.2.attention.wq.weight is missing", source=broken)
    odd = write_checkpoint(tmp_path / "odd", random_weights(), params={**PARAMS, "n_heads": 7})
    refuse(r"odd: dim \(64\) must be n_heads \(7\) times an even head size", source=odd)


def test_a_model_of_one_head(tmp_path: Path) -> None:
    """No two processes could share it, and none need to."""
    params = {**PARAMS, "n_heads": 1, "n_kv_heads": 1}
    convert(write_checkpoint(tmp_path / "a", random_weights(params), params=params), tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "b", "meta")
    assert_same(tensors(tmp_path / "b"), random_weights(params))


def test_a_full_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before, or met on the way: either way nothing is left."""
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(ValueError, match=r"has 1.0 KB free, and \S+ [KM]B are to be written"):
            convert(tiny, tmp_path / "new", "hf")
    nbytes = sum(weight.nbytes for weight in random_weights().values())
    for free, error in ((nbytes - 1, pytest.raises(ValueError, match="are to be written")), (nbytes, nullcontext())):
        with monkeypatch.context() as patch, error:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: full._replace(free=free))
            convert(tiny, tmp_path / "new", "hf")
    shutil.rmtree(tmp_path / "new")
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for to in ("hf", "meta"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # which Python sees as an error of the write
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                convert(tiny, tmp_path / "new", to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert list(tmp_path.iterdir()) == []


def test_what_went_wrong_is_told_whatever_follows(tmp_path: Path) -> None:
    """Though the folder is gone that is to be removed."""

    def fail(folder: Path) -> None:
        folder.rmdir()
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"), _new_folder(tmp_path / "new", 0) as folder:
        fail(folder)


SLOW = """
import sys, time
from pathlib import Path
from llama.commands import convert
from llama.weights import writers
write = writers.Entry.write
def slow(self, file):
    print(self.name, flush=True)
    time.sleep(0.05)
    write(self, file)
writers.Entry.write = slow
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_killed_run_leaves_nothing_whole(to: str, tiny: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tiny), str(tmp_path / "new"), to], stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.communicate()
    assert not (tmp_path / "new").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".new.partial-")
    with pytest.raises(ValueError, match="missing|cannot be read"):
        open_checkpoint(left)


def test_the_checklist(tiny: Path, tmp_path: Path, tokenizer_path: str) -> None:
    convert(tiny, tmp_path / "new", "meta", 2, tokenizer_path=Path(tokenizer_path))
    if shutil.which("md5sum") is None:
        pytest.skip("needs md5sum")
    result = subprocess.run(
        ["md5sum", "-c", "checklist.chk"], cwd=tmp_path / "new", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        f"{name}: OK" for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model")
    ]


PEAK = """
import resource, sys
from pathlib import Path
from llama.commands.convert import convert
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1000
before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.parametrize(("to", "shards"), [("hf", 1), ("meta", 2)])
def test_only_a_few_tensors_are_in_memory(to: str, shards: int, tmp_path: Path) -> None:
    """A 92 MB model whose largest tensor has 6.6 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    params = {"dim": 512, "n_layers": 8, "n_heads": 8, "multiple_of": 32}
    weights = random_weights(params, 3200)
    total = sum(weight.nbytes for weight in weights.values()) / 1e6
    source = write_checkpoint(tmp_path / "a", weights, params=params)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(tmp_path / "b"), to, str(shards)],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert total > 90
    assert float(result.stdout) < 45


def test_the_command(tiny: Path, tmp_path: Path, tokenizer_path: str) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "llama", *args]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

    hf = str(tmp_path / "hf")
    result = run("convert", str(tiny), hf, "--to", "hf", "--dtype", "bfloat16", "--tokenizer_path", tokenizer_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{hf} is written\n", "")
    result = run("convert", str(tiny), hf, "--to", "hf")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"llama: {hf} exists, and nothing is written over; name another folder, or remove it\n"
    result = run("info", hf, "--processes", "2", "--dtype", "float32", "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    for part in (
        "Hugging Face format, 1 file of weights",
        "2 layers of width 64, 8 heads of 8, 4 key/value heads, feed-forward 192, 400 ids, rotary base 10000",
        f"parameters  {sum(w.numel() for w in random_weights().values()):,} in bfloat16",
        f"tokenizer   {hf}/tokenizer.model: 400 pieces, BOS 1, EOS 2",
        "processes   1, 2, 4, 8",
        "2 processes, max_batch_size=4, max_seq_len=2048, dtype=float32; on each process:",
        " on cpu: it fits",
    ):
        assert part in result.stdout, part
    result = run("info", str(tmp_path))
    assert result.returncode == 1
    assert "params.json is missing" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_only_a_hugging_face_folder_misses_its_tokenizer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = f"no tokenizer.model in {tiny} or above it: copy one into {tmp_path / 'hf'}, or pass --tokenizer_path\n"
    for to, told in (("meta", ""), ("hf", advice)):
        cli.run(["convert", str(tiny), str(tmp_path / to), "--to", to])
        assert capsys.readouterr() == (f"{tmp_path / to} is written\n", told)
