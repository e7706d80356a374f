"""The vocabulary in the metadata of a GGUF file <-> a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Optional

from .sentencepieces import CONTROL, UNUSED, USER_DEFINED, pieces_of, sentencepiece_model
from .system.checks import whole
from .system.printable import shortened
from .tokenizer import AddedToken, Spaced, Tokenizer
from .tokenizer_json import whole_model
from .weights.gguf_header import read_header
from .weights.places import find_gguf

KEY = "tokenizer.ggml."
# GGUF's names of the ids that SentencePiece knows, and the ids that llama.cpp takes if a file does not state them.
IDS = {
    "bos_id": ("bos_token_id", 1), "eos_id": ("eos_token_id", 2), "unk_id": ("unknown_token_id", 0),
    "pad_id": ("padding_token_id", -1),
}  # fmt: skip
STOPS = ("eot_token_id", "eom_token_id")  # ids that end an answer, beside EOS
SPACES = {
    "add_dummy_prefix": ("add_space_prefix", True),
    "remove_extra_whitespaces": ("remove_extra_whitespaces", False),
}


class Vocabulary(NamedTuple):
    """The bytes of a SentencePiece model, and what a `Tokenizer` knows beside it."""

    proto: bytes
    added: list[AddedToken]
    stops: set[int]
    chat_template: Optional[str]
    bos: Optional[str] = None  # the texts of BOS and EOS in templates; None: those of their pieces
    eos: Optional[str] = None
    spaced: Spaced = "all"  # llama.cpp's way


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF model, of which `path` is a file. ValueError if it has none, or another kind than Llama
    2's."""
    path = (find_gguf(path) or [path])[0]
    metadata = read_header(path).metadata
    way_out = "pass tokenizer_path (--tokenizer_path), the tokenizer.model of that model"
    if (kind := metadata.get(f"{KEY}model")) != "llama":
        problem = (
            "has no tokenizer"
            if kind is None
            else f"has a tokenizer of kind {shortened(kind)}, not SentencePiece ('llama')"
        )
        raise ValueError(f"{path} {problem}; {way_out}, if it is a Llama 2 model")
    try:
        return _vocabulary(metadata)
    except ValueError as error:
        raise ValueError(f"{path} has a damaged tokenizer: {error}; {way_out}") from error


def _vocabulary(metadata: dict[str, Any]) -> Vocabulary:
    texts, scores, kinds = (
        _array(metadata, name, of) for name, of in (("tokens", str), ("scores", float), ("token_type", int))
    )
    if not len(texts) == len(scores) == len(kinds) > 0:
        raise ValueError(f"{len(texts)} tokens, {len(scores)} scores, and {len(kinds)} kinds of them")
    ids = {name: _id(metadata, theirs, usual) for name, (theirs, usual) in IDS.items()}
    if ids["pad_id"] == ids["unk_id"]:
        ids["pad_id"] = -1
    named = [i for i, kind in enumerate(kinds) if kind != UNUSED] + [*ids.values()]
    count = min(max(named) + 1, len(texts))  # rows of the model behind them have no name
    apart = {i for i in range(count) if kinds[i] in (CONTROL, USER_DEFINED)} - {*ids.values()}
    spaces = {name: metadata.get(KEY + theirs, usual) is True for name, (theirs, usual) in SPACES.items()}
    pieces = [(texts[i], scores[i], CONTROL if i in apart else kinds[i]) for i in range(count)]
    arguments: dict[str, Any] = {**ids, **spaces}
    proto = sentencepiece_model(pieces, **arguments)
    stops = {_id(metadata, name, -1) for name in STOPS}
    template = metadata.get("tokenizer.chat_template")
    return Vocabulary(
        proto,
        [AddedToken(i, texts[i]) for i in sorted(apart)],
        {i for i in stops if i >= 0},
        template if isinstance(template, str) else None,
    )


def _array(metadata: dict[str, Any], name: str, of: type) -> tuple[Any, ...]:
    values = metadata.get(KEY + name)
    if not isinstance(values, tuple) or not all(type(value) is of for value in values):
        raise ValueError(f"{KEY}{name} is {shortened(values)} and not an array of {of.__name__}")
    return values


def _id(metadata: dict[str, Any], name: str, usual: int) -> int:
    number = whole(value := metadata.get(KEY + name, usual))
    if number is None:
        raise ValueError(f"{KEY}{name}={shortened(value)} is no id")
    return -1 if number == 2**32 - 1 else number  # what -1 is as a number without a sign


def vocabulary_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata of a GGUF file that say what a tokenizer is; `read_vocabulary` backwards."""
    model = tokenizer.sp_model
    pieces = pieces_of(whole_model(tokenizer))
    texts, kinds = [text for text, _, _ in pieces], [kind for _, _, kind in pieces]
    for i, token in tokenizer.added.items():
        texts[i], kinds[i] = token.content, CONTROL
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    ids["unk_id"] = tokenizer.sp_model.unk_id()
    metadata = {
        f"{KEY}model": "llama",
        f"{KEY}tokens": texts,
        f"{KEY}scores": [score for _, score, _ in pieces],
        f"{KEY}token_type": kinds,
        **{KEY + IDS[name][0]: i for name, i in ids.items() if i >= 0},
        **{KEY + name: i for name, i in zip(STOPS, sorted(tokenizer.stop_ids - {tokenizer.eos_id}))},
        f"{KEY}add_bos_token": True,
        f"{KEY}add_eos_token": False,
        KEY + SPACES["add_dummy_prefix"][0]: model.Normalize("a") != "a",
        KEY + SPACES["remove_extra_whitespaces"][0]: model.Normalize("a  b") == model.Normalize("a b"),
    }
    return metadata | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})
