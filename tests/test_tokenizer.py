from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from conftest import TEXT, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Tokenizer
from llama.tokenizer import StreamDecoder
from llama.tokenizer_files import find_tokenizer, need_tokenizer, open_tokenizer


def test_attributes_and_marks(tokenizer: Tokenizer) -> None:
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (400, 1, 2, -1)
    plain = tokenizer.encode("the tree", bos=False, eos=False)
    assert tokenizer.encode("the tree", bos=True, eos=True) == [1, *plain, 2]
    assert tokenizer.decode([1, *plain, 2]) == "the tree"
    assert tokenizer.decode(plain[0]) == tokenizer.sp_model.decode(plain[0])


def test_published_vectors() -> None:
    """Ids that llama2.c, llama.cpp and llama-tokenizer-js publish for Llama 2's tokenizer."""
    tokenizer = Tokenizer(str(shared("tokenizers/llama2/tokenizer.model")))
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32000, 1, 2, -1)
    count = 0
    for source, pairs in json.loads(shared("tokenizers/published_vectors.json").read_text(encoding="utf-8")).items():
        for text, ids in pairs:
            with_bos = ids[:1] == [1]
            assert tokenizer.encode(text, bos=with_bos, eos=False) == ids, (source, text)
            assert "".join(tokenizer.split(ids)) == tokenizer.decode(ids)
            count += 1
    assert count == 60


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("I believe the meaning of life is", "306 4658 278 6593 310 2834 338"),
        (
            "Simply put, the theory of relativity states that ",
            "3439 17632 1925 29892 278 6368 310 14215 537 5922 393 29871",
        ),
        ("I believe, the meaning of life is ", "306 4658 29892 278 6593 310 2834 338 29871"),
        ("Simply", "3439 17632"),
        ("simply", "3763"),
        ("Big", "7997"),
        ("big", "4802"),
    ],
)
def test_the_experiments_prompts(text: str, ids: str) -> None:
    tokenizer = Tokenizer(str(shared("tokenizers/llama2/tokenizer.model")))
    assert tokenizer.encode(text, bos=True, eos=False) == [1, *map(int, ids.split())]


def test_the_experiments_own_vocabulary() -> None:
    """A unigram model of 420 pieces, in which two words of the text are missing: they become id 0 and come back as
    ⁇."""
    tokenizer = Tokenizer(str(shared("tokenizers/experiment/tokenizer.model")))
    text = "测试一下,看看什么情况"
    assert tokenizer.sp_model.EncodeAsPieces(text) == "▁ 测试 一 下 , 看 看 什么 情 况".split()
    ids = [1, 4, 0, 11, 141, 3, 76, 76, 0, 317, 310]
    assert tokenizer.encode(text, bos=True, eos=False) == ids
    assert tokenizer.decode(ids) == " ⁇ 一下,看看 ⁇ 情况"
    assert "".join(tokenizer.split(ids)) == " ⁇ 一下,看看 ⁇ 情况"


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any ids at all: control ids, unknown, halves of characters. No string ends inside a character."""
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.add(i) for i in ids]
    assert not any(part.endswith("\ufffd") for part in parts)
    assert "".join(parts) + decoder.finish() == tokenizer.decode(ids)
    assert "".join(tokenizer.split(ids)) == tokenizer.decode(ids)
    assert len(tokenizer.split(ids)) == len(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from(TEXT.splitlines()) | st.text("  a你🌍\n", max_size=20))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """Byte fallback carries any text; only U+2581, SentencePiece's own sign for a space, becomes a space."""
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert "".join(tokenizer.split(ids)) == tokenizer.decode(ids)


def test_spaces_and_emoji_stream(tokenizer: Tokenizer) -> None:
    """Decoding id by id lost the spaces and broke the emoji, whose four bytes are four ids."""
    ids = tokenizer.encode("the tree 🌍 ran", bos=False, eos=False)
    parts = tokenizer.split(ids)
    assert "".join(parts) == "the tree 🌍 ran"
    assert parts.count("") == 3
    assert "🌍" in parts


def test_bad_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere; pass the path"):
        Tokenizer("nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        Tokenizer(str(tmp_path / "tokenizer.model"))
    for wrong in (3, None, b"bytes", ["a"]):
        with pytest.raises(ValueError, match="only a str can be encoded"):
            tokenizer.encode(wrong, bos=True, eos=False)  # type: ignore[arg-type]
    for wrong_id in (-1, 400):
        with pytest.raises(ValueError, match=f"id {wrong_id} is outside the vocabulary; ids go from 0 to 399"):
            tokenizer.decode([5, wrong_id])


def test_home_and_logger(
    tokenizer_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(Path(tokenizer_path).parent))
    with caplog.at_level(logging.INFO, logger="llama.tokenizer"):
        assert Tokenizer("~/tokenizer.model").n_words == 400
    assert "400 pieces" in caplog.text


def test_a_folder_as_its_path(tokenizer_path: str, tmp_path: Path) -> None:
    """People pass the checkpoint's folder; once it was "a folder, and not a file"."""
    folder = Path(tokenizer_path).parent
    assert Tokenizer(str(folder)).n_words == open_tokenizer(tmp_path, folder).n_words == 400
    assert need_tokenizer(tmp_path, folder) == Path(tokenizer_path)
    with pytest.raises(
        ValueError, match=r"no tokenizer.model or tokenizer.json in tokenizer_path=.*, which holds nothing"
    ):
        find_tokenizer(folder, tmp_path)
