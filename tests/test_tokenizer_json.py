"""Vocabularies of other files as SentencePiece models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT

from llama import Tokenizer, sentencepieces
from llama.sentencepieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, sentencepiece_model
from llama.tokenizer_files import open_tokenizer
from llama.tokenizer_json import hf_tokenizer

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
    plain = opened(
        tmp_path / "a.model", sentencepiece_model(pieces_of(tokenizer), **{**IDS, "add_dummy_prefix": False})
    )
    assert plain.decode(plain.encode("a", False, False)) == "a"
    assert plain.encode(" a", False, False) == tokenizer.encode("a", False, False)
    joined = sentencepiece_model(pieces_of(tokenizer), **IDS, remove_extra_whitespaces=True)
    assert opened(tmp_path / "b.model", joined).encode(" a  b ", False, False) == tokenizer.encode("a b", False, False)


@pytest.mark.parametrize("flag", [False, True])
def test_googles_library_reads_and_writes_the_same(flag: bool) -> None:
    """Every field by its name; and other fields are passed over."""
    google = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    marks = [(text, 0.0, NORMAL) for text in ("<none>", "<go>", "<stop>", "<fill>")]
    more = [("x" * 200, -1.5, NORMAL), ("old", 0.0, UNUSED), *[("<0x41>", 2.0, BYTE)] * flag]
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3 if flag else -1}
    model = sentencepiece_model([*marks, *more], **ids, add_dummy_prefix=flag, remove_extra_whitespaces=not flag)
    read = google.ModelProto.FromString(model)
    kinds = [UNKNOWN, CONTROL, CONTROL, CONTROL if flag else NORMAL]
    pieces = [*((text, score, kind) for (text, score, _), kind in zip(marks, kinds)), *more]
    assert [(piece.piece, piece.score, piece.type) for piece in read.pieces] == pieces
    trainer, normalizer = read.trainer_spec, read.normalizer_spec
    assert (trainer.model_type, trainer.vocab_size, trainer.byte_fallback) == (trainer.BPE, len(pieces), flag)
    assert {name: getattr(trainer, name) for name in ids} == ids
    names = [getattr(trainer, name.replace("id", "piece")) for name in ids]
    assert names == ["<none>", "<go>", "<stop>", "<fill>" if flag else ""]
    told = (normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces)
    assert told == ("identity", flag, not flag)
    assert not google.ModelProto.FromString(sentencepieces.without_space(model)).normalizer_spec.add_dummy_prefix
    read.pieces.add(piece="c")
    read.pieces.add()
    fixed = bytes([15 << 3 | 1, *bytes(8), 15 << 3 | 5, *bytes(4)])  # numbers of 64 and of 32 bits
    pieces += [("c", 0.0, NORMAL), ("", 0.0, NORMAL)]
    assert sentencepieces.pieces_of(fixed + read.SerializeToString()) == pieces


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


# tokenizer.json

LINES = [
    *TEXT.splitlines(),
    "  two  spaces \t\n",
    "🦙 <s> </s> <unk>",
    "",
    "NaïvE 12345",
    "日本語　と ▁ a▁b",
    "\u200bzero\r\n",
]


@pytest.fixture(scope="module")
def folder(tokenizer_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.json alone, as transformers saves one."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("saved")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}))
    (folder / "tokenizer.model").write_bytes(Path(tokenizer_path).read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
    return folder / "saved"


def check_same(ours: Tokenizer, original: Tokenizer) -> None:
    assert (ours.n_words, ours.bos_id, ours.eos_id) == (original.n_words, original.bos_id, original.eos_id)
    for line in LINES:
        assert ours.encode(line, True, True) == original.encode(line, True, True), line
        assert ours.decode(ours.encode(line, True, True)) == original.decode(original.encode(line, True, True))


def test_rebuilt_from_what_transformers_saves(folder: Path, tokenizer: Tokenizer) -> None:
    assert not (folder / "tokenizer.model").exists()
    check_same(open_tokenizer(folder), tokenizer)


def test_rebuilt_from_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf_tokenizer(tokenizer)))
    check_same(open_tokenizer(tmp_path), tokenizer)
    check_same(open_tokenizer(tmp_path / "elsewhere", tmp_path / "tokenizer.json"), tokenizer)  # given by its path


def test_added_tokens_in_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = hf_tokenizer(tokenizer)
    whole["added_tokens"].append({"id": 400, "content": "<|im_end|>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}})
    )
    ours = open_tokenizer(tmp_path)
    assert ours.named["<|im_end|>"] == 400
    assert (ours.bos_id, ours.eos_id, ours.stop_ids, ours.n_words) == (1, 2, {2, 400}, 401)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"type": "WordPiece"}}, "its model is 'WordPiece', and not BPE"),
        ({"model": {"type": "Unigram"}}, "its model is 'Unigram', and not BPE"),
        ({"model": {"byte_fallback": False}}, "it has no byte pieces"),
        ({"decoder": {"type": "ByteLevel"}}, "it is byte-level BPE, as GPT-2's and Llama 3's"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}},
            "byte-level BPE",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre_tokenizer is 'Whitespace'"),
        ({"normalizer": {"type": "NFKC"}}, "its normalizer is 'NFKC'"),
        ({"model": {"vocab": {"a": 0, "b": 2}}}, "the ids of its 2 pieces are not 0 to 1"),
        ({"model": {"merges": ["a"]}}, "it merges 'a', which are no two pieces that make a third"),
        ({"model": {"merges": [["x", "\ud800"]]}}, "which are no two pieces"),
        ({"model": None}, "its model is None"),
    ],
)
def test_other_kinds_are_refused_by_name(
    change: dict[str, Any], told: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = hf_tokenizer(tokenizer)
    for key, value in change.items():
        whole[key] = {**whole[key], **value} if key == "model" and value else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=told):
        open_tokenizer(tmp_path)


def test_damaged_files_are_refused_or_harmless(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text, rng, refused = (folder / "tokenizer.json").read_bytes(), random.Random(1), 0
    for i in range(60):
        data = bytearray(text)
        if i % 3:
            for _ in range(rng.choice([1, 1, 5])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        (tmp_path / "tokenizer.json").write_bytes(data)
        try:
            ours = open_tokenizer(tmp_path)
        except ValueError:
            refused += 1
        else:
            assert ours.n_words >= tokenizer.n_words
            ours.decode(ours.encode("the little", True, True))
    assert refused > 30
