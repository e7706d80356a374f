"""SentencePiece text <-> ids; ids -> text while they arrive. Pieces and ids are the model file's own, and those that a
fine-tune has added. `tokenizer_files` finds them in a folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from logging import getLogger
from typing import Literal, NamedTuple, Optional, Union

from sentencepiece import SentencePieceProcessor

from .sentencepieces import without_space
from .system.checks import whole
from .system.files import is_there, read_file
from .system.files import user_path as user_path
from .system.printable import shortened

logger = getLogger(__name__)

MODEL_BYTES = 2**26  # a larger tokenizer.model is refused; Llama 2's has half a million bytes

Spaced = Literal["all", "words", "first"]  # `Tokenizer` says what each means
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # bytes that are not UTF-8, or not yet whole, decode to this


class AddedToken(NamedTuple):
    """A token that a fine-tune has added. Text becomes its id only where that is asked for.

    lstrip, rstrip: it takes the spaces before or behind it with it.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer:
    """A SentencePiece model, and tokens that were added to it.

    bos_id, eos_id, pad_id: ids of the control pieces; pad_id is -1 for Llama 2, which has no padding piece. n_words:
    how many ids there are; `rows` if given, some of which may have no name. named: control pieces and added tokens,
    text -> id; text never becomes them by itself. nameless: ids that have no text, and are never drawn. stop_ids: ids
    that end an answer; eos_id is one of them. chat_template: the folder's own, in Jinja; boundaries: its bos_token and
    eos_token, if the folder names them. spaced: which parts of a text get SentencePiece's space in front if control
    pieces split it: "all", as SentencePiece does it; "words", those that begin without a space; or only the "first", if
    it begins without one. transformers knows these three.

    Args:
        model_path: the file tokenizer.model, or its folder.
        added: tokens of a fine-tune. Default: none.
        rows: rows of the model's embedding, if they are not as many as pieces.
        proto: the model's bytes, if they do not lie at `model_path`.

    Raises:
        ValueError: `model_path` is missing, or is not a SentencePiece model.
    """

    chat_template: Optional[str] = None
    boundaries: tuple[Optional[str], Optional[str]] = (None, None)
    spaced: Spaced = "all"

    def __init__(
        self,
        model_path: str,
        *,
        added: Sequence[AddedToken] = (),
        rows: Optional[int] = None,
        proto: Optional[bytes] = None,
    ) -> None:
        path = user_path(model_path)
        path = path / "tokenizer.model" if path.is_dir() and path.name != "tokenizer.model" else path
        if not is_there(path):
            raise ValueError(f"no tokenizer at {path}; pass the path of Llama 2's tokenizer.model")
        model = proto or read_file(path, MODEL_BYTES, "a tokenizer.model has a few million bytes at most")
        self.sp_model = SentencePieceProcessor()
        try:
            self.sp_model.LoadFromSerializedProto(model)
            self._pieces: int = self.sp_model.vocab_size()
            self.sp_model.DecodeIds(list(range(self._pieces)))  # fails if the text of a piece is damaged
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a SentencePiece model, or damaged; pass the path of a tokenizer.model"
            ) from error
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        if min(self.bos_id, self.eos_id) < 0 or self.bos_id == self.eos_id:
            raise ValueError(
                f"{path} has no two control pieces for the begin and the end of a text (<s> has the id {self.bos_id}, "
                f"</s> {self.eos_id}); pass the tokenizer.model that belongs to the checkpoint"
            )
        own = {self.bos_id, self.eos_id, self.pad_id, self.sp_model.unk_id()}
        self.added = {token.id: token for token in added if token.id not in own and (rows is None or token.id < rows)}
        self.n_words: int = max(rows or 0, self._pieces, *(i + 1 for i in self.added), 0)
        self.named = {self.sp_model.IdToPiece(i): i for i in range(self._pieces) if self.sp_model.IsControl(i)}
        self.named.update((token.content, i) for i, token in self.added.items())
        unused = filter(self.sp_model.IsUnused, range(self._pieces))
        self.nameless = frozenset([*unused, *range(self._pieces, self.n_words)]) - self.added.keys()
        self.other_stops: frozenset[int] = frozenset()
        logger.info("%s: %d pieces, BOS %d, EOS %d", path, self.n_words, self.bos_id, self.eos_id)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: EOS, and what else the folder names."""
        return self.other_stops | {self.eos_id}

    def encode(self, s: str, bos: bool, eos: bool, *, special: bool = False) -> list[int]:
        """The ids of a text. Text never becomes a control id: `</s>` in it is read as ordinary characters.

        Args:
            s: the text.
            bos, eos: put the id of the text's begin in front, and that of its end behind.
            special: control pieces and added tokens in the text, those in `named`, become their ids. Default: False.

        Raises:
            ValueError: not a str, or characters that UTF-8 cannot encode.
        """
        if not isinstance(s, str):
            raise ValueError(f"only a str can be encoded, not {type(s).__name__}")
        ids: list[int] = []
        begun = False  # whether something lies before the text that comes next
        for text, control in self._parts(s) if special else [(s, None)]:
            if text or not special:
                ids += (
                    self.encode_behind(text)
                    if special and self.is_bare(text, begun)
                    else self._encode(self.sp_model, text)
                )
            if control is not None:
                ids.append(control)
            begun = True
        return ([self.bos_id] if bos else []) + ids + ([self.eos_id] if eos else [])

    def is_bare(self, text: str, begun: bool) -> bool:
        """Whether a text between control pieces gets none of SentencePiece's space. begun: something lies before it."""
        return self.spaced != "all" and (text[:1] == " " or (begun and self.spaced == "first"))

    def encode_behind(self, s: str) -> list[int]:
        """The ids of `s` as they are behind other text, without SentencePiece's space in front."""
        return self._encode(self._without_space, s)

    @staticmethod
    def _encode(model: SentencePieceProcessor, text: str) -> list[int]:
        try:
            ids: list[int] = model.EncodeAsIds(text)
        except RuntimeError as error:  # half of a surrogate pair
            raise ValueError(f"{text!r} has characters that UTF-8 cannot encode") from error
        return ids

    @cached_property
    def _without_space(self) -> SentencePieceProcessor:
        """The same SentencePiece model, but for the space that it puts in front of a text."""
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(without_space(self.sp_model.serialized_model_proto()))
        return model

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        """What is in `named`, the longest first."""
        strips = {token.content: (token.lstrip, token.rstrip) for token in self.added.values()}
        patterns = []
        for text in sorted(self.named, key=len, reverse=True):
            left, right = strips.get(text, (False, False))
            patterns.append(rf"{left * '[ ]*'}({re.escape(text)}){right * '[ ]*'}".replace("[ ]", r"\s"))
        return re.compile("|".join(patterns) or "(?!)")

    def _parts(self, s: str) -> Iterable[tuple[str, Optional[int]]]:
        """Texts of `s`, each with the control id behind it."""
        at = 0
        for found in self._controls.finditer(s):
            yield s[at : found.start()], self.named[found[found.lastindex or 0]]
            at = found.end()
        yield s[at:], None

    @staticmethod
    def _id(value: object) -> int:
        """An id of numpy's or torch's kind as Python's."""
        if (number := whole(value)) is None:
            raise ValueError(f"{shortened(value)} is no id; ids are whole numbers, in a list")
        return number

    def decode(self, t: Union[int, Sequence[int]]) -> str:
        """The text of one id or of many. SentencePiece's space before a text is dropped. Control ids give no text,
        added tokens give theirs.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = [t] if isinstance(t, int) else [i if type(i) is int else self._id(i) for i in t]
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(f"id {i} is outside the vocabulary; ids go from 0 to {self.n_words - 1}")
        if not self._beyond:
            text: str = self.sp_model.DecodeIds(ids)
            return text
        texts, pieces = [""], list[int]()
        for token in [*ids, None]:
            if token is not None and token not in self._beyond:
                pieces.append(token)
                continue
            if pieces and len(texts) > 1:  # behind an added token a space is part of the text
                anchor, length = self._anchor
                texts.append(self.sp_model.DecodeIds([anchor, *pieces])[length:])
            else:
                texts.append(self.sp_model.DecodeIds(pieces))
            pieces = []
            if token is not None:
                texts.append(self._beyond[token])
        return "".join(texts)

    def piece(self, i: int) -> str:
        """The name of an id, as SentencePiece has it."""
        return (
            self.added[i].content if i in self.added else f"<{i}>" if i in self.nameless else self.sp_model.IdToPiece(i)
        )

    @cached_property
    def _beyond(self) -> dict[int, str]:
        """Text of the ids that SentencePiece does not know as such."""
        return {**dict.fromkeys(self.nameless, ""), **{i: token.content for i, token in self.added.items()}}

    def split(self, ids: Iterable[int]) -> list[str]:
        """What each id adds to the text: as many strings as ids, which joined are exactly `decode(ids)`."""
        decoder = StreamDecoder(self)
        texts = [decoder.add(i) for i in ids]
        rest = decoder.finish()
        if rest:
            texts[-1] += rest
        return texts

    @cached_property
    def controls(self) -> frozenset[int]:
        """The ids in `named`."""
        return frozenset(self.named.values())

    @cached_property
    def _anchor(self) -> tuple[int, int]:
        """The id of a piece to decode before others, since at the start of a text their space would be dropped; and its
        length."""
        for i in range(self._pieces):
            piece: str = self.sp_model.IdToPiece(i)
            if (
                not (self.sp_model.IsControl(i) or self.sp_model.IsUnknown(i) or self.sp_model.IsByte(i))
                and "▁" not in piece
            ):
                return i, len(self.sp_model.DecodeIds(i))
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
        return token in tokenizer.controls
    return token in (tokenizer.bos_id, tokenizer.eos_id)


def encode_plain(tokenizer: Tokenizer, text: str, controls: Collection[int], *, behind: bool = False) -> list[int]:
    """The ids of a text, none of them in `controls`: some vocabularies have these as pieces that text becomes.

    behind: other text stands before it, so it gets none of SentencePiece's space in front.
    """
    ids = tokenizer.encode_behind(text) if behind else tokenizer.encode(text, bos=False, eos=False)
    if set(controls).isdisjoint(ids):
        return ids
    start, rest = ([], text) if behind else (tokenizer.encode(text[0], bos=False, eos=False), text[1:])
    return [*start, *(i for character in rest for i in tokenizer.encode_behind(character))]


class StreamDecoder:
    """Text from ids as they come. The strings that `add` and `finish` return, joined, are `decode` of all ids.

    Text that may still change is held back: a character waits until all its bytes have come. A user's own tokenizer,
    which has only Meta's methods, decodes all ids again for each new one.
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
        anchor, length = self.tokenizer._anchor
        return self.tokenizer.decode([anchor, *self._waiting])[length:]


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
