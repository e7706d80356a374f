"""Vocabularies of other files as SentencePiece models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT

from llama import Tokenizer
from llama.tokenizer_files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, sentencepiece_model

IDS: dict[str, Any] = {"bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": -1, "add_dummy_prefix": True}


def pieces_of(tokenizer: Tokenizer) -> list[tuple[str, float, int]]:
    model = tokenizer.sp_model
    kinds = {CONTROL: model.IsControl, UNKNOWN: model.IsUnknown, UNUSED: model.IsUnused, BYTE: model.IsByte}
    return [
        (model.IdToPiece(i), model.GetScore(i), next((kind for kind, of in kinds.items() if of(i)), NORMAL))
        for i in range(tokenizer.n_words)
    ]


def opened(path: Path, model: bytes) -> Tokenizer:
    path.write_bytes(model)
    return Tokenizer(str(path))


def test_a_rebuilt_model_reads_text_as_the_original_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rebuilt = opened(tmp_path / "a.model", sentencepiece_model(pieces_of(tokenizer), **IDS))
    for line in [*TEXT.splitlines(), "  two  spaces \t\n", "🦙 <s> </s> <unk>", "", "NaïvE 12345"]:
        ids = tokenizer.encode(line, True, True)
        assert rebuilt.encode(line, True, True) == ids
        assert rebuilt.decode(ids) == tokenizer.decode(ids)
    assert (rebuilt.bos_id, rebuilt.eos_id, rebuilt.pad_id) == (1, 2, -1)


def test_the_ways_to_read_spaces(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = opened(tmp_path / "a.model", sentencepiece_model(pieces_of(tokenizer), **{**IDS, "add_dummy_prefix": False}))
    assert plain.decode(plain.encode("a", False, False)) == "a"
    assert plain.encode(" a", False, False) == tokenizer.encode("a", False, False)
    joined = sentencepiece_model(pieces_of(tokenizer), **IDS, remove_extra_whitespaces=True)
    assert opened(tmp_path / "b.model", joined).encode(" a  b ", False, False) == tokenizer.encode("a b", False, False)


def test_named_ids_become_control_pieces(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Other files call them ordinary pieces now and then, and then text would become them."""
    pieces = [(text, score, NORMAL if i < 3 else kind) for i, (text, score, kind) in enumerate(pieces_of(tokenizer))]
    rebuilt = opened(tmp_path / "a.model", sentencepiece_model(pieces, **{**IDS, "pad_id": 2}))
    assert (rebuilt.bos_id, rebuilt.eos_id, rebuilt.pad_id) == (1, 2, 2)
    assert not {0, 1, 2} & set(rebuilt.encode("<s></s><s>", False, False))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bos_id": 3}, "bos_id=3 has no piece; there are 3"),
        ({"pad_id": -2}, "pad_id=-2 has no piece"),
        ({"unk_id": -1}, "unk_id=-1 has no piece"),
        ({"pieces": [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("a", 0.0, 7)]}, "the piece 3 is of kind 7"),
        ({"pieces": [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("\ud800", 0.0, 1)]}, "surrogates"),
    ],
)
def test_what_is_no_vocabulary(change: dict[str, Any], told: str) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    with pytest.raises(ValueError, match=told):
        sentencepiece_model(**{"pieces": pieces, **IDS, **change})
