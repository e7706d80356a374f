"""Hugging Face folders: against transformers on the same files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, TWINS, write_twin
from safetensors.torch import load_file, save_file
from workers import Pool

from llama import Llama
from llama.weights.checkpoint import open_checkpoint
from llama.weights.huggingface import read_config


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("twins")
    twins = {name: write_twin(root / name, change) for name, change in TWINS.items()}
    for folder in twins.values():
        shutil.copy(tokenizer_path, folder)
    return twins


def logits(folder: str, tokens: list[list[int]], processes: int) -> torch.Tensor:
    llama = Llama.build(folder, None, 64, 4, processes, device="cpu")
    with torch.inference_mode():
        return llama.model(torch.tensor(tokens), 0)


@pytest.mark.parametrize("name", TWINS)
def test_logits_are_those_of_transformers(name: str, twins: dict[str, Path], pool: Pool) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = transformers.LlamaForCausalLM.from_pretrained(twins[name])(tokens).logits
    for processes in (1, 2, 4):
        for ours in pool.run(logits, str(twins[name]), tokens.tolist(), processes):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_and_dtypes(dtype: torch.dtype, tmp_path: Path, tokenizer_path: str) -> None:
    """An index with several parts; the stored dtype is kept where it is asked for (on x86 float16 is not computed in
    else)."""
    folder = write_twin(tmp_path / "hf", {}, dtype, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    llama = Llama.build(str(folder), tokenizer_path, 16, 1, device="cpu", dtype=dtype)
    assert {p.dtype for p in llama.model.parameters()} == {dtype}
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored.update(load_file(path))
    assert torch.equal(llama.model.layers[1].feed_forward.w2.weight, stored["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(llama.model.output.weight, stored["lm_head.weight"])


def test_slices_of_rotated_rows(twins: dict[str, Path]) -> None:
    """Any rows may be asked for, also a part of a head."""
    checkpoint = open_checkpoint(twins["wide"])
    name = "layers.0.attention.wk.weight"
    full = checkpoint.read(name, 0, 0, 96)
    for start, stop in [(0, 24), (24, 96), (5, 7), (20, 50), (95, 96)]:
        assert torch.equal(checkpoint.read(name, 0, start, stop), full[start:stop])


def test_whole_tensors_stay_in_the_file(twins: dict[str, Path]) -> None:
    llama = Llama.build(str(twins["code"]), None, 16, 1, device="cpu")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(twins["code"]) in line]
    for name, weight in llama.model.state_dict().items():
        mapped = any(int(low, 16) <= weight.data_ptr() < int(high, 16) for low, high in ranges)
        assert mapped != name.endswith(("wq.weight", "wk.weight")), name


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 1e6}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_scaling": {"rope_theta": 5e5, "type": "default"}}, 5e5),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}}, 1e6),
    ],
)
def test_where_rope_theta_may_stand(change: dict[str, Any], theta: float, tmp_path: Path) -> None:
    write_config(tmp_path, change)
    assert read_config(tmp_path)[0].rope_theta == theta


CONFIG = {**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def write_config(folder: Path, change: dict[str, Any]) -> None:
    config = {key: value for key, value in {**CONFIG, **change}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


NEEDED = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "its architecture is .*Mistral"),
        ({"model_type": "absent"}, "its architecture is"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "positions are scaled .'llama3'."),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2}},
            "positions are scaled .'longrope'., which is not computed",
        ),
        ({"rope_scaling": 3}, "positions are scaled .3."),
        ({"rope_parameters": {"rope_type": "yarn"}}, "positions are scaled .'yarn'."),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a part .0.5. of each head"),
        ({"attention_bias": True}, "attention_bias=True, but biases"),
        ({"mlp_bias": True}, "mlp_bias=True, but biases"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', but only 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .'gptq'."),
        ({"tie_word_embeddings": "yes"}, "neither true nor false"),
        ({"vocab_size": 128256}, "this is a Llama 3 model"),
        (
            dict.fromkeys(NEEDED, "absent"),
            "; ".join(f"missing key '{key}'" for key in NEEDED),
        ),
        (
            dict.fromkeys(["num_key_value_heads", "rms_norm_eps", "head_dim"], 0),
            "num_key_value_heads=0 is not a whole number from 1 to 65536; rms_norm_eps=0 is not a number from 1e-12 to "
            "1; head_dim=0 is not a whole number from 2 to 65536",
        ),
        ({"hidden_size": None}, "hidden_size=None is not a whole number"),
        ({"hidden_size": "64"}, "hidden_size='64' is not"),
        ({"hidden_size": -64}, "hidden_size=-64 is not"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not"),
        ({"num_hidden_layers": 10**40}, "num_hidden_layers=10+ is not"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 is not"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf is not"),
        ({"rope_theta": "big"}, "rope_theta='big' is not"),
        ({"head_dim": [8]}, r"head_dim=\[8\] is not"),
    ],
)
def test_what_is_not_computed(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    write_config(
        tmp_path, {"attention_bias": True, "hidden_act": "relu", "hidden_size": 0, "rope_scaling": {"type": "dynamic"}}
    )
    with pytest.raises(ValueError, match="hidden_size=0.*scaled.*attention_bias.*hidden_act"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "layers.2.attention.wq.weight is missing"),
        ({"num_hidden_layers": 1}, "layers.1.attention.wq.weight is unexpected"),
        ({"intermediate_size": 176}, r"layers.0.feed_forward.w1.weight has shape \[168, 64\] instead of \[176, 64\]"),
        ({"hidden_size": 2**20, "num_attention_heads": 1, "num_key_value_heads": 1}, "has shape"),
        ({"num_attention_heads": 7}, r"dim \(64\) must be n_heads \(7\)"),
        ({"vocab_size": 300}, "config.json says vocab_size=300, but model.embed_tokens.weight has 400 rows"),
    ],
)
def test_a_config_of_another_model(
    change: dict[str, Any], message: str, twins: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(twins["code"], tmp_path / "hf")
    write_config(folder, change)
    with pytest.raises(ValueError, match=message):
        Llama.build(str(folder), None, 16, 1, device="cpu")


def rewrite(folder: Path, change: Any) -> Path:
    """Change the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_do_not_fit(twins: dict[str, Path], tmp_path: Path) -> None:
    def check(name: str, change: Any, message: str) -> None:
        folder = rewrite(shutil.copytree(twins["code"], tmp_path / name), change)
        with pytest.raises(ValueError, match=message):
            Llama.build(str(folder), None, 16, 1, device="cpu")

    check(
        "int",
        lambda t: {**t, "model.norm.weight": torch.zeros(64, dtype=torch.int32)},
        "model.norm.weight .* stored as I32, which",
    )
    check("lora", lambda t: {**t, "lora.weight": torch.zeros(3)}, "'lora.weight' is unexpected")
    # Meta's names in such a file would be read with the rows in the wrong order.
    check("names", lambda t: {**t, "norm.weight": torch.zeros(64)}, "'norm.weight' is unexpected")
    check(
        "bias", lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "q_proj.bias' is unexpected"
    )
    check("empty", lambda t: {"a": torch.zeros(1)}, "has no model.embed_tokens.weight")
    for rows in (399, 401):
        other = torch.zeros(rows, 64)
        check(
            f"rows{rows}",
            lambda t, x=other: {**t, "lm_head.weight": x},
            f"vocab_size=400, but lm_head.weight has {rows} rows",
        )
    # What does no harm: tables of positions, and an output matrix that is tied anyway.
    harmless = rewrite(
        shutil.copytree(twins["tied"], tmp_path / "harmless"),
        lambda t: {
            **t,
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
            "lm_head.weight": t["model.embed_tokens.weight"].clone(),
        },
    )
    model = Llama.build(str(harmless), None, 16, 1, device="cpu").model
    assert torch.equal(model.output.weight, model.tok_embeddings.weight)
    assert open_checkpoint(harmless).tied


