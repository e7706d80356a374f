"""GGUF files: against the gguf package and llama.cpp on the same files, and what is refused."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import gguf
import mutate
import numpy as np
import pytest
import torch
from conftest import PARAMS, TEXT, random_weights, shared, write_checkpoint
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from helpers import command
from safetensors.torch import load_file
from workers import Pool

from llama import Llama, ModelArgs, Tokenizer
from llama.commands.convert import convert
from llama.gguf_tokenizer import vocabulary_metadata
from llama.loading import DEMO
from llama.tokenizer_files import open_tokenizer
from llama.weights import writers
from llama.weights.checkpoint import open_checkpoint
from llama.weights.gguf import describe, metas_names, to_q8_0
from llama.weights.gguf_rope import read_table
from llama.weights.rope import read_rope

WIDE: dict[str, Any] = {"dim": 256, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 256, "norm_eps": 1e-5}
PLAIN = ["F32", "F16", "BF16"]
ROUNDED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
# What the package cannot make: where a block has its float16 scales, and scales that give numbers like a model's.
MADE_UP = {
    "Q2_K": (80, (0.002, 0.003)), "Q3_K": (108, (5e-4,)), "Q4_K": (0, (1e-4, 8e-4)), "Q5_K": (0, (5e-5, 8e-4)),
    "Q6_K": (208, (2e-5,)),
}  # fmt: skip


NEEDED = [
    f"llama.{key}"
    for key in ("embedding_length", "block_count", "attention.head_count", "feed_forward_length",
                "attention.layer_norm_rms_epsilon")
]  # fmt: skip


def blocks_of(weight: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    """A weight as the package stores it; for kinds that it cannot make, any numbers of that shape."""
    if weight.ndim == 1:
        return weight.numpy()
    of = GGMLQuantizationType[kind]
    if kind not in MADE_UP:
        return quantize(weight.numpy(), of)
    place, scales = MADE_UP[kind]
    rows, block = len(weight), gguf.GGML_QUANT_SIZES[of][1]
    data = np.random.default_rng(weight.numel()).integers(0, 256, (rows, weight.shape[1] // 256, block), np.uint8)
    data[..., place : place + 2 * len(scales)] = np.frombuffer(np.array(scales, np.float16).tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write(
    path: Path,
    tokenizer: Tokenizer,
    params: dict[str, Any] = PARAMS,
    kind: str = "F32",
    leave_out: str = "",
    rows: int = 400,
    **told: Any,
) -> dict[str, torch.Tensor]:
    """A model that the package writes. told: metadata that change, with __ in place of dots, or are left out (None).
    Returns its weights as the package reads them, under Meta's names."""
    args = ModelArgs(**params, vocab_size=tokenizer.n_words)
    writer = GGUFWriter(path, "llama")
    metadata = describe(args, 64) | vocabulary_metadata(tokenizer)
    metadata |= {key.replace("__", "."): value for key, value in told.items()}
    writer.kv_data[0]["general.architecture"].value = metadata.pop("general.architecture")
    add: dict[type, Callable[..., None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](key, value)
    weights = random_weights(params, rows)
    stored = {}
    for theirs, name in metas_names(args.n_layers).items():
        if theirs != leave_out:
            data, of = blocks_of(weights[name], kind), GGMLQuantizationType["F32" if weights[name].ndim == 1 else kind]
            writer.add_tensor(theirs, data, raw_dtype=of)
            stored[name] = torch.from_numpy(dequantize(data, of).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def logits(
    path: str, tokens: list[list[int]], processes: int = 1, tokenizer_path: Any = None, **options: Any
) -> torch.Tensor:
    llama = Llama.build(path, tokenizer_path, 64, 4, processes, device="cpu", dtype="float32", **options)
    with torch.inference_mode():
        return llama.model(torch.tensor(tokens), 0)


TOKENS = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("kind", [*PLAIN, *ROUNDED, *MADE_UP])
def test_each_kind_is_read_to_the_bit(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whole, by rows, and by columns, which need not be whole blocks."""
    expected = write(tmp_path / "a.gguf", tokenizer, WIDE, kind)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.dtypes.keys() == expected.keys()
    quantized = kind not in PLAIN
    stored = torch.float16 if quantized else {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    assert checkpoint.dtype == checkpoint.dtypes["layers.0.attention.wq.weight"] == stored
    assert checkpoint.dtypes["norm.weight"] == torch.float32
    for name, weight in expected.items():
        if weight.ndim == 1:
            assert torch.equal(checkpoint.read(name, None, 0, 0), weight)
            continue
        read = checkpoint.read(name, 0, 0, len(weight))
        assert read.dtype == (torch.float32 if quantized else stored)
        assert torch.equal(read.float(), weight)
        for start, stop in [(0, 1), (5, 127), (len(weight) - 3, len(weight))]:
            assert torch.equal(checkpoint.read(name, 0, start, stop).float(), weight[start:stop])
        for start, stop in [(0, 128), (100, 101), (31, 33), (128, 256)]:
            (part,) = checkpoint.parts(name, 1, start, stop)
            assert torch.equal(part.float(), weight[:, start:stop])


def test_long_matrices_are_dequantized_some_rows_at_a_time(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(tmp_path / "a.gguf", tokenizer, WIDE, "Q4_1")
    monkeypatch.setattr("llama.weights.gguf.COPY_BYTES", 7 * 4 * 256)
    assert torch.equal(
        open_checkpoint(tmp_path / "a.gguf").read("output.weight", 0, 10, 399), expected["output.weight"][10:399]
    )


def test_tensors_that_are_not_quantized_stay_in_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer, PARAMS, "F16")
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    weight = checkpoint.read("layers.0.feed_forward.w1.weight", 0, 3, 9)
    assert any(low <= weight.data_ptr() < high for low, high, *_ in checkpoint.mapped.ranges)


@pytest.mark.parametrize("kind", ["F16", "Q4_K"])
def test_models_on_any_processes(
    kind: str, tokenizer: Tokenizer, tokenizer_path: str, pool: Pool, tmp_path: Path
) -> None:
    """The same as the weights that the package reads, in Meta's format; rounded to int8 and int4 too."""
    weights = write(tmp_path / "a.gguf", tokenizer, WIDE, kind)
    folder = write_checkpoint(tmp_path / "meta", weights, params=WIDE)
    expected = logits(str(folder), TOKENS, tokenizer_path=tokenizer_path)
    for ours in pool.run(logits, str(tmp_path / "a.gguf"), TOKENS, 2):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    for form in ("int8", "int4"):
        rounded = logits(str(tmp_path / "a.gguf"), TOKENS, quantize=form)
        assert torch.equal(rounded, logits(str(folder), TOKENS, tokenizer_path=tokenizer_path, quantize=form))


def test_processes_compare_their_files(tokenizer: Tokenizer, tmp_path: Path, pool: Pool) -> None:
    for name, eps in {"a": 1e-5, "b": 1e-5, "c": 1e-6}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.gguf", tokenizer, {**PARAMS, "norm_eps": eps}, "F16")
    data = bytearray((tmp_path / "b/model.gguf").read_bytes())
    data[-1000] ^= 1
    (tmp_path / "b/model.gguf").write_bytes(data)
    for other in "bc":
        for _, error in pool.try_run(one_has_another, [str(tmp_path / "a"), str(tmp_path / other)]):
            assert error is not None
            assert "model.gguf is" in error or "norm_eps" in error


def one_has_another(folders: list[str]) -> None:
    import os

    Llama.build(folders[os.environ["RANK"] == "1"], None, 16, 1, device="cpu")


def test_embedding_and_output_in_one(tokenizer: Tokenizer, tokenizer_path: str, tmp_path: Path) -> None:
    weights = write(tmp_path / "a.gguf", tokenizer, leave_out="output.weight")
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.tied
    assert torch.equal(checkpoint.read("output.weight", 0, 0, 400), weights["tok_embeddings.weight"])
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf", dtype=torch.float32, tokenizer_path=Path(tokenizer_path))
    assert open_checkpoint(tmp_path / "b.gguf").tied
    assert torch.equal(logits(str(tmp_path / "a.gguf"), TOKENS), logits(str(tmp_path / "b.gguf"), TOKENS))


def test_positions_that_it_was_made_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer)
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf", tokenizer_path=tmp_path / "a.gguf")
    for name in "ab":
        path = str(tmp_path / f"{name}.gguf")
        Llama.build(path, None, 64, 1, device="cpu", draft=path)
        with pytest.raises(
            ValueError, match=r"the draft model in .*gguf was made for 64 positions, but max_seq_len is 65"
        ):
            Llama.build(path, None, 65, 1, device="cpu", draft=path)


# Which files make a model


def split(path: Path, name: str, parts: int) -> list[Path]:
    """The tensors of a model in several files, as llama.cpp's gguf-split writes them."""
    reader = gguf.GGUFReader(path)
    paths = [path.with_name(f"{name}-{i + 1:05d}-of-{parts:05d}.gguf") for i in range(parts)]
    for i, part in enumerate(paths):
        writer = GGUFWriter(part, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for key, field in reader.fields.items() if i == 0 else ():
            if not key.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
        for tensor in reader.tensors[i::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_split_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Any part may be named, or their folder."""
    whole = tmp_path / "whole.gguf"
    write(whole, tokenizer, WIDE, "Q5_0")
    parts = split(whole, "model", 3)
    expected = logits(str(whole), TOKENS)
    whole.unlink()
    for place in (parts[0], parts[2], tmp_path):
        assert torch.equal(logits(str(place), TOKENS), expected)
    assert [path.name for path in open_checkpoint(tmp_path).paths] == [path.name for path in parts]
    parts[1].rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"is one of 3 parts, and model-00002-of-00003.gguf is missing"):
        open_checkpoint(parts[2])
    parts[0].rename(parts[1])
    (tmp_path / "aside").rename(parts[0])
    with pytest.raises(
        ValueError, match=r"model-00001-of-00003.gguf says that it is part 1 \(from 0\) of 3, and not part 0 of 3"
    ):
        open_checkpoint(parts[2])
    parts[2].rename(tmp_path / "c.gguf")
    with pytest.raises(ValueError, match=r"c.gguf says that it is part 2 \(from 0\) of 3, and not part 0 of 1"):
        open_checkpoint(tmp_path / "c.gguf")


def test_folders_with_other_files(tiny: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer, kind="F16")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as folders of the hub have it beside GGUF files
    assert open_checkpoint(tmp_path).format == "GGUF (F16, F32)"
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    with pytest.raises(ValueError, match=r"holds several models: a.gguf, b.gguf; pass the path of one of them"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "b.gguf").paths == [tmp_path / "b.gguf"]
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_checkpoint(tmp_path).format == "Meta"
    with pytest.raises(ValueError, match=r"no.gguf is missing"):
        open_checkpoint(tmp_path / "no.gguf")


# Tokenizers


@pytest.mark.parametrize("told", [{}, {"tokenizer__ggml__padding_token_id": 0}])  # as unk_id, which pads nothing
def test_the_tokenizer_is_in_the_file(told: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer, **told)
    found = Llama.build(str(tmp_path / "a.gguf"), None, 16, 1, device="cpu").tokenizer
    for line in [*TEXT.splitlines(), "  two  spaces \t\n", "🦙 <s> </s> <unk>", ""]:
        ids = tokenizer.encode(line, True, True)
        assert found.encode(line, True, True) == ids
        assert found.decode(ids) == tokenizer.decode(ids)
    assert (found.bos_id, found.eos_id, found.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_a_vocabulary_that_only_the_matrix_tells(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer, llama__vocab_size=None)
    assert open_checkpoint(tmp_path / "a.gguf").args.vocab_size == 400


def test_a_tokenizer_that_is_given_counts(tokenizer: Tokenizer, tokenizer_path: str, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer, tokenizer__ggml__model="gpt2")
    with pytest.raises(ValueError, match=r"a.gguf has a tokenizer of kind 'gpt2', not SentencePiece"):
        Llama.build(str(tmp_path / "a.gguf"), None, 16, 1, device="cpu")
    llama = Llama.build(str(tmp_path / "a.gguf"), tokenizer_path, 16, 1, device="cpu")
    assert llama.tokenizer.n_words == 400


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer__ggml__model": None}, "has no tokenizer"),
        ({"tokenizer__ggml__scores": None}, "tokenizer.ggml.scores is None and not an array of float"),
        ({"tokenizer__ggml__tokens": ["a", "b"]}, "2 tokens, 400 scores, and 400 kinds"),
        ({"tokenizer__ggml__token_type": [9] * 400}, "the piece 3 is of kind 9; there are 1 to 6"),
        ({"tokenizer__ggml__bos_token_id": 400}, "bos_id=400 has no piece; there are 400"),
        ({"tokenizer__ggml__eos_token_id": "x"}, "tokenizer.ggml.eos_token_id='x' is no id"),
        ({"tokenizer__ggml__bos_token_id": 2}, "has no two control pieces"),
        ({"tokenizer__ggml__tokens": ["a"] * 400}, "is not a SentencePiece model, or damaged"),
    ],
)
def test_tokenizers_that_are_refused(change: dict[str, Any], told: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer, **change)
    with pytest.raises(ValueError, match=told) as caught:
        Llama.build(str(tmp_path / "a.gguf"), None, 16, 1, device="cpu")
    assert "a.gguf" in str(caught.value)
    assert "tokenizer" in str(caught.value)


def test_a_draft_model_may_have_more_rows(
    tokenizer: Tokenizer, tiny: Path, tokenizer_path: str, tmp_path: Path
) -> None:
    """They belong to no id of the model."""
    path = tmp_path / "a.gguf"
    stored = write(path, tokenizer, rows=404, llama__vocab_size=404)
    llama = Llama.build(str(tiny), tokenizer_path, 64, 1, device="cpu", draft=str(path))
    assert llama.draft_model is not None
    for name in ("tok_embeddings.weight", "output.weight"):
        assert torch.equal(llama.draft_model.get_parameter(name), stored[name][:400])


def test_added_tokens_and_rows_without_a_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Text becomes none of them by itself; what the file calls them does not matter. convert writes them back."""
    told = vocabulary_metadata(tokenizer)
    texts, scores, kinds = (told[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    write(
        tmp_path / "a.gguf", tokenizer, rows=404, llama__vocab_size=404,
        tokenizer__ggml__scores=[*scores, 0.0, -1.0, 0.0, 0.0],
        tokenizer__ggml__tokens=[*texts, "<|im_start|>", "<|im_end|>", "[PAD402]", "[PAD403]"],
        tokenizer__ggml__token_type=[*kinds, 3, 4, 5, 5], tokenizer__ggml__eot_token_id=401,
        tokenizer__chat_template="{{ messages }}",
    )  # fmt: skip
    nameless = r"has 404 ids, and 2 ids without a name \(402 to 403\): they are never drawn"
    with pytest.warns(UserWarning, match=nameless):
        convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf", tokenizer_path=tmp_path / "a.gguf")
    for name in "ab":
        with pytest.warns(UserWarning, match=nameless):
            found = Llama.build(str(tmp_path / f"{name}.gguf"), None, 16, 1, device="cpu").tokenizer
        assert found.n_words == 404
        assert {i: token.content for i, token in found.added.items()} == {400: "<|im_start|>", 401: "<|im_end|>"}
        assert found.nameless == {402, 403}
        assert found.stop_ids == {2, 401}
        assert found.chat_template == "{{ messages }}"
        assert found.decode([400, *tokenizer.encode("a", False, False), 401]).endswith("a<|im_end|>")
        assert not {400, 401} & set(found.encode("<|im_start|>a<|im_end|>", False, False))
        assert found.encode("<|im_start|>a", False, False, special=True)[0] == 400


# Scaled rotary positions

YARN = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Metadata, and a config.json's rope_scaling that says the same; positions are 64.
SCALED: list[tuple[dict[str, Any], Any]] = [
    ({"factor": 0.0}, None),
    ({"type": "none", "factor": 4.0}, None),
    ({"type": "linear", "factor": 1.0}, None),
    ({"factor": 2.0}, {"type": "linear", "factor": 2.0}),
    ({"factor": 2.0, "finetuned": True, "yarn_ext_factor": 0.0, "attn_factor": 1.0}, {"type": "linear", "factor": 2.0}),
    ({"type": "yarn", "factor": 4.0}, {"type": "yarn", "factor": 4.0}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 8.0, "yarn_beta_slow": 0.5,
      "yarn_attn_factor": 0.75, "yarn_ext_factor": 1.0},
     {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 0.5,
      "attention_factor": 0.75}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_attn_factor": 1.5, "attn_factor": 0.5},
     {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.75}),
]  # fmt: skip


@pytest.mark.parametrize(("told", "settings"), SCALED)
def test_scaling_is_that_of_a_config(told: dict[str, Any], settings: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer, **{f"llama__rope__scaling__{key}": value for key, value in told.items()})
    expected = read_rope({"max_position_embeddings": 64, "rope_scaling": settings})[1]
    assert open_checkpoint(tmp_path / "a.gguf").args.rope_scaling == expected
    write(tmp_path / "b.gguf", tokenizer, llama__rope__scale_linear=told["factor"])  # as files of 2023 have it
    assert (open_checkpoint(tmp_path / "b.gguf").args.rope_scaling is None) == (told["factor"] in (0, 1))


@pytest.mark.parametrize(
    ("dim", "theta", "change"),
    [
        (128, 5e5, {"original_max_position_embeddings": 8192}),  # Llama 3.1's numbers
        (64, 5e5, {"original_max_position_embeddings": 8192, "factor": 32.0}),  # Llama 3.2's
        (128, 1e4, {"original_max_position_embeddings": 4096, "factor": 4.0}),
        (8, 1e4, {"original_max_position_embeddings": 16}),  # one pair is between
        (8, 5e3, {"original_max_position_embeddings": 32}),  # none is
        (8, 5e3, {"original_max_position_embeddings": 4096}),  # all pairs turn often
        (8, 5e3, {"original_max_position_embeddings": 1}),  # and seldom
        (128, 5e5, {"original_max_position_embeddings": 8192, "low_freq_factor": 1.5, "high_freq_factor": 2.25}),
        (16, 5e5, {"original_max_position_embeddings": 8192, "low_freq_factor": 1.5, "high_freq_factor": 1.75}),
    ],
)
def test_tables_of_llama3s_rule(dim: int, theta: float, change: dict[str, Any]) -> None:
    """As llama.cpp's converter writes them (generate_extra_tensors of convert_hf_to_gguf.py): the same frequencies."""
    values = {**LLAMA3, **change}
    table = []
    for frequency in (1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)).tolist():
        length, original = 2 * torch.pi / frequency, values["original_max_position_embeddings"]
        low, high = original / values["low_freq_factor"], original / values["high_freq_factor"]
        share = (original / length - values["low_freq_factor"]) / (
            values["high_freq_factor"] - values["low_freq_factor"]
        )
        between = 1 / ((1 - share) / values["factor"] + share)
        table.append(1.0 if length < high else values["factor"] if length > low else between)
    expected = read_rope({"max_position_embeddings": 131072, "rope_theta": theta, "rope_scaling": values})[1]
    factors = torch.tensor(table)
    with torch.device("meta"):  # what the caller makes tensors on by default is no matter
        found = read_table(factors, theta, 131072)
    if found is None:
        assert table == [1.0] * (dim // 2)
        return
    assert expected is not None
    assert found.positions == expected.positions == 131072
    one = torch.arange(1)
    torch.testing.assert_close(
        found.frequencies(dim, theta, one), expected.frequencies(dim, theta, one), rtol=3e-6, atol=0
    )
    if (values["low_freq_factor"], dim) == (1.0, 128):
        assert found == expected


# What is refused


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"general__architecture": "qwen2"}, "holds 'qwen2', and only models of the architecture 'llama' are computed"),
        ({"general__type": "adapter"}, "holds 'adapter'"),
        ({"llama__expert_count": 8}, "llama.expert_count=8, which is not computed"),
        (
            {"llama__rope__scaling__type": "longrope"},
            "its rotary positions are scaled ('longrope'), which is not computed",
        ),
        ({"llama__rope__scale_linear": 0.5}, "scaled ('linear'), but factor=0.5 is not a number from 1"),
        ({"llama__rope__scaling__factor": "2"}, "but factor='2' is not a number"),
        ({**YARN, "llama__context_length": None}, "missing key 'llama.context_length'"),
        ({**YARN, "llama__rope__scaling__yarn_beta_fast": -1.0}, "beta_fast=-1.0 is not a number from 0.001"),
        (
            {**YARN, "llama__rope__scaling__original_context_length": "a"},
            "original_max_position_embeddings='a' is not a whole",
        ),
        ({**YARN, "llama__rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor=0.5, which is not computed"),
        ({**YARN, "llama__rope__scaling__attn_factor": -1.0}, "attention_factor=-1.1386"),
        ({"llama__rope__scaling__attn_factor": 0.5}, "attn_factor=0.5, which is not computed with 'linear'"),
        ({"llama__rope__scaling__yarn_log_multiplier": 0.5}, "yarn_log_multiplier=0.5, which is not computed"),
        ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count=4, and only all of a head, 8, is computed"),
        ({"llama__attention__sliding_window": 4096}, "llama.attention.sliding_window=4096"),
        (
            dict.fromkeys((key.replace(".", "__") for key in NEEDED), None),
            ", ".join(f"missing key '{key}'" for key in NEEDED),
        ),
        ({"llama__block_count": 2**31}, "llama.block_count=2147483648 is not a whole number from 1 to 1000"),
        ({"llama__block_count": 3}, "layers.2.attention.wq.weight is missing"),
        ({"llama__block_count": 1}, "'blk.1.attn_q.weight' is unexpected"),
        ({"llama__attention__head_count_kv": [4, 4]}, "llama.attention.head_count_kv=(4, 4) is not a whole number"),
        ({"llama__rope__freq_base": float("nan")}, "llama.rope.freq_base=nan is not a number"),
        ({"llama__vocab_size": 128256}, "this is a Llama 3 model"),
        ({"leave_out": "token_embd.weight"}, "has no token_embd.weight"),
        ({"leave_out": "blk.1.ffn_up.weight"}, "layers.1.feed_forward.w3.weight is missing"),
    ],
)
def test_models_that_are_refused(change: dict[str, Any], told: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer, **change)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Llama.build(str(tmp_path / "a.gguf"), None, 16, 1, device="cpu")
    assert told in str(caught.value)
    assert "a.gguf" in str(caught.value)


def test_without_the_package(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not quantized needs none."""
    for kind in ("F16", "Q4_0"):
        write(tmp_path / f"{kind}.gguf", tokenizer, kind=kind)
    monkeypatch.setitem(sys.modules, "gguf", None)
    Llama.build(str(tmp_path / "F16.gguf"), None, 16, 1, device="cpu")
    with pytest.raises(
        ValueError, match=r"is quantized, GGUF \(Q4_0, F32\), which needs the package gguf; pip install 'gguf"
    ):
        open_checkpoint(tmp_path / "Q4_0.gguf")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("blk.0.attn_q.bias", torch.zeros(64), "it has biases ('blk.0.attn_q.bias'), which are not computed"),
        ("blk.0.ffn_gate_exps.weight", torch.zeros(8, 4, 64), "it has experts ('blk.0.ffn_gate_exps.weight')"),
        (
            "rope_freqs.weight",
            torch.tensor([8.0, 1, 1, 8]),
            "by a table (rope_freqs.weight) that is not of llama3's rule",
        ),
        ("rope_freqs.weight", torch.tensor([1.0, 1, torch.nan, 8]), "that is not of llama3's rule"),
        ("rope_freqs.weight", torch.tensor([0.0, 1, 2, torch.inf]), "that is not of llama3's rule"),
        ("rope_freqs.weight", torch.ones(3), "its rotary positions are scaled by rope_freqs.weight, F32 [3]"),
        ("rope_freqs.weight", torch.tensor([1.0, 1, 1, 8]), None),
        ("rope_freqs.weight", torch.ones(4), None),
        ("rope_freqs.weight", 10000.0 ** (-torch.arange(4) / 4), None),  # old files have Meta's own table
    ],
)
def test_other_tensors(name: str, data: torch.Tensor, told: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    convert_tiny(path, tokenizer, tmp_path)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    add_tensor(path, name, data.numpy(), tensors, reader)
    if told is None:
        assert name not in open_checkpoint(path).dtypes
        return
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_checkpoint(path)
    assert told in str(caught.value)


def convert_tiny(path: Path, tokenizer: Tokenizer, tmp_path: Path, **options: Any) -> None:
    folder = write_checkpoint(tmp_path / "source", random_weights())
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.sp_model.serialized_model_proto())
    convert(folder, path, "gguf", tokenizer_path=tmp_path / "tokenizer.model", **options)


def add_tensor(path: Path, name: str, data: Any, tensors: dict[str, Any], reader: Any) -> None:
    writer = GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for theirs, (array, kind) in [(name, (data, GGMLQuantizationType.F32)), *tensors.items()]:
        writer.add_tensor(theirs, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Damaged files


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> Path:
    root = tmp_path_factory.mktemp("sound")
    folder = write_checkpoint(root / "meta", random_weights())
    convert(folder, root / "model.gguf", "gguf", tokenizer_path=Path(tokenizer_path), quantize="q8_0")
    return root / "model.gguf"


def behind(data: bytes, key: str, skip: int = 4) -> int:
    """Where the value of a key begins; skip=0: its type."""
    return data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + skip


def put(data: bytes, at: int, code: str, number: int) -> bytes:
    return data[:at] + struct.pack(f"<{code}", number) + data[at + struct.calcsize(f"<{code}") :]


def change_info(data: bytes, skip: int, code: str, number: int) -> bytes:
    """Another number behind the name output_norm.weight: dimensions (4 bytes), shape (8), kind (4), offset (8)."""
    name = b"output_norm.weight"
    return put(data, data.index(name) + len(name) + skip, code, number)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda d: b"", "is no GGUF file: it begins with b''"),
    "magic": (lambda d: b"GGML" + d[4:], "is no GGUF file: it begins with b'GGML'"),
    "version 1": (lambda d: put(d, 4, "I", 1), "it is of GGUF's version 1, and 2 and 3 are read"),
    "version 4": (lambda d: put(d, 4, "I", 4), "it is of GGUF's version 4, and 2 and 3 are read"),
    "version 2, big endian": (lambda d: put(d, 4, "I", 2 << 24), "its numbers are in big-endian order"),
    "big endian": (lambda d: put(d, 4, "I", 3 << 24), "its numbers are in big-endian order"),
    "header alone": (lambda d: d[:24], "it ends within its header"),
    "cut": (lambda d: d[: len(d) // 2], "it is cut short; download it again"),
    "cut by the padding and one": (lambda d: d[:-33], "it is cut short"),
    "more bytes": (lambda d: d + bytes(33), "it is damaged; download it again"),
    "shifted": (lambda d: d[:24] + bytes(24) + d[24:], "it has the key '' twice"),
    "tensors": (lambda d: put(d, 8, "Q", 2**63), "dimensions, and not 1 to 4|ends within its header"),
    "keys": (lambda d: put(d, 16, "Q", 2**64 - 1), "ends within its header|value of type"),
    "long key": (lambda d: put(d, 24, "Q", 2**62), "it ends within its header"),
    "long text": (lambda d: put(d, behind(d, "general.architecture"), "Q", 2**63), "it ends within its header"),
    "long array": (lambda d: put(d, behind(d, "tokenizer.ggml.scores", 8), "Q", 2**61), "it ends within its header"),
    "long array of texts": (lambda d: put(d, behind(d, "tokenizer.ggml.tokens", 8), "Q", 2**64 - 1),
      "ends within|not UTF-8"),
    "array of arrays": (lambda d: put(d, behind(d, "tokenizer.ggml.tokens"), "I", 9), "an array of arrays"),
    "type": (lambda d: put(d, behind(d, "llama.block_count", 0), "I", 13), "a value of type 13"),
    "no text": (lambda d: d.replace(b"llama", b"ll\xffma", 1), "a text that is not UTF-8"),
    "a tensor twice": (lambda d: d.replace(b"blk.1.attn_q", b"blk.0.attn_q"), ("has the tensor 'blk.0.attn_q.weight' "
                                                                              "twice")),
    "no dimensions": (lambda d: change_info(d, 0, "I", 0), "has 0 dimensions, and not 1 to 4"),
    "dimensions": (lambda d: change_info(d, 0, "I", 2**31), "has 2147483648 dimensions"),
    "no rows": (lambda d: change_info(d, 4, "Q", 0), r"has the shape \[0\]"),
    "rows": (lambda d: change_info(d, 4, "Q", 2**63), "has the shape"),
    "more rows": (lambda d: change_info(d, 4, "Q", 65), "begins at|ends at|end at"),
    "parts of blocks": (lambda d: put(d, d.index(b"blk.0.attn_q.weight") + 23, "Q", 48), ("rows of Q8_0 are whole "
                                                                                         "blocks of 32")),
    "kind": (lambda d: change_info(d, 12, "I", 16), "is of kind IQ2_XXS, which is not computed here"),
    "unknown kind": (lambda d: change_info(d, 12, "I", 999), "is of kind 999"),
    "offset": (lambda d: change_info(d, 16, "Q", 2**63), "begins at"),
    "one place for two": (lambda d: change_info(d, 16, "Q", 0), "begins at 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, sound: Path, tmp_path: Path) -> None:
    """Each claim of a header is hostile until it is checked: one clear error, at once."""
    change, told = DAMAGE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(change(sound.read_bytes()))
    began = time.perf_counter()
    with pytest.raises(ValueError, match=told) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - began < 5
    assert type(caught.value) is ValueError
    assert str(path) in str(caught.value)


def test_a_key_twice_and_other_alignments(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write(path, tokenizer, general__alignment=32)
    data = path.read_bytes()
    for alignment in (0, 1, 33, 2**31):
        path.write_bytes(put(data, behind(data, "general.alignment"), "I", alignment))
        with pytest.raises(ValueError, match=f"general.alignment={alignment} is not a power of 2"):
            open_checkpoint(path)
    path.write_bytes(data.replace(b"llama.block_count", b"general.alignment"))
    with pytest.raises(ValueError, match="it has the key 'general.alignment' twice"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("value", "code", "data"),
    [
        ("é", 8, b"\2" + bytes(7) + "é".encode()),
        (True, 7, b"\1"),
        (2**31, 4, struct.pack("<I", 2**31)),
        (0.5, 6, struct.pack("<f", 0.5)),
        (["b"], 9, struct.pack("<IQQ", 8, 1, 1) + b"b"),
        ([-1], 9, struct.pack("<IQi", 5, 1, -1)),
        ([0.5, 2.0], 9, struct.pack("<IQ2f", 6, 2, 0.5, 2.0)),
    ],
)
def test_values_as_they_are_written(value: Any, code: int, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writers.write_gguf(path, [], None, {"a": value})
    text = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", code) + data
    assert path.read_bytes() == text + bytes(-len(text) % 32)


def test_a_long_header(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**30))
        file.truncate(2**31)
    with pytest.raises(ValueError, match="its header has more than 33554432 bytes"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        *((kind, b"\x00\x7e" * 105) for kind in ("Q8_0", "Q4_1", "Q6_K")),  # NaN in float16, in the last block
        *(("Q8_0", scale + b"\1" * 32) for scale in (b"\x00\x7c", b"\x00\xfc")),  # infinity; -infinity
    ],
)
def test_scales_that_are_not_finite(kind: str, end: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write(path, tokenizer, WIDE, kind)
    data = bytearray(path.read_bytes())
    data[-len(end) :] = end
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.gguf: .* has NaN or infinity in it: the file is damaged"):
        Llama.build(str(path), None, 16, 1, device="cpu")


def test_damaged_headers(sound: Path, tmp_path: Path) -> None:
    """300 of them: refused clearly and at once, or a model. tests/mutate.py runs what loads."""
    data, path, rng = sound.read_bytes(), tmp_path / "model.gguf", random.Random(5)
    infos, header = mutate.gguf_places(data)
    changes: list[Callable[[], bytes]] = [
        lambda: mutate.change_metadata(rng, data)[0],
        lambda: mutate.flip(rng, data, [range(infos)]),
        lambda: mutate.flip(rng, data, [range(infos, header)]),
        lambda: mutate.splice(rng, data[:header]) + data[header:],
        lambda: mutate.cut(rng, data),
        lambda: data[:infos] + rng.randbytes(header - infos) + data[header:],
    ]
    refused = 0
    for i in range(300):
        path.unlink(missing_ok=True)
        path.write_bytes(changes[i % len(changes)]())
        began = time.perf_counter()
        if (told := refusal(path)) is not None:
            refused += 1
            assert str(path) in told
            assert len(told) < 4000
        assert time.perf_counter() - began < 5
    assert 200 < refused < 300


def refusal(path: Path) -> Optional[str]:
    """Why a file is refused; None if it is opened."""
    try:
        open_checkpoint(path).shape("tok_embeddings.weight", 1)
        open_tokenizer(path)
    except ValueError as error:
        return str(error)
    return None


# Writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips(dtype: torch.dtype, tokenizer_path: str, tmp_path: Path) -> None:
    """Meta's format -> GGUF -> Hugging Face's -> GGUF -> Meta's, bit for bit."""
    weights = {name: w.to(dtype) if w.ndim > 1 else w for name, w in random_weights().items()}
    at, path = write_checkpoint(tmp_path / "0", weights), Path(tokenizer_path)
    for i, (to, name) in enumerate([("gguf", "1.gguf"), ("hf", "2"), ("gguf", "3.gguf"), ("meta", "4")]):
        keeps = dtype if to == "gguf" else None
        convert(at, tmp_path / name, to, dtype=keeps, tokenizer_path=path if i == 0 else find(at))
        at = tmp_path / name
    first, third = (gguf.GGUFReader(tmp_path / name).tensors for name in ("1.gguf", "3.gguf"))
    assert all(a.name == b.name and np.array_equal(a.data, b.data) for a, b in zip(first, third, strict=True))
    back = torch.load(at / "consolidated.00.pth", weights_only=True)
    assert {name: w.dtype for name, w in back.items()} == {name: w.dtype for name, w in weights.items()}
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    lines = TEXT.splitlines()
    assert [Tokenizer(str(at / "tokenizer.model")).encode(line, False, False) for line in lines] == [
        Tokenizer(tokenizer_path).encode(line, False, False) for line in lines
    ]
    assert len(load_file(tmp_path / "2/model.safetensors")) == len(weights)


def find(folder: Path) -> Path:
    return folder if folder.suffix == ".gguf" else folder / "tokenizer.model"


def test_q8_0_is_the_package_s(tokenizer: Tokenizer, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 96, generator=generator) * torch.logspace(-9, 4, 64)[:, None]
    weight[0], weight[1] = 0, 0.5
    weight[2, :32] = torch.arange(32) + 0.5  # halves
    assert np.array_equal(to_q8_0(weight).numpy(), quantize(weight.numpy(), GGMLQuantizationType.Q8_0))
    convert_tiny(tmp_path / "a.gguf", tokenizer, tmp_path, quantize="q8_0")
    write(tmp_path / "b.gguf", tokenizer, kind="Q8_0")
    ours, theirs = ({t.name: t for t in gguf.GGUFReader(tmp_path / name).tensors} for name in ("a.gguf", "b.gguf"))
    assert ours.keys() == theirs.keys()
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    told = [fields[f"general.{name}"].contents() for name in ("file_type", "quantization_version")]
    assert told == [gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGML_QUANT_VERSION]
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type
        assert np.array_equal(ours[name].data, tensor.data)


def test_matrices_without_whole_blocks_stay_float16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As llama.cpp's own converter does: feed-forward layers of stories260K are 172 wide."""
    folder = write_checkpoint(tmp_path / "meta", random_weights(params := {**PARAMS, "multiple_of": 4}), params=params)
    (folder / "tokenizer.model").write_bytes(tokenizer.sp_model.serialized_model_proto())
    convert(folder, tmp_path / "a.gguf", "gguf", tokenizer_path=folder / "tokenizer.model", quantize="q8_0")
    assert open_checkpoint(tmp_path / "a.gguf").format == "GGUF (Q8_0, F32, F16)"


def test_what_convert_refuses(tiny: Path, tokenizer_path: str, tmp_path: Path) -> None:
    path = Path(tokenizer_path)
    for target, options, told in (
        ("a", {"tokenizer_path": path}, "is to be a GGUF file; give it a name that ends in .gguf"),
        (
            "a.gguf",
            {"tokenizer_path": path, "quantize": "int8"},
            "quantize='int8' is no kind for to='gguf': ",
        ),
        ("a.gguf", {}, "a GGUF file has its tokenizer in it, and there is none in"),
    ):
        with pytest.raises(ValueError, match=told):
            convert(tiny, tmp_path / target, "gguf", **options)
    with pytest.raises(ValueError, match="q8_0"):
        convert(tiny, tmp_path / "a", "meta", tokenizer_path=path, quantize="q8_0")
    convert(tiny, tmp_path / "int8", "meta", tokenizer_path=path, quantize="int8")
    with pytest.raises(ValueError, match="is stored as int8, which is for Meta's format alone"):
        convert(tmp_path / "int8", tmp_path / "a.gguf", "gguf", tokenizer_path=path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["int8"]


def test_adapters(tokenizer: Tokenizer, tokenizer_path: str, tmp_path: Path) -> None:
    """They are added to what was dequantized."""
    weights = write(tmp_path / "a.gguf", tokenizer, kind="Q4_1")
    folder = write_checkpoint(tmp_path / "meta", weights)
    (tmp_path / "adapter").mkdir()
    mutate.write_adapter(tmp_path / "adapter", False)
    options = {"adapter": str(tmp_path / "adapter")}
    ours = logits(str(tmp_path / "a.gguf"), TOKENS, **options)
    assert torch.equal(ours, logits(str(folder), TOKENS, tokenizer_path=tokenizer_path, **options))
    assert not torch.equal(ours, logits(str(tmp_path / "a.gguf"), TOKENS))


def test_commands(tiny: Path, tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    command("convert", str(tiny), str(path), to="gguf", quantize="q8_0", tokenizer_path=tokenizer_path)
    assert capsys.readouterr().out == f"{path} is written\n"
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]
    command("info", str(path))
    told = capsys.readouterr().out
    assert f"{path}: GGUF (Q8_0, F32) format, 1 file of weights" in told
    assert f"{path}: 400 pieces, BOS 1, EOS 2" in told
    command("tokenize", "the tree", ckpt_dir=path)
    assert (
        f"ids: {' '.join(map(str, Tokenizer(tokenizer_path).encode('the tree', True, False)))}\n"
        in capsys.readouterr().out
    )
    command("complete", "the tree", ckpt_dir=path, max_gen_len=2, max_seq_len=16)
    command("convert", str(path), str(tmp_path / "hf"), to="hf")
    assert (tmp_path / "hf/tokenizer.model").exists()


# llama.cpp, where it is installed


def eval_with_llama_cpp(path: Path, ids: list[int], new: int = 0) -> tuple[torch.Tensor, list[int]]:
    """Its logits for a prompt, (S, vocabulary), and `new` greedy ids behind it. Keys and values stay float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
    try:
        llama.eval(ids)
        scores = torch.from_numpy(llama.scores[: len(ids)].copy())
        llama.reset()
        return scores, [token for token, _ in zip(llama.generate(ids, temp=0.0), range(new))] if new else []
    finally:
        llama.close()


@pytest.mark.parametrize("model", ["demo", "stories260K"])
def test_against_llama_cpp(model: str, tmp_path: Path) -> None:
    """Greedy ids and logits on the file that convert wrote. In 16 bits and fewer it rounds what it multiplies weights
    with."""
    pytest.importorskip("llama_cpp")
    folder = DEMO if model == "demo" else shared("models/stories260K")
    kinds: dict[str, Any] = {"f32": {"dtype": torch.float32}, "f16": {}, "q8_0": {"quantize": "q8_0"}}
    for (kind, options), tolerance in zip(kinds.items(), (1e-4, 1e-2, 0.5)):
        path = tmp_path / f"{kind}.gguf"
        convert(folder, path, "gguf", tokenizer_path=folder / "tokenizer.model", **options)
        ours = Llama.build(str(path), None, 128, 1, device="cpu", dtype="float32")
        ids = ours.tokenizer.encode("Once upon a time, there was a little girl", True, False)
        scores, greedy = eval_with_llama_cpp(path, ids, 40)
        with torch.inference_mode():
            torch.testing.assert_close(ours.model(torch.tensor([ids]), 0)[0], scores, atol=tolerance, rtol=0)
        if kind != "q8_0":
            assert ours.generate([ids], 40, temperature=0)[0][0] == greedy


@pytest.mark.parametrize("kind", ["linear", "yarn", "attention_factor", "llama3"])
def test_scaled_positions_in_llama_cpp(kind: str, tokenizer_path: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    known = {"original_max_position_embeddings": 16, "positions": 64}
    of = (
        {"type": kind, **LLAMA3}
        if kind == "llama3"
        else {"type": kind.replace("attention_factor", "yarn"), "factor": 4.0}
    )
    of.pop("rope_type", None)
    scaling = {**of, **known, **({kind: 0.8} if kind == "attention_factor" else {})}
    weights = {
        name: w * 5 if "wq" in name or "wk" in name else w for name, w in random_weights().items()
    }  # angles matter
    folder = write_checkpoint(tmp_path / "meta", weights, params={**PARAMS, "rope_scaling": scaling})
    convert(folder, tmp_path / "a.gguf", "gguf", dtype=torch.float32, tokenizer_path=Path(tokenizer_path))
    ids = torch.randint(3, 400, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    scores, _ = eval_with_llama_cpp(tmp_path / "a.gguf", ids)
    torch.testing.assert_close(logits(str(tmp_path / "a.gguf"), [ids])[0], scores, atol=1e-3, rtol=0)
    changed = write_checkpoint(tmp_path / "plain", weights)
    assert (logits(str(changed), [ids], tokenizer_path=tokenizer_path)[0] - scores).abs().max() > 0.1


def test_llama_cpp_reads_text_alike(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    convert(DEMO, tmp_path / "a.gguf", "gguf", tokenizer_path=DEMO / "tokenizer.model")
    theirs, ours = (
        llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False),
        open_tokenizer(tmp_path / "a.gguf"),
    )
    for line in [*TEXT.splitlines(), "  two  spaces \t\n", "🦙 <s> </s> <unk>", "12345", " a", "a "]:
        assert theirs.tokenize(line.encode(), add_bos=True, special=False) == ours.encode(line, True, False)
    theirs.close()


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_L", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_XS"]
)
def test_what_llama_cpp_quantizes(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With its own mixtures of kinds: nearer to its answers than to the original's."""
    llama_cpp = pytest.importorskip("llama_cpp")
    write(tmp_path / "a.gguf", tokenizer, WIDE)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    places = (str(tmp_path / name).encode() for name in ("a.gguf", "b.gguf"))
    assert llama_cpp.llama_model_quantize(*places, ctypes.byref(options)) == 0
    if kind.startswith("IQ"):
        with pytest.raises(
            ValueError, match=f"is of kind {kind}, which is not computed here; take a file with F32, F16"
        ):
            open_checkpoint(tmp_path / "b.gguf")
        return
    scores, _ = eval_with_llama_cpp(tmp_path / "b.gguf", TOKENS[0])
    ours, original = (logits(str(tmp_path / name), TOKENS[:1])[0] for name in ("b.gguf", "a.gguf"))
    error = (ours - scores).square().mean().sqrt()
    assert error < 0.04  # of logits that spread by 1
    assert error < (ours - original).square().mean().sqrt()
