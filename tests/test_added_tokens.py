"""Folders of fine-tunes: tokens that were added to SentencePiece's, rows without a name, ids that stop, and their way
through `convert`; against transformers on the same files."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command, write_twin
from safetensors.torch import load_file, save_file
from workers import Pool

from llama import Llama
from llama.commands.convert import convert
from llama.tokenizer import StreamDecoder, Tokenizer
from llama.tokenizer_files import open_tokenizer

ROWS = 405  # of which the last two have no name
ADDED = {"<|im_start|>": 400, "<|im_end|>": 401, "<pad>": 402}
TEXTS = [
    ("<|im_start|>user\nhi <|im_end|> "
    "yes<|im_end|>\n<|im_start|>"), "a<pad>b", "<|im_end|>", " <s>x</s> <|im_end|> ", "no token",
    "", "<|im_start|><|im_end|>", "<|im_", "the <pad> <pad>  end",
]  # fmt: skip
NAMELESS = pytest.warns(UserWarning, match="has 405 ids, and 2 ids without a name .403 to 404.: they are never drawn")


def write_tokenizer(folder: Path, tokenizer_path: str, **config: Any) -> None:
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    decoder = {str(i): {"content": text, "special": True} for text, i in ADDED.items()}
    told = {**named, "add_bos_token": True, "added_tokens_decoder": decoder, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 401]}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> Path:
    folder = write_twin(tmp_path_factory.mktemp("added") / "hf", {"vocab_size": ROWS})
    write_tokenizer(folder, tokenizer_path)
    return folder


def build(folder: Path, **options: Any) -> Llama:
    with NAMELESS:
        return Llama.build(str(folder), None, 64, 4, device="cpu", **options)


@pytest.mark.parametrize("legacy", [True, False])
def test_texts_and_ids_are_those_of_transformers(legacy: bool, tokenizer_path: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer_path, legacy=legacy)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": ROWS}))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ours = open_tokenizer(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text, True, False, special=True)
        assert ids == theirs(text).input_ids, text
        shown = theirs.decode(ids[1:]).replace("<s>", "").replace("</s>", "")  # our control pieces give no text
        assert ours.decode(ids[1:]) == shown, text
        stream = StreamDecoder(ours)
        assert "".join(map(stream.add, ids)) + stream.finish() == ours.decode(ids)
        assert not set(ADDED.values()) & set(ours.encode(text, False, False))
        assert ours.encode(text, False, False) == Tokenizer(tokenizer_path).encode(text, False, False)


def test_all_rows_are_there_and_those_without_a_name_are_never_drawn(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    copy = shutil.copytree(folder, tmp_path / "hf")
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][403:] = 3.0 * weights["lm_head.weight"][7]  # either these or 7 are the best by far
    weights["lm_head.weight"][7] *= 2.9
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    llama = build(copy)
    tokens = torch.tensor([[1, 400, 20, 401, 30]])
    with torch.inference_mode():
        expected = transformers.LlamaForCausalLM.from_pretrained(copy)(tokens).logits
        torch.testing.assert_close(llama.model(tokens, 0), expected, atol=1e-4, rtol=0)
    assert expected[0, -1].argmax() in (403, 404) or (expected[..., 403:] > expected[..., 7:8]).any()
    for options in (
        {"temperature": 0},
        {"temperature": 1.5, "seed": 3, "top_p": 1.0},
        {"logit_bias": {403: 100.0}, "temperature": 0},
    ):
        for step in llama.steps([[1, 30 + i] for i in range(8)], max_gen_len=30, draft=False, **options):
            assert step.token is None or step.token < 403
    assert llama.generate([[1, 403, 404]], 2, 0)  # they may be read


def test_added_tokens_are_drawn_biased_and_stopped_at(folder: Path) -> None:
    llama = build(folder)
    assert llama.tokenizer.eos_id == 2
    assert llama.tokenizer.stop_ids == {2, 401}
    assert llama.tokenizer.named == {"<s>": 1, "</s>": 2, **ADDED}
    told = llama.text_completion(["the"], 0, max_gen_len=3, logit_bias={400: 1000.0})[0]
    assert told["generation"] == "<|im_start|>" * 3
    assert told["finish_reason"] == "length"
    told = llama.text_completion(["the"], 0, max_gen_len=3, logit_bias={401: 1000.0}, logprobs=2)[0]
    assert (told["generation"], told["finish_reason"]) == ("", "stop")
    assert llama.text_completion(["a"], 0, max_gen_len=3, logit_bias={400: 1e3}, stop_ids=[400])[0]["generation"] == ""


def logits(folder: str, quantize: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process warns
        llama = Llama.build(folder, None, 64, 4, device="cpu", quantize=quantize or None)
    with torch.inference_mode():
        whole = llama.model(torch.tensor([[1, 400, 20, 404]]), 0)
    ids = llama.generate([[1, 20], [1, 400, 30]], 8, 0)[0]
    return torch.cat((whole.flatten(), torch.tensor([*ids[0], *ids[1]]).float()))


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_a_vocabulary_that_processes_cannot_share_evenly(quantize: str, folder: Path, pool: Pool) -> None:
    """405 rows on 4 processes."""
    expected = logits(str(folder), quantize)
    for found in pool.run(logits, str(folder), quantize):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_convert_keeps_them_both_ways(folder: Path, tmp_path: Path) -> None:
    with NAMELESS:
        convert(folder, tmp_path / "meta", "meta", 1, None, folder / "tokenizer.model")
    assert Tokenizer(str(tmp_path / "meta" / "tokenizer.model")).sp_model.vocab_size() == ROWS  # as Meta's code counts
    with NAMELESS:
        convert(tmp_path / "meta", tmp_path / "hf", "hf", 1, None, tmp_path / "meta" / "tokenizer.model")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for place in ("meta", "hf"):
        llama = build(tmp_path / place)
        assert llama.tokenizer.stop_ids == {2, 401}
        assert llama.tokenizer.nameless == {403, 404}
        assert {text: i for text, i in llama.tokenizer.named.items() if i > 2} == ADDED
        assert llama.tokenizer.decode([400, 20]) == build(folder).tokenizer.decode([400, 20])
        for text in TEXTS:
            assert llama.tokenizer.encode(text, True, True) == build(folder).tokenizer.encode(text, True, True)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert theirs(text).input_ids == llama.tokenizer.encode(text, True, False, special=True), text


def test_a_tied_model_stays_tied(tmp_path: Path, tokenizer_path: str) -> None:
    source = write_twin(tmp_path / "source", {"tie_word_embeddings": True})
    convert(source, tmp_path / "hf", "hf", 1, None, Path(tokenizer_path))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")


def test_tokens_beyond_the_rows_are_no_tokens(tmp_path: Path, tokenizer_path: str) -> None:
    """Llama 2 folders name a <pad> of id 32000, for which the 32000 rows have none."""
    folder = write_twin(tmp_path / "hf", {})
    write_tokenizer(folder, tokenizer_path)
    llama = Llama.build(str(folder), None, 64, 4, device="cpu")
    assert llama.tokenizer.added == {}
    assert llama.tokenizer.stop_ids == {2}


def test_info_and_tokenize(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with NAMELESS:
        command("info", str(folder))
    assert "403 pieces, BOS 1, EOS 2, 401" in capsys.readouterr().out


def test_a_token_of_two_ids(tmp_path: Path, tokenizer_path: str) -> None:
    write_tokenizer(tmp_path, tokenizer_path, added_tokens_decoder={"404": {"content": "<|im_end|>"}})
    with pytest.raises(ValueError, match=r"tokenizer_config.json gives '<\|im_end\|>' another id than the other files"):
        open_tokenizer(tmp_path, None, ROWS)


@pytest.mark.parametrize(
    ("told", "template"),
    [
        ("{{ 1 }}", "{{ 1 }}"),
        ([{"name": "tools", "template": "x"}, 3, {"name": "default", "template": "{{ 2 }}"}], "{{ 2 }}"),
        ([{"name": "tools", "template": "x"}], None),
        ({"default": "x"}, None),
    ],
)
def test_chat_templates(told: Any, template: Any, tmp_path: Path, tokenizer_path: str) -> None:
    """One, or several by name, of which the default counts."""
    write_tokenizer(tmp_path, tokenizer_path, chat_template=told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_tokenizer(tmp_path, None, ROWS).chat_template == template


VALUES: list[Any] = [
    None,
    -1,
    2**70,
    1.5,
    "x",
    "",
    [],
    {},
    True,
    "401",
    {"content": 3},
    [[1]],
    "\ud800",
    "\0",
    {"a": {"b": 1}},
]


def damaged(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {
                (name if name != key else rng.choice(["", "-1", "9" * 30, "400", "²"])): x for name, x in value.items()
            }
        return {**value, key: damaged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        return [damaged(x, rng) if rng.random() < 0.5 else x for x in value]
    return rng.choice(VALUES)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_files_are_refused_or_harmless(name: str, folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    for path in folder.glob("*token*"):
        shutil.copy(path, tmp_path)
    shutil.copy(folder / "generation_config.json", tmp_path)
    whole, rng, refused = json.loads((folder / name).read_text()), random.Random(name), 0
    text = (folder / name).read_bytes()
    for i in range(100):
        data = json.dumps(damaged(whole, rng)).encode() if i % 4 else text[: rng.randrange(len(text))]
        (tmp_path / name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opened = open_tokenizer(tmp_path, None, ROWS)
        except ValueError:
            refused += 1
            continue
        assert opened.n_words == ROWS
        assert opened.encode("the little", True, True) == tokenizer.encode("the little", True, True)
        assert opened.stop_ids >= {2}
        opened.decode(list(range(ROWS)))
        assert set(opened.encode(TEXTS[0], True, False, special=True)) <= set(range(ROWS))
    assert refused > 20