def test_an_output_matrix_of_its_own_counts(twins: dict[str, Path], tmp_path: Path) -> None:
    """config.json says that the two are one, and both are stored, with other numbers: as transformers 5 takes it."""
    folder = shutil.copytree(twins["tied"], tmp_path / "hf")
    rewrite(folder, lambda t: {**t, "lm_head.weight": torch.ones(400, 64)})
    with pytest.warns(UserWarning, match="another lm_head.weight is stored, which is used") as told:
        assert (Llama.build(str(folder), None, 16, 1, device="cpu").model.output.weight == 1).all()
    assert [warning.filename for warning in told] == [__file__]


def pickled(folder: Path, files: int = 1) -> Path:
    """The folder with its safetensors as files of torch.save."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    where = {name: f"pytorch_model-{i % files + 1:05d}-of-{files:05d}.bin" for i, name in enumerate(tensors)}
    for part in set(where.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if where[name] == part}, folder / part)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("files", [1, 3])
def test_pickled_weights(files: int, twins: dict[str, Path], tmp_path: Path, pool: Pool) -> None:
    folder = pickled(shutil.copytree(twins["code"], tmp_path / "hf"), files)
    before, after = (Llama.build(str(path), None, 16, 1, device="cpu").model for path in (twins["code"], folder))
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    tokens = [[1, 5, 6]]
    for ours in pool.run(logits, str(folder), tokens, 2):
        torch.testing.assert_close(ours, before(torch.tensor(tokens), 0), atol=1e-4, rtol=0)


def test_pickles_that_hold_more_than_tensors(twins: dict[str, Path], tmp_path: Path) -> None:
    folder = pickled(shutil.copytree(twins["code"], tmp_path / "hf"))
    torch.save({"model.norm.weight": torch.zeros(64), "x": Path("a")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds something other than tensors, which could run code"):
        open_checkpoint(folder)
    torch.save({"model.embed_tokens.weight": torch.zeros(400, 64, dtype=torch.float64)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.embed_tokens.weight in .* is stored as torch.float64, which is not"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "config.json"])
def test_pointers_of_git_lfs(name: str, twins: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(twins["code"], tmp_path / "hf")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n")
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS, and not the file itself"):
        Llama.build(str(folder), None, 16, 1, device="cpu")


@pytest.mark.parametrize("stray", ["params.json", "consolidated.00.pth"])
def test_one_of_metas_files_alone_is_a_stray(stray: str, twins: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(twins["code"], tmp_path / "hf")
    (folder / stray).write_text("{}")
    assert open_checkpoint(folder).format == "Hugging Face"


def test_folders_without_weights(twins: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is missing.*adapter alone"):
        open_checkpoint(folder)
    write_config(folder, {})
    with pytest.raises(
        ValueError, match="neither model.safetensors nor pytorch_model.bin, .*; it holds an adapter alone, which is"
    ):
        open_checkpoint(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(
        ValueError, match="nor an index of several such files; it holds config.json, pytorch_model-00001"
    ):
        open_checkpoint(folder)
    shutil.copy(twins["code"] / "model.safetensors", folder)
    with pytest.raises(ValueError, match="no tokenizer.model or tokenizer.json in .*; pass tokenizer_path"):
        Llama.build(str(folder), None, 16, 1, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: {}, "has no weight_map"),
        (lambda index: {"weight_map": []}, "has no weight_map"),
        (lambda index: {"weight_map": {"model.norm.weight": 3}}, "has no weight_map"),
        (lambda index: repoint(index, "../hf/part.safetensors"), "points to '../hf/part.safetensors', which is not"),
        (lambda index: repoint(index, "/etc/passwd"), "points to '/etc/passwd', which is not"),
        (lambda index: repoint(index, "..\\part.safetensors"), "points to .*, which is not"),
        (lambda index: repoint(index, "C:part.safetensors"), "points to .*, which is not"),
        (lambda index: repoint(index, "a\0.safetensors"), "points to .*, which is not"),
        (lambda index: repoint(index, "gone.safetensors"), "points to gone.safetensors, which is missing"),
        (lambda index: repoint(index, "model-00001-of"), "points to 'model-00001-of', which is not"),
        (
            lambda index: repoint(index, index["weight_map"]["model.embed_tokens.weight"]),
            "has no model.norm.weight",
        ),
    ],
)
def test_an_index_that_misleads(change: Any, message: str, parted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(parted, tmp_path / "hf")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index)))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("parted") / "hf", {}, max_shard_size="100KB")


def repoint(index: dict[str, Any], part: str) -> dict[str, Any]:
    return {"weight_map": {**index["weight_map"], "model.norm.weight": part}}


def test_a_tensor_that_the_index_does_not_name(parted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(parted, tmp_path / "hf")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    assert open_checkpoint(folder).dtypes.keys() == open_checkpoint(parted).dtypes.keys()


def test_a_part_is_missing_or_there_twice(parted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(parted, tmp_path / "hf")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="has no model.layers.0.* which the index beside it names"):
        open_checkpoint(folder)
    second.unlink()
    with pytest.raises(ValueError, match="which is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON: it is nested too deep"),
        ("[1]", "holds a list"),
        ("3", "holds a int"),
        ("{}", "missing key|has no weight_map"),
        ("\xff\xfe", "is not JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "is not JSON"),
        (" " * (2**26 + 1), "has 67108865 bytes"),
    ],
)
def test_json_that_is_none(name: str, text: str, message: str, parted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(parted, tmp_path / "hf")
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)
