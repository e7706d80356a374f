"""Answers in the shapes of OpenAI's API: whole, or in pieces as they are decided."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple, Optional

from ..completion import Alternative, Chunk, Completions
from ..tokenizer import StreamDecoder, Tokenizer, is_control
from .bodies import Request

BYTE = re.compile("<0x[0-9A-F]{2}>")  # the name of a piece that is one byte


class Token(NamedTuple):
    """What is told of an id."""

    id: int
    text: str
    logprob: float
    best: list[Alternative]


def raw(tokenizer: Tokenizer, token: int) -> bytes:
    """What an id stands for wherever it comes: " there", a byte of a character, nothing for control ids."""
    if is_control(tokenizer, token) or not isinstance(tokenizer, Tokenizer):
        return tokenizer.decode([token]).encode(errors="replace")
    piece = tokenizer.piece(token)
    return bytes([int(piece[3:5], 16)]) if BYTE.fullmatch(piece) else piece.replace("▁", " ").encode()


class Choice:
    """One of the answers to a request."""

    def __init__(self, reply: Reply, index: int) -> None:
        self.reply, self.index = reply, index
        completions, request = reply.completions, reply.completions.call.requests[index]
        self.prompt = request.prompt
        self.tokens: list[Token] = []
        self.ids: list[int] = []
        self.finish_reason: Optional[str] = None
        self.text, self.cached = "", 0
        self._chars = 0  # characters of the texts of `tokens`
        self._decoder = StreamDecoder(completions.tokenizer)
        if completions.begun and reply.request.scored:
            for token in completions.begun[index]:
                self._decoder.add(token)
        self._role_told = False

    @property
    def generated(self) -> int:
        """How many ids are new."""
        return len(self.ids) - (len(self.prompt) if self.reply.completions.echo else 0)

    def add(self, chunk: Chunk) -> dict[str, Any]:
        """Take what was decided. -> this choice in an event of a stream"""
        tokens = self._tokens(chunk)
        told: dict[str, Any] = {
            "index": self.index, **self._said(chunk["text"]),
            "logprobs": self._logprobs(tokens, self._chars, not self.tokens),
            "finish_reason": reason(chunk["finish_reason"]),
        }  # fmt: skip
        if self.reply.request.ids:
            told["token_ids"] = chunk["tokens"]
        self.text += chunk["text"]
        self.ids += chunk["tokens"]
        self.tokens += tokens
        self._chars += sum(len(token.text) for token in tokens)
        self.finish_reason, self.cached = chunk["finish_reason"], chunk.get("cached_tokens", 0)
        return told

    @property
    def whole(self) -> dict[str, Any]:
        """This choice, when all is there."""
        tokens, room = [], len(self.text)
        for token in self.tokens:  # a text that a stop has cut off has no tokens
            if room <= 0 and token.text:
                break
            tokens.append(token._replace(text=token.text[:room]))
            room -= len(token.text)
        content = {"message": {"role": "assistant", "content": self.text, "refusal": None}}
        told: dict[str, Any] = {
            "index": self.index, **(content if self.reply.request.chat else {"text": self.text}),
            "logprobs": self._logprobs(tokens), "finish_reason": reason(self.finish_reason),
        }  # fmt: skip
        if self.reply.request.ids:
            told |= {"token_ids": self.ids, "prompt_token_ids": self.prompt}
        return told

    def _said(self, text: str) -> dict[str, Any]:
        if not self.reply.request.chat:
            return {"text": text}
        first, self._role_told = not self._role_told, True
        return {"delta": {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}}

    def _tokens(self, chunk: Chunk) -> list[Token]:
        if "logprobs" not in chunk:
            return []
        texts = [self._decoder.add(token) for token in chunk["tokens"]]
        if chunk["finish_reason"] and texts:
            texts[-1] += self._decoder.finish()
        best = chunk.get("top_logprobs") or [[] for _ in texts]
        tokens = [Token(*each) for each in zip(chunk["tokens"], texts, chunk["logprobs"], best)]
        # The completions' API counts the end as a token without text: benchmarks that ask for one new id leave out the
        # last.
        end = [Token(chunk["end"]["id"], "", chunk["end"]["logprob"], [])] if "end" in chunk else []
        return tokens if self.reply.request.chat else tokens + end

    def _logprobs(self, tokens: list[Token], at: int = 0, first: bool = True) -> Optional[dict[str, Any]]:
        """at: where in the text the tokens begin. first: whether they are the first ones of the answer."""
        request, tokenizer = self.reply.request, self.reply.completions.tokenizer
        if not request.scored:
            return None
        if request.chat:
            content = [
                {
                    "token": token.text, "logprob": token.logprob, "bytes": list(raw(tokenizer, token.id)),
                    "top_logprobs": [
                        {"token": text.decode(errors="replace"), "logprob": best["logprob"], "bytes": list(text)}
                        for best in token.best
                        for text in [raw(tokenizer, best["id"])]
                    ],
                }
                for token in tokens
            ]  # fmt: skip
            return {"content": content, "refusal": None}
        logprobs: list[Optional[float]] = [token.logprob for token in tokens]
        if self.reply.completions.echo and first and logprobs:
            logprobs[0] = None  # nothing stands before it
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": logprobs,
            "top_logprobs": [by_text(tokenizer, token.best) or None for token in tokens]
            if request.alternatives
            else None,
            "text_offset": list(accumulate((len(token.text) for token in tokens[:-1]), initial=at))[: len(tokens)],
        }


def by_text(tokenizer: Tokenizer, best: Iterable[Alternative]) -> dict[str, float]:
    """Log-probabilities by text; of ids with the same text, the likeliest."""
    told: dict[str, float] = {}
    for each in best:
        told.setdefault(raw(tokenizer, each["id"]).decode(errors="replace"), each["logprob"])
    return told


def reason(finish_reason: Optional[str]) -> Optional[str]:
    """OpenAI has one word for both limits."""
    return "length" if finish_reason == "context" else finish_reason


class Reply:
    """The answer to a request."""

    def __init__(self, request: Request, completions: Completions, model: str) -> None:
        self.request, self.completions = request, completions
        self.choices = [Choice(self, index) for index in range(len(completions.call.requests))]
        self.id = f"{'chatcmpl' if request.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._base = {"id": self.id, "created": int(time.time()), "model": model}

    @property
    def usage(self) -> dict[str, Any]:
        """How many ids were read and written. A prompt counts once, whatever number of answers it has."""
        firsts = self.choices[:: self.request.n]
        read, written = sum(len(c.prompt) for c in firsts), sum(c.generated for c in self.choices)
        return {
            "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached for c in firsts)},
        }  # fmt: skip

    @property
    def whole(self) -> dict[str, Any]:
        """When all chunks were added."""
        kind = "chat.completion" if self.request.chat else "text_completion"
        return {**self._base, "object": kind, "choices": [choice.whole for choice in self.choices], "usage": self.usage}

    def event(self, choices: list[dict[str, Any]], usage: bool = False) -> dict[str, Any]:
        """An event of a stream. usage: the last one, which has no choices."""
        kind = "chat.completion.chunk" if self.request.chat else "text_completion"
        told = {**self._base, "object": kind, "choices": choices}
        if self.request.usage:
            told["usage"] = self.usage if usage else None
        return told
