"""Any count of shards onto any count of processes, and what a folder must not be."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import META_SHARD_DIMS, PARAMS, random_weights, write_checkpoint
from workers import Pool

from llama import Llama
from llama.weights.meta import MetaCheckpoint


def build(folder: Path, tokenizer_path: str, **options: Any) -> Llama:
    return Llama.build(str(folder), tokenizer_path, 16, 1, device="cpu", **options)


def local_weights(folder: str, tokenizer_path: str, processes: int) -> dict[str, torch.Tensor]:
    llama = Llama.build(folder, tokenizer_path, 16, 1, processes, device="cpu")
    return {name: weight.clone() for name, weight in llama.model.state_dict().items()}


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_any_shards_on_any_processes(
    shards: int, processes: int, pool: Pool, tmp_path: Path, tokenizer_path: str
) -> None:
    weights = random_weights()
    folder = write_checkpoint(tmp_path, weights, shards)
    for rank, local in enumerate(pool.run(local_weights, str(folder), tokenizer_path, processes)):
        assert local.keys() == weights.keys()
        for name, weight in weights.items():
            dim = META_SHARD_DIMS[name.split(".")[-2]]
            expected = weight if dim is None else weight.chunk(processes, dim)[rank % processes]
            assert torch.equal(local[name], expected), name


def test_eight_shards_on_one_process(tmp_path: Path, tokenizer_path: str) -> None:
    """As Meta's 70B has them, with a vocabulary and heads that eight divide."""
    params = {**PARAMS, "n_kv_heads": 8}
    weights = random_weights(params)
    llama = build(write_checkpoint(tmp_path, weights, 8, params), tokenizer_path)
    assert all(torch.equal(weight, weights[name]) for name, weight in llama.model.state_dict().items())


