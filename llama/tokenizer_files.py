"""Vocabularies of other files -> SentencePiece models."""

from __future__ import annotations

from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, as SentencePiece numbers them


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

    pieces: text, score (the two neighbours whose piece scores best are joined first) and kind of each id. The pieces of bos_id,
    eos_id and pad_id become control pieces, and that of unk_id the unknown one; an id is -1 where there is none.
    add_dummy_prefix: whether a space goes before each text. remove_extra_whitespaces: whether runs of spaces are read as one,
    and those at the ends as none; Llama 2 keeps them. ValueError for another kind, an id without a piece, no unk_id, or
    text that UTF-8 cannot encode.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    named = {"bos_id": bos_id, "eos_id": eos_id, "unk_id": unk_id, "pad_id": pad_id}
    for name, i in named.items():
        if not (name == "unk_id") - 1 <= i < len(pieces):
            raise ValueError(f"{name}={i} has no piece; there are {len(pieces)}")
    kinds = [kind for _, _, kind in pieces]
    for i in (pad_id, bos_id, eos_id):
        if i >= 0:
            kinds[i] = CONTROL
    kinds[unk_id] = UNKNOWN
    model = schema.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    for i, (text, score, _) in enumerate(pieces):
        if not NORMAL <= kinds[i] <= BYTE:
            raise ValueError(f"the piece {i} is of kind {kinds[i]}; there are {NORMAL} to {BYTE}")
        model.pieces.add(piece=text, score=score, type=kinds[i])
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(pieces), BYTE in kinds
    for name, i in named.items():
        setattr(trainer, name, i)
        setattr(trainer, name.replace("id", "piece"), pieces[i][0] if i >= 0 else "")
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", add_dummy_prefix
    normalizer.remove_extra_whitespaces = remove_extra_whitespaces
    return bytes(model.SerializeToString())
