"""tokenizer.json <-> SentencePiece: the vocabulary of transformers, and that of Meta's tokenizer.model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Optional

from .sentencepieces import (
    BYTE,
    CONTROL,
    NORMAL,
    TRAINER,
    UNKNOWN,
    UNUSED,
    VOCAB_SIZE,
    field,
    more_pieces,
    sentencepiece_model,
)
from .system.files import read_json
from .system.printable import shortened
from .tokenizer import AddedToken, Tokenizer

JSON_BYTES = 2**27  # a larger tokenizer.json is refused; Llama 2's has two million bytes


def whole_model(tokenizer: Tokenizer) -> bytes:
    """The bytes of a SentencePiece model that has a piece for each id, the added tokens too: control pieces, which text
    never becomes. Ids without a name are unused pieces."""
    own: bytes = tokenizer.sp_model.serialized_model_proto()
    count = tokenizer.sp_model.vocab_size()
    if tokenizer.n_words == count:
        return own
    taken = {tokenizer.sp_model.IdToPiece(i) for i in range(count)}
    more = []
    for i in range(count, tokenizer.n_words):
        text = tokenizer.piece(i) if tokenizer.piece(i) not in taken else f"<{i}>"
        more.append((text, 0.0, UNUSED if i in tokenizer.nameless else CONTROL))
        taken.add(text)
    return own + more_pieces(more) + field(TRAINER, field(VOCAB_SIZE, tokenizer.n_words))


def steps(step: Any) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, one after another."""
    if not isinstance(step, dict):
        return []
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [each for each in inner if isinstance(each, dict)] if isinstance(inner, list) else [step]


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """A tokenizer.json. ValueError if it is no JSON object."""
    return read_json(path, "a tokenizer.json has a few million bytes", JSON_BYTES)


def rebuilt(path: Path, tokenizer: dict[str, Any], bos: Optional[str] = None, eos: Optional[str] = None) -> bytes:
    """The SentencePiece model that a tokenizer.json was made from, as bytes. path: where it lies, for messages. bos,
    eos: the texts of those two pieces.

    The pairs that it merges, in their order, are the order of the pieces' scores. ValueError for another kind of
    tokenizer.
    """
    model = tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    if problem := _kind_problem(tokenizer, model) or _vocab_problem(model):
        raise ValueError(f"{path} is no tokenizer of Llama 2's kind: {problem}; pass the path of a tokenizer.model")
    vocab = model["vocab"]
    added = {entry.get("content") for entry in tokenizer.get("added_tokens") or () if isinstance(entry, dict)}
    texts = {i: text for text, i in vocab.items()}
    rank: dict[str, int] = {}  # piece -> place of the first merge that makes it
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(_pair(merge)), i)
    # Those of a fine-tune may be added tokens; the pieces of the SentencePiece model are still its own.
    unknown = model.get("unk_token") or "<unk>"
    begin, end = (text if text in vocab else own for text, own in ((bos, "<s>"), (eos, "</s>")))
    if missing := [text for text in (unknown, begin, end) if text not in vocab]:
        raise ValueError(f"{path} has no piece {shortened(missing[0])}; pass the path of a tokenizer.model")

    def piece(i: int) -> tuple[str, float, int]:
        text = texts[i]
        if text == unknown:
            return text, 0.0, UNKNOWN
        if text in added or text in (begin, end):
            return text, 0.0, CONTROL
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            return text, 0.0, BYTE
        if not text.strip("▁"):  # runs of spaces, which are joined last
            return text, -1e9, NORMAL
        return text, -float(rank[text]) if text in rank else -1e6 - i, NORMAL

    kinds = [step.get("type") for step in steps(tokenizer.get("normalizer"))]
    before = steps(tokenizer.get("pre_tokenizer"))
    return sentencepiece_model(
        [piece(i) for i in range(len(texts))],
        bos_id=vocab[begin], eos_id=vocab[end], unk_id=vocab[unknown], pad_id=-1,
        add_dummy_prefix="Prepend" in kinds or any(step.get("prepend_scheme") != "never" for step in before),
        remove_extra_whitespaces="Strip" in kinds,
    )  # fmt: skip


