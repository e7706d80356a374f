"""Code Llama's infilling: Meta's ids and order, and what stands between two texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import PARAMS, random_weights, shared, write_checkpoint
from helpers import command

from llama import Llama, Tokenizer
from llama.infilling import infilling_ids, infilling_prompts
from llama.tokenizer import AddedToken
from llama.tokenizer_json import hf_tokenizer

NAMES = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
TEXTS = [
    ("def f(x):\n    ", "\n    return y"), (" a", " b"), ("x", "y"), ("a", " "), ("", "z"), ("a", ""), ("", ""),
    ("你", "🌍\n"),
    ("<PRE> x", " <EOT>"), ("▁<PRE>", "▁<MID>"), ("</s>", "<s>"), ("a  b", "  c"),
]  # fmt: skip


def with_pieces(path: str) -> Tokenizer:
    pieces = Tokenizer(path).n_words
    return Tokenizer(path, added=[AddedToken(pieces + i, name) for i, name in enumerate(NAMES)])


@pytest.fixture(scope="module", params=["tiny", "Llama 2's"])
def tokenizer(request: Any, tokenizer_path: str) -> Tokenizer:
    return with_pieces(tokenizer_path if request.param == "tiny" else str(shared("tokenizers/llama2/tokenizer.model")))


@pytest.mark.parametrize("suffix_first", [False, True])
@pytest.mark.parametrize(("prefix", "suffix"), TEXTS)
def test_ids_are_metas(prefix: str, suffix: str, suffix_first: bool, tokenizer: Tokenizer) -> None:
    """Meta encodes the suffix behind a character that no piece joins to what follows, and drops the ids of that."""
    pre, suf, mid, _ = ids = infilling_ids(tokenizer)
    encode = tokenizer.sp_model.EncodeAsIds
    behind = encode("☺" + suffix)[len(encode("☺")) :]
    expected = [pre, suf, *behind, mid, *encode(prefix)] if suffix_first else [pre, *encode(prefix), suf, *behind, mid]
    [prompt] = infilling_prompts([prefix], [suffix], tokenizer, suffix_first).ids
    assert prompt == [tokenizer.bos_id, *expected]
    assert [i for i in prompt if i in tokenizer.controls] == [tokenizer.bos_id, *([pre, suf, mid])]
    assert ids.eot not in prompt


@pytest.mark.parametrize("suffix_first", [False, True])
def test_ids_are_those_of_transformers(suffix_first: bool, tokenizer: Tokenizer) -> None:
    """Its version 5 puts a space before the suffix, which versions 4 and Meta do not: here it is told not to."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    model = hf_tokenizer(tokenizer)["model"]
    theirs = transformers.CodeLlamaTokenizer(
        vocab=model["vocab"], merges=[tuple(m.split(" ")) for m in model["merges"]]
    )
    pieces = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    theirs._tokenizer.pre_tokenizer = pieces
    for prefix, suffix in TEXTS:
        if (
            not prefix or not suffix or "▁" in prefix or "<s>" in suffix
        ):  # an empty prefix gets a space, an empty suffix no ids
            continue
        names = theirs.convert_ids_to_tokens(theirs(prefix, suffix=suffix, suffix_first=suffix_first)["input_ids"])
        [prompt] = infilling_prompts([prefix], [suffix], tokenizer, suffix_first).ids
        assert [tokenizer.piece(i) for i in prompt] == names


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> Llama:
    folder = write_checkpoint(tmp_path_factory.mktemp("infill"), random_weights(vocab_size=404))
    tokens = {str(400 + i): {"content": name, "special": True} for i, name in enumerate(NAMES)}
    (folder / "params.json").write_text(json.dumps({**PARAMS, "vocab_size": 404}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    return Llama.build(str(folder), tokenizer_path, 128, 2, device="cpu")


def test_the_middle(llama: Llama) -> None:
    """It ends at its own piece, keeps the space that it begins with, and streams."""
    prefixes, suffixes = ["the little dog", "a"], ["under the tree", " b"]
    prompts = infilling_prompts(prefixes, suffixes, llama.tokenizer).ids
    ids, _ = llama.generate(prompts, 8, 0)
    middles = llama.infill(prefixes, suffixes, 0, max_gen_len=8, logprobs=True)
    x = llama.tokenizer.encode_behind("x")
    for row, middle in zip(ids, middles):
        assert "x" + middle["generation"] == llama.tokenizer.decode([*x, *row])
        assert "".join(middle["tokens"]) == middle["generation"]
    streamed = ["", ""]
    for chunk in llama.stream_infill(prefixes, suffixes, 0, max_gen_len=8):
        streamed[chunk["index"]] += chunk["text"]
    assert streamed == [middle["generation"] for middle in middles]
    first = llama.infill(prefixes, suffixes, 0, max_gen_len=8, suffix_first=True)
    assert [m["generation"] for m in first] != streamed
    space = llama.tokenizer.encode("the", bos=False, eos=False)[0]
    [spaced] = llama.infill(["a"], ["b"], 0, max_gen_len=1, logit_bias={space: 100.0})
    assert spaced["generation"].startswith(" ")
    [ended] = llama.infill(["a"], ["b"], 0, max_gen_len=5, logit_bias={403: 100.0})
    assert (ended["generation"], ended["finish_reason"]) == ("", "stop")
    assert llama.text_completion(["a"], 0, max_gen_len=5, logit_bias={403: 100.0})[0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prefixes", "suffixes", "message"),
    [
        ("a", ["b"], "prefixes is a list of texts, not str"), (["a"], "b", "suffixes is a list of texts, not str"),
        (["a", "b"], ["c"], "2 prefixes, but 1 suffixes"), (["a"], [5], r"suffixes\[0\] is 5, and not a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_filled_in(prefixes: Any, suffixes: Any, message: str, llama: Llama) -> None:
    with pytest.raises(ValueError, match=message):
        llama.infill(prefixes, suffixes)
    plain = Llama(llama.model, Tokenizer(str(Path(__file__).parents[1] / "llama/demo/tokenizer.model")))
    for call in (plain.infill, plain.stream_infill):
        with pytest.raises(
            ValueError, match="cannot fill in: its tokenizer has no ▁<PRE>, ▁<SUF>, ▁<MID>, ▁<EOT>; Code Llama 7B"
        ):
            call(["a"], ["b"])


def test_the_terminal(capsys: Any) -> None:
    with pytest.raises(ValueError, match="this model cannot fill in"):
        command("complete", "a", suffix="b", device="cpu")
    with pytest.raises(ValueError, match="leave out the prompt, --file, --suffix and --echo"):
        command("complete", jsonl="x", suffix="b")
    with pytest.raises(ValueError, match="leave it out with --suffix"):
        command("complete", "a", suffix="b", echo=True)
