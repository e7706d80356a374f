"""SentencePiece's model files, read, written and changed: a protocol buffer of pieces, and of settings by their numbers
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).

A field that comes again counts in place of the first, and a list goes on. So what is put behind the bytes of a model
changes it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Union

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, as SentencePiece numbers them
PIECE, TRAINER, NORMALIZER = 1, 2, 3  # fields of a model
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK = 3, 4, 35  # fields of the trainer's part
# name -> the trainer's fields of the id, and of its piece
IDS = {"unk_id": (40, 45), "bos_id": (41, 46), "eos_id": (42, 47), "pad_id": (43, 48)}
BPE = 2
NAME, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 1, 3, 4  # fields of the normalizer's part


def _varint(number: int) -> bytes:
    number &= 2**64 - 1  # negative ones are written as with 64 bits
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def field(number: int, value: Union[int, float, str, bytes]) -> bytes:
    """One field of a message: a whole number or bool, a float of 32 bits, a text, or a message's bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message that SentencePiece has read: their numbers, and whole numbers or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            number |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return number

    while at < len(message):
        key = varint()
        value: Any = None
        if key & 7 == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            at, value = at + size, message[at : at + size]
        yield key >> 3, value


def pieces_of(model: bytes) -> list[tuple[str, float, int]]:
    """The pieces of a model that SentencePiece has read: text, score and kind of each."""
    found = []
    for number, message in _fields(model):
        if number == PIECE:
            piece = {1: b"", 2: bytes(4), 3: NORMAL, **dict(_fields(message))}
            found.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
    return found


def more_pieces(pieces: Sequence[tuple[str, float, int]]) -> bytes:
    """Pieces (text, score and kind) to put behind the bytes of a model."""
    return b"".join(field(PIECE, field(1, text) + field(2, score) + field(3, kind)) for text, score, kind in pieces)


def without_space(model: bytes) -> bytes:
    """The model, but for the space that it puts in front of a text."""
    return model + field(NORMALIZER, field(ADD_DUMMY_PREFIX, False))


def sentencepiece_model(
    pieces: Sequence[tuple[str, float, int]],
    *,
    bos_id: int,
    eos_id: int,
    unk_id: int,
    pad_id: int,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """The bytes of a SentencePiece BPE model, as a tokenizer.model has them, with Llama's way of reading text.

    pieces: text, score (the two neighbours whose piece scores best are joined first) and kind of each id. The pieces of
    bos_id, eos_id and pad_id become control pieces, and that of unk_id the unknown one; an id is -1 where there is
    none. add_dummy_prefix: whether a space goes before each text. remove_extra_whitespaces: whether runs of spaces are
    read as one, and those at the ends as none; Llama 2 keeps them. ValueError for another kind, an id without a piece,
    no unk_id, or text that UTF-8 cannot encode.
    """
    named = {"bos_id": bos_id, "eos_id": eos_id, "unk_id": unk_id, "pad_id": pad_id}
    for name, i in named.items():
        if not (name == "unk_id") - 1 <= i < len(pieces):
            raise ValueError(f"{name}={i} has no piece; there are {len(pieces)}")
    kinds = [kind for _, _, kind in pieces]
    for i in (pad_id, bos_id, eos_id):
        if i >= 0:
            kinds[i] = CONTROL
    kinds[unk_id] = UNKNOWN
    if wrong := [i for i, kind in enumerate(kinds) if not NORMAL <= kind <= BYTE]:
        raise ValueError(f"the piece {wrong[0]} is of kind {kinds[wrong[0]]}; there are {NORMAL} to {BYTE}")
    trainer = field(MODEL_TYPE, BPE) + field(VOCAB_SIZE, len(pieces)) + field(BYTE_FALLBACK, BYTE in kinds)
    for name, i in named.items():
        number, piece = IDS[name]
        trainer += field(number, i) + field(piece, pieces[i][0] if i >= 0 else "")
    normalizer = field(NAME, "identity") + field(ADD_DUMMY_PREFIX, add_dummy_prefix)
    normalizer += field(REMOVE_EXTRA_WHITESPACES, remove_extra_whitespaces)
    whole = [(text, float(score), kind) for (text, score, _), kind in zip(pieces, kinds)]
    return more_pieces(whole) + field(TRAINER, trainer) + field(NORMALIZER, normalizer)
