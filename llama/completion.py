"""Texts from steps: chunks as they are decided, and the predictions that a caller gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Optional, TypedDict, Union

from .chat import UNSAFE_ERROR, Message
from .decoding.settings import FinishReason
from .system.progress import bar
from .tokenizer import TextStream, Tokenizer, split

if TYPE_CHECKING:
    from .decoding.calls import Call
    from .decoding.requests import Step


class Alternative(TypedDict):
    """One of the best ids at a place: its text alone, and its natural log-probability."""

    id: int
    text: str
    logprob: float


class CompletionPrediction(TypedDict, total=False):
    """What follows a prompt.

    Attributes:
        generation: the text.
        finish_reason: "stop" at EOS, a stop text or a stop id; "length" at max_gen_len; "context" if the cache is full.
        tokens: with logprobs, one text for each id; the texts, joined, are `generation`.
        logprobs: with logprobs, the natural log-probability of each id.
        top_logprobs: with logprobs=N, the N best ids at each place.
    """

    generation: str
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[list[Alternative]]
    finish_reason: FinishReason


class ChatPrediction(TypedDict, total=False):
    """As `CompletionPrediction`, with the assistant's message in place of the text."""

    generation: Message
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[list[Alternative]]
    finish_reason: FinishReason


class Chunk(TypedDict, total=False):
    """What a stream has decided anew for one prompt. A prompt's texts, joined, are its `generation`.

    Attributes:
        index: which prompt of the call.
        text: the new text.
        tokens: the new ids, including those whose text is still held back.
        logprobs, top_logprobs: if asked for, one entry for each of these ids.
        finish_reason: None until the prompt's last chunk; see `CompletionPrediction`.
        cached_tokens: in the last chunk, how many of the prompt's ids were not read, since the cache held them.
        end: in the last chunk, with logprobs, EOS or the stop id that ended the prompt.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[Alternative]]
    finish_reason: Optional[FinishReason]
    cached_tokens: int
    end: Alternative


class Completions:
    """Chunks of the prompts of a call, as they are decided. It can be iterated over once, and be left early."""

    def __init__(
        self, tokenizer: Tokenizer, call: Call, *, stops: Sequence[str], echo: bool, begun: Sequence[Sequence[int]] = ()
    ) -> None:
        """begun: for each prompt the ids at its end that begin the reply; empty if no prompt has such ids."""
        self.tokenizer, self.call, self.echo, self.begun = tokenizer, call, echo, begun
        self.streams = [TextStream(tokenizer, stops) for _ in call.requests]
        self.waiting = [self._chunk(i) for i in range(len(call.requests))]
        if echo:
            for chunk, stream, request in zip(self.waiting, self.streams, call.requests):
                chunk["text"] = stream.prime(request.prompt)
                chunk["tokens"] += request.prompt
        for stream, ids in zip(self.streams, begun):
            stream.prime(ids)

    def _chunk(self, index: int) -> Chunk:
        chunk = Chunk(index=index, text="", tokens=[], finish_reason=None)
        if self.call.scored:
            chunk["logprobs"] = []
        if self.call.alternatives:
            chunk["top_logprobs"] = []
        return chunk

    def __iter__(self) -> Iterator[Chunk]:
        for step in self.call:
            if (chunk := self.add(step)) is not None:
                yield chunk

    def add(self, step: Step) -> Optional[Chunk]:
        """Take what the call decided next. -> the chunk that it completes; None while there is no text to show"""
        chunk, stream = self.waiting[step.index], self.streams[step.index]
        if step.prompt_logprobs is not None:
            chunk["logprobs"] += step.prompt_logprobs
            if self.call.alternatives:
                chunk["top_logprobs"] += map(self._alternatives, step.prompt_alternatives)
        if step.token is not None:
            chunk["text"] += stream.add(step.token)
            chunk["tokens"].append(step.token)
            if self.call.scored:
                chunk["logprobs"].append(step.logprob)
            if self.call.alternatives:
                chunk["top_logprobs"].append(self._alternatives(step.alternatives))
        chunk["finish_reason"] = step.finish_reason
        if step.finish_reason:
            chunk["text"] += stream.finish()
        if stream.stopped:
            self.call.cancel(step.index)
            chunk["finish_reason"] = "stop"
        if chunk["finish_reason"]:
            chunk["cached_tokens"] = self.call.cached[step.index]
        if step.end is not None and self.call.scored:
            chunk["end"] = self._alternatives([(step.end, step.logprob)])[0]
        if not chunk["text"] and not chunk["finish_reason"]:
            return None
        self.waiting[step.index] = self._chunk(step.index)
        return chunk

    def _alternatives(self, best: list[tuple[int, float]]) -> list[Alternative]:
        return [Alternative(id=i, text=self.tokenizer.decode([i]), logprob=logprob) for i, logprob in best]


class Score(TypedDict):
    """How probable a text is.

    Attributes:
        tokens: each id's text, BOS's in front; joined they are the text.
        logprobs: the natural log-probability of each id after those before it, 0.0 for BOS.
        perplexity: exp of minus the mean of these, BOS left out; nan for an empty text.
    """

    tokens: list[str]
    logprobs: list[float]
    perplexity: float


def perplexity(logprobs: list[float]) -> float:
    """exp of minus the mean of all but the first, which is BOS's; nan if there is no other."""
    return math.exp(-sum(logprobs[1:]) / (len(logprobs) - 1)) if len(logprobs) > 1 else math.nan


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows of `size` begin that cover `length` tokens: 10 tokens in windows of 4, 2 apart -> 0 2 4 6."""
    return [0, *range(stride, length - size + stride, stride)]


def predictions(
    tokenizer: Tokenizer, chunks: Iterable[Chunk], count: int, begun: Sequence[Sequence[int]]
) -> list[CompletionPrediction]:
    """Drain a stream of `count` prompts into their whole completions, in order. begun: as `Completions` has it."""
    wholes = joined(chunks)
    return [_prediction(tokenizer, wholes[i], begun[i] if begun else ()) for i in range(count)]


def joined(chunks: Iterable[Chunk]) -> dict[int, Chunk]:
    """All chunks of each prompt as one, by the prompt's index."""
    wholes: dict[int, Chunk] = {}
    for chunk in chunks:
        if (whole := wholes.setdefault(chunk["index"], chunk)) is chunk:
            continue
        whole["text"] += chunk["text"]
        whole["tokens"] += chunk["tokens"]
        whole["finish_reason"] = chunk["finish_reason"]
        if "logprobs" in chunk:
            whole["logprobs"] += chunk["logprobs"]
        if "top_logprobs" in chunk:
            whole["top_logprobs"] += chunk["top_logprobs"]
        if "cached_tokens" in chunk:
            whole["cached_tokens"] = chunk["cached_tokens"]
        if "end" in chunk:
            whole["end"] = chunk["end"]
    return wholes


