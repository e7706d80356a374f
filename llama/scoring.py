"""Continuations that are scored after their contexts: their ids, checked, as prompts; what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

from .decoding.requests import Step, check_prompts
from .model import ModelArgs
from .options import Prompts
from .system.checks import list_of_texts
from .tokenizer import Tokenizer, split

T = TypeVar("T")


class ContinuationScore(TypedDict):
    """How probable a continuation is after its context.

    Attributes:
        logprob: natural log-probability of the whole.
        is_greedy: whether each id is the likeliest one at its place.
        tokens: each id's text.
        logprobs: natural log-probability of each id after all before it.
    """

    logprob: float
    is_greedy: bool
    tokens: list[str]
    logprobs: list[float]


class Pair(NamedTuple):
    """The ids of a context, BOS in front, and those of what follows it."""

    context: list[int]
    continuation: list[int]


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> Pair:
    """The ids of two texts, as lm-evaluation-harness has them: both are encoded as one text, which is split behind as
    many ids as the context has by itself. Spaces at the context's end belong to the continuation."""
    before = encode(context.rstrip())
    return Pair(before, encode(context + continuation)[len(before) :])


def encode_pairs(encode: Callable[[str], list[int]], contexts: Any, continuations: Any) -> list[Pair]:
    """`encode_pair` of two lists of texts. ValueError for what is no list of texts."""
    for name, texts in {"texts": contexts, "continuations": continuations}.items():
        list_of_texts(name, texts)
    return [encode_pair(encode, *pair) for pair in _paired(contexts, continuations)]


def id_pairs(contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], args: ModelArgs) -> list[Pair]:
    """Pairs of two lists of ids. ValueError for what is no list of ids, or has an unknown one."""
    return [Pair(*pair) for pair in _paired(check_prompts(contexts, args), check_prompts(continuations, args))]


def _paired(contexts: Sequence[T], continuations: Sequence[T]) -> list[tuple[T, T]]:
    if len(contexts) != len(continuations):
        raise ValueError(
            f"{len(contexts)} contexts for {len(continuations)} continuations; give one of each for every pair"
        )
    return list(zip(contexts, continuations))


def pair_prompts(pairs: Sequence[Pair], args: ModelArgs) -> tuple[list[int], Prompts]:
    """Pairs as prompts, and the index of the pair that each prompt is of. Contexts that begin alike stand side by side,
    so that their beginning is read once. ValueError for a pair that is too long, or has no ids to score."""
    for i, (context, continuation) in enumerate(pairs):
        if not continuation:
            raise ValueError(f"continuation {i} has no ids of its own; give it a text that is not empty")
        if (length := len(context) + len(continuation)) > args.max_seq_len + 1:
            raise ValueError(
                f"context and continuation {i} have {length} tokens, but with max_seq_len={args.max_seq_len} at most "
                f"{args.max_seq_len + 1} are scored; shorten them, or build with max_seq_len={length - 1} or more"
            )
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    prompts = [[*pairs[i].context, *pairs[i].continuation[:-1]] for i in order]
    return order, Prompts(prompts, scored=[pairs[i].continuation for i in order])


def pair_score(tokenizer: Tokenizer, pair: Pair, step: Step) -> ContinuationScore:
    """What a step says of a pair: its log-probabilities, and the best id at each place."""
    logprobs = step.prompt_logprobs or []
    greedy = all(best[0][0] == token for token, best in zip(pair.continuation, step.prompt_alternatives))
    tokens = split(tokenizer, [pair.context[-1], *pair.continuation])[1:]
    return ContinuationScore(logprob=sum(logprobs), is_greedy=greedy, tokens=tokens, logprobs=logprobs)