def _kind_problem(tokenizer: dict[str, Any], model: dict[str, Any]) -> str:
    """Why this is not SentencePiece's BPE with byte pieces; empty if it is."""
    if (kind := model.get("type")) != "BPE":
        return f"its model is {shortened(kind)}, and not BPE"
    before = [step.get("type") for key in ("pre_tokenizer", "decoder") for step in steps(tokenizer.get(key))]
    if "ByteLevel" in before:
        return "it is byte-level BPE, as GPT-2's and Llama 3's"
    if model.get("byte_fallback") is not True:
        return "it has no byte pieces for what the vocabulary lacks"
    if other := {"continuing_subword_prefix", "end_of_word_suffix", "dropout"} & {key for key in model if model[key]}:
        return f"it has {', '.join(sorted(other))}"
    allowed = {"normalizer": {"Prepend", "Replace", "Strip"}, "pre_tokenizer": {"Metaspace"}}
    for key, kinds in allowed.items():
        for step in steps(tokenizer.get(key)):
            if step.get("type") not in kinds or step.get("split") is True:
                return f"its {key} is {shortened(step.get('type'))}"
    return ""


def _vocab_problem(model: dict[str, Any]) -> str:
    """What is wrong with its pieces and merges; empty if nothing is."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not vocab:
        return "it has no vocabulary, or no merges"
    if not all(type(i) is int for i in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        return f"the ids of its {len(vocab)} pieces are not 0 to {len(vocab) - 1}"
    for merge in merges:
        if (pair := _pair(merge)) is None or not {*pair, "".join(pair)} <= vocab.keys():
            return f"it merges {shortened(merge)}, which are no two pieces that make a third"
    return ""


def _pair(merge: Any) -> Any:
    """A merge, "a b" or ["a", "b"], as its two texts; None for anything else."""
    pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
    return pair if len(pair) == 2 and all(isinstance(text, str) for text in pair) else None


def hf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json: the same pieces and ids, for transformers, which then needs no other file.

    SentencePiece joins the two neighbours whose piece scores best; tokenizer.json lists the pairs in that order.
    """
    model = tokenizer.sp_model
    pieces = [model.IdToPiece(i) for i in range(model.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    special = [i for i in range(len(pieces)) if model.IsControl(i) or model.IsUnknown(i)]
    apart = {*special, *(i for i in ids.values() if model.IsByte(i) or model.IsUnused(i))}
    merges: list[tuple[str, str]] = []
    for i in sorted(set(ids.values()) - apart, key=lambda i: (-model.GetScore(i), i)):
        splits = ((pieces[i][:at], pieces[i][at:]) for at in range(1, len(pieces[i])))
        merges += sorted((s for s in splits if s[0] in ids and s[1] in ids), key=lambda s: (ids[s[0]], ids[s[1]]))
    spaces: list[dict[str, Any]] = []
    if model.EncodeAsIds("a  b") == model.EncodeAsIds("a b"):  # not Llama's: its vocabulary has runs of spaces
        spaces = [{"type": "Strip", "strip_left": True, "strip_right": True},
                  {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]  # fmt: skip
    scheme = {"words": "always", "first": "first"}.get(tokenizer.spaced)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    begin = {"SpecialToken": {"id": pieces[tokenizer.bos_id], "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "pre_tokenizer": metaspace if scheme else None,
        "added_tokens": [
            {"id": token.id, "content": token.content, "special": True, "normalized": False, "single_word": False,
             "lstrip": token.lstrip, "rstrip": token.rstrip}
            for token in [*(AddedToken(i, pieces[i]) for i in special if i not in tokenizer.added),
              *tokenizer.added.values()]
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*spaces, *([] if scheme else [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ])]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [begin, text[0]], "pair": [begin, text[0], begin, text[1]],
            "special_tokens": {pieces[tokenizer.bos_id]: {
                "id": pieces[tokenizer.bos_id], "ids": [tokenizer.bos_id], "tokens": [pieces[tokenizer.bos_id]],
            }},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": pieces[model.unk_id()], "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": ids,
            "merges": [" ".join(pair) for pair in merges],
        },
    }  # fmt: skip