def test_a_slice_is_read_from_the_shards_that_hold_it(tmp_path: Path) -> None:
    weights = random_weights()
    checkpoint = MetaCheckpoint(write_checkpoint(tmp_path, weights, 4))
    name = "layers.0.feed_forward.w1.weight"
    full = weights[name]
    assert checkpoint.shape(name, 0) == list(full.shape)
    n = len(full)
    for start, stop in [(0, n), (n // 2, n), (1, 2), (n // 4 - 1, n // 4 + 1), (n // 8, n // 4)]:
        assert torch.equal(checkpoint.read(name, 0, start, stop), full[start:stop])


def test_whole_tensors_stay_in_the_file(tiny: Path, tokenizer_path: str) -> None:
    """Nothing is copied where nothing needs to be: the weights are the mapped file."""
    llama = build(tiny, tokenizer_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(tiny) in line]
    for name, weight in llama.model.state_dict().items():
        assert any(int(low, 16) <= weight.data_ptr() < int(high, 16) for low, high in ranges), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_stored_dtype_is_kept(
    stored: torch.dtype, tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or, of a float16 checkpoint on an x86 processor, asked for, which a line says."""
    folder = write_checkpoint(tmp_path, {name: weight.to(stored) for name, weight in random_weights().items()})
    llama = build(folder, tokenizer_path)
    if stored == torch.float16 and platform.machine() == "x86_64":
        assert {p.dtype for p in llama.model.parameters()} == {torch.bfloat16}
        assert (
            "is float16, which is slow on cpu; running in bfloat16. Pass dtype='float16' to keep it"
            in capsys.readouterr().out
        )
        llama = build(folder, tokenizer_path, dtype="float16")
    assert "slow on" not in capsys.readouterr().out
    assert {p.dtype for p in llama.model.parameters()} == {stored}
    assert llama.model.layers[0].attention.cache_k.dtype == stored
    assert {p.dtype for p in build(folder, tokenizer_path, dtype=torch.float32).model.parameters()} == {torch.float32}


def test_paths(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert build(Path(tiny.name), os.path.relpath(tokenizer_path)).model.n_layers == 2
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert Llama.build(f"~/{tiny.name}", tokenizer_path, 16, 1, device="cpu").model.n_layers == 2


# What bad input gets


def refuse(folder: Path, tokenizer_path: str, message: str, good: Path) -> None:
    """A ValueError before any work, after which a right call works."""
    with pytest.raises(ValueError, match=message):
        build(folder, tokenizer_path)
    assert build(good, tokenizer_path)


def test_missing_folders_and_files(tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    refuse(tmp_path / "nowhere", tokenizer_path, "no checkpoint folder at .*nowhere", tiny)
    refuse(tmp_path, tokenizer_path, "params.json is missing.*holds nothing", tiny)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    refuse(tmp_path, tokenizer_path, "no checkpoint files found in .*holds params.json", tiny)
    with pytest.raises(ValueError, match="no tokenizer at .*; pass the path"):
        build(tiny, str(tmp_path / "tokenizer.model"))


def test_shards_missing_from_the_sequence(tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    folder = write_checkpoint(tmp_path, random_weights(), 4)
    (folder / "consolidated.01.pth").unlink()
    refuse(folder, tokenizer_path, "but not consolidated.01.pth; download it again", tiny)
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.03.pth").unlink()
    refuse(
        folder,
        tokenizer_path,
        r"are 3 more shards missing\?: .*tok_embeddings.weight has shape \[400, 16\] instead of \[400, 64\]",
        tiny,
    )


def test_shards_of_different_models(tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", random_weights(), 2)
    other = write_checkpoint(tmp_path / "b", random_weights(seed=1), 2)
    (other / "consolidated.01.pth").rename(folder / "consolidated.01.pth")
    refuse(folder, tokenizer_path, "different .*norm.weight; they are not shards of one model", tiny)
    wide = write_checkpoint(tmp_path / "c", random_weights({**PARAMS, "dim": 128}), 2, {**PARAMS, "dim": 128})
    (wide / "consolidated.01.pth").rename(folder / "consolidated.01.pth")
    refuse(folder, tokenizer_path, "disagree about .*; they are not shards of one model", tiny)


def test_other_pth_files_are_no_shards(tiny: Path, tmp_path: Path, tokenizer_path: str) -> None:
    folder = write_checkpoint(tmp_path, random_weights())
    torch.save({}, folder / "optimizer.pth")
    assert build(folder, tokenizer_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_scaled_rope": True, "dimm": 3}, "unknown key 'use_scaled_rope', unknown key 'dimm'"),
        ({"dim": None}, "dim=None is not a whole number"),
        ({"dim": "64"}, "dim='64' is not a whole number from 1"),
        ({"n_heads": 0}, "n_heads=0 is not"),
        ({"n_layers": -2}, "n_layers=-2 is not"),
        ({"n_layers": 10**30}, "n_layers=1000000000000000000000000000000 is not"),
        ({"norm_eps": float("nan")}, "norm_eps=nan is not a number"),
        ({"n_heads": True}, "n_heads=True is not"),
        ({"vocab_size": 0}, "says vocab_size=0, but the tokenizer has 400 pieces"),
        ({"vocab_size": 500}, "says vocab_size=500, but the tokenizer has 400 pieces"),
        ({"n_heads": 7}, r"dim \(64\) must be n_heads \(7\)"),
        ({"n_layers": 3}, "layers.2.attention.wq.weight is missing"),
        ({"n_layers": 1}, "layers.1.attention.wq.weight is unexpected"),
        ({"multiple_of": 64}, r"layers.0.feed_forward.w1.weight has shape \[192, 64\] instead of"),
        ({"multiple_of": 128}, r"layers.0.feed_forward.w1.weight has shape \[192, 64\] instead of \[256, 64\]"),
    ],
)
def test_bad_params(change: dict[str, Any], message: str, tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    folder = write_checkpoint(tmp_path, random_weights())
    (folder / "params.json").write_text(json.dumps({**PARAMS, **change}))
    if change == {"multiple_of": 64}:
        assert build(folder, tokenizer_path)  # 192 is a multiple of 64 as well
        return
    refuse(folder, tokenizer_path, message, tiny)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON: it is nested too deep"),
        ("[1]", "holds a list"),
        ("{}", "missing key 'dim', missing key 'n_layers', missing key 'n_heads'"),
        ("\xff\xfe", "is not JSON"),
        (" " * 2**21, "has 2097152 bytes"),
    ],
)
def test_params_that_are_none(text: str, message: str, tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    folder = write_checkpoint(tmp_path, random_weights())
    (folder / "params.json").write_bytes(text.encode("latin-1"))
    refuse(folder, tokenizer_path, message, tiny)


def test_all_wrong_weights_are_listed(tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    weights = random_weights()
    del weights["layers.0.attention.wv.weight"]
    weights["layers.1.attention.wo.weight"] = torch.zeros(3, 3)
    weights["output.weight"] = weights["output.weight"][:, :-1]
    folder = write_checkpoint(tmp_path, weights)
    stored = torch.load(folder / "consolidated.00.pth")
    torch.save({**stored, "extra.norm.weight": torch.zeros(3)}, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="not those that its params.json and tokenizer describe") as caught:
        build(folder, tokenizer_path)
    for part in (
        "layers.0.attention.wv.weight is missing",
        "extra.norm.weight is unexpected",
        "layers.1.attention.wo.weight has shape [3, 3] instead of [64, 64]",
        "output.weight has shape [400, 63] instead of [400, 64]",
    ):
        assert part in str(caught.value)
    narrow = write_checkpoint(tmp_path / "narrow", {**random_weights(), "tok_embeddings.weight": torch.zeros(400, 0)})
    refuse(narrow, tokenizer_path, r": tok_embeddings.weight has shape \[400, 0\]", tiny)  # a division by zero


def test_a_hugging_face_checkpoint_is_recognised_as_foreign(tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    """Meta's code loads such a file silently, and runs on whatever the memory held."""
    folder = write_checkpoint(tmp_path, random_weights())
    torch.save({"model.embed_tokens.weight": torch.zeros(400, 64)}, folder / "consolidated.00.pth")
    refuse(folder, tokenizer_path, "has no tok_embeddings.weight, but model.embed_tokens.weight", tiny)


def test_a_tokenizer_of_another_vocabulary(tmp_path: Path, tokenizer_path: str) -> None:
    folder = write_checkpoint(tmp_path, random_weights(vocab_size=512))
    with pytest.raises(ValueError, match="the tokenizer has 400 pieces and the weights are for 512"):
        build(folder, tokenizer_path)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.float64, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_in_other_forms(dtype: torch.dtype, tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    """One int8 matrix was once cast to float silently, its scales unknown: garbage."""
    weights = random_weights()
    weights["layers.1.attention.wq.weight"] = weights["layers.1.attention.wq.weight"].to(dtype)
    folder = write_checkpoint(tmp_path, weights)
    refuse(folder, tokenizer_path, f"wq.weight is {dtype}.*use float32 or bfloat16 or float16", tiny)


def test_damaged_files(tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    folder = write_checkpoint(tmp_path, random_weights())
    path = folder / "consolidated.00.pth"
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refuse(folder, tokenizer_path, "consolidated.00.pth cannot be read: it is cut short", tiny)
    torch.save(random_weights(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is in the format of torch before 1.6, which cannot be mapped") as caught:
        build(folder, tokenizer_path)
    exec(str(caught.value).partition("save it again: ")[2])  # the way out that it tells
    build(folder, tokenizer_path)
    torch.save([1, 2], path)
    refuse(folder, tokenizer_path, "is not a flat dictionary of tensors", tiny)
    torch.save({"model": random_weights()}, path)
    refuse(folder, tokenizer_path, "is not a flat dictionary of tensors", tiny)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil-was-here",)


def test_a_checkpoint_that_would_run_code(
    tmp_path: Path, tokenizer_path: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path, random_weights())
    torch.save({**random_weights(), "evil": Evil()}, folder / "consolidated.00.pth")
    refuse(folder, tokenizer_path, "something other than tensors, which could run code", tiny)
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(Evil()))
    refuse(folder, tokenizer_path, "cannot be read", tiny)
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(
    "limits", [{"max_seq_len": 0}, {"max_batch_size": -1}, {"max_seq_len": 2.5}, {"max_batch_size": None}]
)
def test_bad_limits(limits: dict[str, Any], tiny: Path, tokenizer_path: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number of 1 or more"):
        Llama.build(str(tiny), tokenizer_path, **limits)


def one_rank_finds_a_bad_file(folders: list[str], tokenizer_path: str) -> None:
    build(Path(folders[torch.distributed.get_rank()]), tokenizer_path)


def three_processes(folder: str, tokenizer_path: str) -> None:
    Llama.build(folder, tokenizer_path, 16, 1, 3)


def test_every_rank_fails_alike(tiny: Path, tmp_path: Path, tokenizer_path: str, pool: Pool) -> None:
    """A file that only one node lacks: the other ranks used to wait for it for ever."""
    folders = [str(tiny), str(tiny), str(tmp_path), str(tiny)]
    for _, error in pool.try_run(one_rank_finds_a_bad_file, folders, tokenizer_path):
        assert "params.json is missing" in error
        assert "(on process 2)" in error
    for _, error in pool.try_run(three_processes, str(tiny), tokenizer_path):
        assert "model_parallel_size=3 does not fit 4 processes" in error
    pool.run(local_weights, str(tiny), tokenizer_path, 4)


def test_heads_that_the_processes_cannot_share(tmp_path: Path, tokenizer_path: str, pool: Pool) -> None:
    params = {**PARAMS, "n_heads": 6, "n_kv_heads": 2, "dim": 96}
    folder = write_checkpoint(tmp_path, random_weights(params), 1, params)
    for _, error in pool.try_run(local_weights, str(folder), tokenizer_path, 4):
        assert "6 query heads, 2 key/value heads" in error
        assert "cannot be shared by 4 processes; use 1 or 2" in error  # 3 and 6 do not divide the vocabulary


def gradient(folder: str, tokenizer_path: str) -> None:
    model = Llama.build(folder, tokenizer_path, 16, 1, 4, device="cpu").model.requires_grad_(True)
    model(torch.tensor([[1, 5]]), 0)


def test_more_processes_than_key_value_heads(tmp_path: Path, tokenizer_path: str, pool: Pool) -> None:
    """2 heads on 4 ranks lie 0 0 1 1: rank 1's query heads belong to head 0. From one shard and from two."""
    params = {**PARAMS, "n_kv_heads": 2}
    weights = random_weights(params)
    for shards in (1, 2):
        folder = write_checkpoint(tmp_path / str(shards), weights, shards, params)
        for rank, local in enumerate(pool.run(local_weights, str(folder), tokenizer_path, 4)):
            for name in ("layers.0.attention.wk.weight", "layers.1.attention.wv.weight"):
                assert torch.equal(local[name], weights[name].chunk(2)[rank // 2]), name
            assert torch.equal(
                local["layers.0.attention.wq.weight"], weights["layers.0.attention.wq.weight"].chunk(4)[rank]
            )
    for _, error in pool.try_run(gradient, str(folder), tokenizer_path):
        assert "no gradients where 2 processes have the same heads" in error


def test_a_shard_copied_over_another(tmp_path: Path, tokenizer_path: str, tiny: Path) -> None:
    """All names and shapes are right, and half of every matrix is wrong."""
    folder = write_checkpoint(tmp_path, random_weights(), 4)
    shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.03.pth")
    refuse(folder, tokenizer_path, "consolidated.01.pth and consolidated.03.pth in .* are the same shard", tiny)


@pytest.mark.parametrize("params", [{"vocab_size": 128256, "rope_theta": 5e5}, {"use_scaled_rope": True}])
def test_llama_3_is_refused_by_name(params: dict[str, Any], tmp_path: Path, tokenizer_path: str) -> None:
    folder = write_checkpoint(tmp_path, random_weights())
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama 3's is a list of base64
    with pytest.raises(ValueError, match="this is a Llama 3 model, with another tokenizer"):
        Llama.build(str(folder), None, 16, 1, device="cpu")


def test_a_code_llama_folder(tmp_path: Path, tokenizer_path: str) -> None:
    """Its rotary base stands in params.json, its tokenizer has more pieces; and the base matters."""
    weights = random_weights()
    params = {**PARAMS, "rope_theta": 1e6, "ffn_dim_multiplier": 1.0}
    models = [
        build(write_checkpoint(tmp_path / str(i), weights, 1, p), tokenizer_path).model
        for i, p in enumerate((params, PARAMS))
    ]
    assert models[0].params.rope_theta == 1e6
    code, plain = (model(torch.tensor([[1, 2, 3, 4, 5, 6]]), 0) for model in models)
    assert not torch.allclose(code, plain)