def _prediction(tokenizer: Tokenizer, whole: Chunk, begun: Sequence[int]) -> CompletionPrediction:
    reason = whole["finish_reason"]
    assert reason is not None  # every prompt's last chunk has one
    prediction = CompletionPrediction(generation=whole["text"], finish_reason=reason)
    if "logprobs" in whole:
        texts = split(tokenizer, [*begun, *whole["tokens"]])[len(begun) :]
        room = len(whole["text"])
        if sum(map(len, texts)) > room:  # a stop string was cut off: drop the texts and ids behind the cut
            kept = []
            for text in texts:
                if room <= 0:
                    break
                kept.append(text[:room])
                room -= len(text)
            texts = kept
        prediction["tokens"] = texts
        prediction["logprobs"] = whole["logprobs"][: len(texts)]
        if "top_logprobs" in whole:
            prediction["top_logprobs"] = whole["top_logprobs"][: len(texts)]
    return prediction


def shown(chunks: Iterable[Chunk], call: Call) -> Iterator[Chunk]:
    """The chunks unchanged, with a progress bar."""
    with progress(call) as done:
        for chunk in chunks:
            done.update(1 if chunk["finish_reason"] else 0)
            yield chunk


def progress(call: Call) -> Any:
    """A bar of the prompts that are done, if there are more of them than slots."""
    count = len(call.requests)
    return bar(shown=count > call.lanes, total=count, unit="prompt")


def chat_prediction(completion: Optional[CompletionPrediction], logprobs: Union[bool, int]) -> ChatPrediction:
    """A completion as the assistant's message. None stands for an unsafe dialog, and gives the refusal."""
    if completion is None:
        completion = CompletionPrediction(generation=UNSAFE_ERROR, finish_reason="stop")
        if logprobs:
            completion["tokens"], completion["logprobs"] = [], []
    message = Message(role="assistant", content=completion["generation"])
    reply = ChatPrediction(generation=message, finish_reason=completion["finish_reason"])
    if "tokens" in completion:
        reply["tokens"], reply["logprobs"] = completion["tokens"], completion["logprobs"]
    if "top_logprobs" in completion:
        reply["top_logprobs"] = completion["top_logprobs"]
    return reply


def chat_chunks(chunks: Iterable[Chunk], safe: Sequence[int], count: int) -> Iterator[Chunk]:
    """Chunks of `count` dialogs. First come the refusals of unsafe ones, then `chunks`, numbered anew by `safe`: the
    index of each safe dialog among all."""
    for i in sorted(set(range(count)) - set(safe)):
        yield Chunk(index=i, text=UNSAFE_ERROR, tokens=[], finish_reason="stop")
    for chunk in chunks:
        chunk["index"] = safe[chunk["index"]]
        yield chunk
