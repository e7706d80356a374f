"""SentencePiece text <-> ids; ids -> text while they arrive. Pieces and ids are the model file's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from logging import getLogger
from os import PathLike
from pathlib import Path
from typing import Optional, Union

from sentencepiece import SentencePieceProcessor

from .system.files import is_there, read_file

logger = getLogger(__name__)

MODEL_BYTES = 2**26  # a larger tokenizer.model is refused; Llama 2's has half a million bytes

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # bytes that are not UTF-8, or not yet whole, decode to this


def user_path(path: Union[str, PathLike[str]]) -> Path:
    """A path as a user gives it. fire, which reads the examples' flags, makes a number of a folder that is called 7."""
    try:
        return Path(str(path)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} begins with a home folder that does not exist") from error


def find_tokenizer(ckpt_dir: Path, given: Union[str, PathLike[str], None] = None) -> Optional[Path]:
    """The path that was given, or the checkpoint's tokenizer.model; None if there is no such file.

    Meta's layout has one file beside the folders of all models; other layouts have one in each folder.
    """
    if given is not None:
        return user_path(given)
    places = (ckpt_dir / "tokenizer.model", ckpt_dir.absolute().parent / "tokenizer.model")
    return next((path for path in places if is_there(path)), None)


def need_tokenizer(ckpt_dir: Path, given: Union[str, PathLike[str], None] = None) -> Path:
    """As `find_tokenizer`, but ValueError if there is no such file."""
    if path := find_tokenizer(ckpt_dir, given):
        return path
    if not ckpt_dir.is_dir():
        raise ValueError(f"no checkpoint folder at {ckpt_dir}; pass the folder that holds consolidated.00.pth and params.json")
    raise ValueError(f"no tokenizer.model in {ckpt_dir} or in the folder above it; pass tokenizer_path (--tokenizer_path)")


class Tokenizer:
    """A SentencePiece model. pad_id is -1 for Llama 2: it has no padding piece.

    ValueError if `model_path` is missing, or is not a SentencePiece model.
    """

    def __init__(self, model_path: str) -> None:
        path = user_path(model_path)
        if not is_there(path):
            raise ValueError(f"no tokenizer at {path}; pass the path of Llama 2's tokenizer.model")
        model = read_file(path, MODEL_BYTES, "a tokenizer.model has a few million bytes at most")
        self.sp_model = SentencePieceProcessor()
        try:
            self.sp_model.LoadFromSerializedProto(model)
            self.n_words: int = self.sp_model.vocab_size()
            self.sp_model.DecodeIds(list(range(self.n_words)))  # fails if the text of a piece is damaged
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a SentencePiece model, or damaged; pass the path of a tokenizer.model") from error
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        if min(self.bos_id, self.eos_id) < 0 or self.bos_id == self.eos_id:
            raise ValueError(
                f"{path} has no two control pieces for the begin and the end of a text (<s> has the id {self.bos_id}, </s> "
                f"{self.eos_id}); pass the tokenizer.model that belongs to the checkpoint"
            )
        logger.info("%s: %d pieces, BOS %d, EOS %d", path, self.n_words, self.bos_id, self.eos_id)

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`. Text never becomes a control id: `</s>` in it is read as ordinary characters."""
        if not isinstance(s, str):
            raise ValueError(f"only a str can be encoded, not {type(s).__name__}")
        try:
            ids: list[int] = self.sp_model.EncodeAsIds(s)
        except RuntimeError as error:  # half of a surrogate pair
            raise ValueError(f"{s!r} has characters that UTF-8 cannot encode") from error
        return ([self.bos_id] if bos else []) + ids + ([self.eos_id] if eos else [])

    def decode(self, t: Union[int, Sequence[int]]) -> str:
        """The text of one id or of many. SentencePiece's space before a text is dropped; control ids give no text."""
        ids = [t] if isinstance(t, int) else [int(i) for i in t]
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(f"id {i} is outside the vocabulary; ids go from 0 to {self.n_words - 1}")
        text: str = self.sp_model.DecodeIds(ids)
        return text

    def split(self, ids: Iterable[int]) -> list[str]:
        """What each id adds to the text: as many strings as ids, which joined are exactly `decode(ids)`."""
        decoder = StreamDecoder(self)
        texts = [decoder.add(i) for i in ids]
        rest = decoder.finish()
        if rest:
            texts[-1] += rest
        return texts

    @cached_property
    def _anchor(self) -> int:
        """The id of a piece to decode before others: at the start of a text their space would be dropped."""
        for i in range(self.n_words):
            piece: str = self.sp_model.IdToPiece(i)
            if not (self.sp_model.IsControl(i) or self.sp_model.IsUnknown(i) or self.sp_model.IsByte(i)) and "▁" not in piece:
                return i
        raise ValueError("the vocabulary has no piece without a space")


def split(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """`Tokenizer.split`, also for a user's own tokenizer, which has only Meta's methods."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.split(ids)
    stream = StreamDecoder(tokenizer)
    texts = [stream.add(token) for token in ids]
    if texts:
        texts[-1] += stream.finish()
    return texts


def is_control(tokenizer: Tokenizer, token: int) -> bool:
    """Whether an id has no text. Of a user's own tokenizer only BOS and EOS are known."""
    if isinstance(tokenizer, Tokenizer):
        return bool(tokenizer.sp_model.IsControl(token))
    return token in (tokenizer.bos_id, tokenizer.eos_id)


class StreamDecoder:
    """Text from ids as they come. The strings that `add` and `finish` return, joined, are `decode` of all ids.

    Text that may still change is held back: a character waits until all its bytes have come. A user's own tokenizer, which
    has only Meta's methods, decodes all ids again for each new one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._waiting: list[int] = []
        self._at_start = True
        self._given: Optional[str] = None if isinstance(tokenizer, Tokenizer) else ""  # text of all ids so far

    def add(self, token: int) -> str:
        """The text that is certain with this id, and was not before."""
        self._waiting.append(token)
        if self._given is not None:
            text = self.tokenizer.decode(self._waiting)
            if text.endswith(REPLACEMENT) or not text.startswith(self._given):
                return ""
            new, self._given = text[len(self._given) :], text
            return new
        text = self._text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._waiting.clear()
        self._at_start = False
        return text

    def finish(self) -> str:
        """What is still held back, as `decode` shows it."""
        if self._given is not None:
            return self.tokenizer.decode(self._waiting)[len(self._given) :] if self._waiting else ""
        text = self._text() if self._waiting else ""
        self._waiting.clear()
        return text

    def _text(self) -> str:
        if self._at_start:
            return self.tokenizer.decode(self._waiting)
        anchor = self.tokenizer._anchor
        return self.tokenizer.decode([anchor, *self._waiting])[len(self.tokenizer.decode(anchor)) :]


class TextStream:
    """The text of ids as they come, up to the first stop string, which is left out.

    Text that may be the beginning of a stop string is held back until more is known.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stops = stops
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer)
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain with this id; none once a stop string has come."""
        return self._release(self._decoder.add(token))

    def prime(self, tokens: Iterable[int]) -> str:
        """Take an echoed prompt's ids, and return their text. Stop strings in it do not count."""
        return "".join(self._decoder.add(token) for token in tokens)

    def finish(self) -> str:
        """What is still held back."""
        text = self._release(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        keep = next((n for n in range(min(longest, len(text)), 0, -1) if self._may_stop(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stops)
