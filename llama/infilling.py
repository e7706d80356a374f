"""Code Llama's infilling: what stands between a prefix and a suffix (Rozière et al. 2023), with Meta's ids and
order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .options import Prompts
from .system.checks import list_of_texts
from .tokenizer import Tokenizer, encode_plain


class InfillingIds(NamedTuple):
    """The pieces before the prefix, the suffix and the middle, and the one that ends the middle."""

    pre: int
    suf: int
    mid: int
    eot: int


def infilling_ids(tokenizer: Tokenizer) -> InfillingIds:
    """ValueError for a tokenizer without these pieces."""
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"infilling needs a llama.Tokenizer, not {type(tokenizer).__name__}")
    names = [f"▁<{name}>" for name in ("PRE", "SUF", "MID", "EOT")]
    unknown = tokenizer.sp_model.unk_id()
    ids = [tokenizer.named.get(name, tokenizer.sp_model.PieceToId(name)) for name in names]
    if unknown in ids:
        missing = [name for name, i in zip(names, ids) if i == unknown]
        raise ValueError(
            f"this model cannot fill in: its tokenizer has no {', '.join(missing)}; Code Llama 7B and 13B have them, "
            f"and their "
            "Instruct forms (not Python's, nor Llama 2)"
        )
    return InfillingIds(*ids)


def infilling_prompts(
    prefixes: Sequence[str], suffixes: Sequence[str], tokenizer: Tokenizer, suffix_first: bool = False
) -> Prompts:
    """The prompts' ids. The suffix is encoded without SentencePiece's space in front, as text behind other text.

        <s> <PRE> prefix <SUF> suffix <MID>         suffix_first: <s> <PRE> <SUF> suffix <MID> prefix

    ValueError if these are no lists of texts, of equal length.
    """
    for name, texts in (("prefixes", prefixes), ("suffixes", suffixes)):
        list_of_texts(name, texts)
    if len(prefixes) != len(suffixes):
        raise ValueError(f"{len(prefixes)} prefixes, but {len(suffixes)} suffixes; pass one suffix for each prefix")
    pre, suf, mid, _ = controls = infilling_ids(tokenizer)
    prompts = []
    for prefix, suffix in zip(prefixes, suffixes):
        before = encode_plain(tokenizer, prefix, controls)
        behind = encode_plain(tokenizer, suffix, controls, behind=True)
        ids = [pre, suf, *behind, mid, *before] if suffix_first else [pre, *before, suf, *behind, mid]
        prompts.append([tokenizer.bos_id, *ids])
    begun = [tokenizer.encode_behind("x")] * len(prompts)  # any text: a space that the middle begins with belongs to it
    return Prompts(prompts, begun)
