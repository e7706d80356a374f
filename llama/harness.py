"""The answers to lm-evaluation-harness' requests, each that of the harness' own model "hf", and checks before them.
Needs no lm_eval: that part is `lm_eval_model.py`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence, Sized
from functools import partial
from typing import Any, Optional

from .chat import Dialog, DialogError
from .chat_formats import choose_format
from .chat_template import boundaries, render
from .completion import predictions, shown
from .generation import Llama
from .options import Asked, Options, Prompts
from .perplexity import rolling
from .scoring import Pair, encode_pair
from .system.checks import whole_number
from .system.printable import counted, shortened

NEW_TOKENS = 256  # how many are generated if the task does not say
NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Answers:
    """Answers requests with a model.

    max_length: ids that are read at most, max_seq_len. add_bos: whether texts get a BOS in front; an empty context is a
    BOS in any case. Text becomes control ids once `apply_chat_template` has written some of it, and not before.
    """

    def __init__(self, llama: Llama, add_bos: bool = True) -> None:
        self.llama, self.tokenizer, self.add_bos = llama, llama.tokenizer, add_bos
        self.max_length: int = llama.model.params.max_seq_len
        self._templated = False

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """ln p of each continuation after its context, and whether each of its ids is the likeliest one at its
        place."""
        return self._scored([self._pair(*request) for request in requests])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """ln p of each text. As "hf" does, this scores the BOS in front of it too, unless add_bos=False."""
        windows = [rolling(self._encode(text), self.tokenizer.bos_id, self.max_length) for text in texts]
        scores = iter(self._scored([Pair(*window) for each in windows for window in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What follows each context, up to the first stop string of its options or EOS."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, (_, options) in enumerate(requests):
            groups.setdefault(repr(sorted(options.items())), []).append(i)
        for group in groups.values():
            given = self._options(requests[group[0]][1])
            room = self.max_length - given["max_gen_len"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={given['max_gen_len']} leaves no room for a context, since max_seq_len is "
                    f"{self.max_length}; ask for fewer, or build with a larger max_seq_len"
                )
            prompts = Prompts([self._cut(self._encode(requests[i][0]), room) for i in group])
            asked = Asked(partial(Prompts, prompts.ids), given)
            _, chunks = self.llama.begin(asked, streams=False)
            texts = predictions(self.tokenizer, shown(chunks, chunks.call), len(group), ())
            answers.update((i, text["generation"]) for i, text in zip(group, texts))
        return [answers[i] for i in range(len(requests))]

    def apply_chat_template(self, dialog: Dialog, add_generation_prompt: bool = True) -> str:
        """A dialog as text, in the format that the folder speaks, up to the reply; or up to the end of a reply that is
        begun, if add_generation_prompt=False. DialogError for a message that has a control piece in it: from this text
        it would become its id."""
        for message in dialog:
            for name in self.tokenizer.named:
                if name in message["content"]:
                    raise DialogError(
                        f"{shortened(name)} is a control piece, and no message may have it: {shortened(message)}"
                    )
        self._templated = True
        bos, eos = boundaries(self.tokenizer)
        asks = add_generation_prompt
        return "".join(p.text for p in render(self.template(), dialog, bos=bos, eos=eos, asks=asks, begun=not asks))

    def template(self, given: Optional[str] = None) -> str:
        """The chat template, in Jinja: the folder's own, or that of the format of this name."""
        format = self.llama.chat_format if given is None else choose_format(given, self.tokenizer)
        return format.template

    def _encode(self, text: str) -> list[int]:
        bos = self.add_bos and not (self._templated and text.startswith(boundaries(self.tokenizer)[0]))
        return self.tokenizer.encode(text, bos=bos, eos=False, **({"special": True} if self._templated else {}))

    def _pair(self, context: str, continuation: str) -> Pair:
        before, ids = encode_pair(self._encode, context, continuation)
        before = before or [self.tokenizer.bos_id]
        if not 0 < len(ids) <= self.max_length:
            raise ValueError(
                f"the continuation {shortened(continuation)} has {len(ids)} ids of its own; it needs at least one, and "
                f"at most max_seq_len={self.max_length} are scored"
            )
        return Pair(self._cut(before, self.max_length + 1 - len(ids)), ids)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The last ids, as many as there is room for."""
        if len(ids) > room:
            warnings.warn(
                (
                    f"a context of {len(ids)} tokens lost its first {len(ids) - room}, since max_seq_len is "
                    f"{self.max_length}"
                ),
                stacklevel=4,
            )
        return ids[-room:]

    def _scored(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        scores = self.llama.score_ids([pair.context for pair in pairs], [pair.continuation for pair in pairs])
        return [(score["logprob"], score["is_greedy"]) for score in scores]

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The harness' options by our names. ValueError for an option that we lack."""
        left = dict(given)
        lengths = [value for name in NEW_TOKENS_NAMES if (value := left.pop(name, None)) is not None]
        stops = left.pop("until", None) or []
        draws, temperature = left.pop("do_sample", None), float(left.pop("temperature", None) or 0)
        if draws and not temperature:
            raise ValueError("do_sample=True needs a temperature above 0; leave do_sample out for the likeliest text")
        if unknown := sorted(left.keys() - Options.__annotations__.keys() - {"top_p"}):
            raise ValueError(f"generation has no option {shortened(', '.join(unknown))}; there are {', '.join(KNOWN)}")
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
        return {
            "top_p": 1.0, **left, "temperature": 0.0 if draws is False else temperature,
            "max_gen_len": int(lengths[0] if lengths else NEW_TOKENS), "stop": [*stops, boundaries(self.tokenizer)[1]],
        }  # fmt: skip


KNOWN = ("until", "do_sample", "temperature", "top_p", *NEW_TOKENS_NAMES, *Options.__annotations__)


def side_by_side(batch_size: Any, most: Optional[int] = None) -> int:
    """How many requests run at once, as the harness writes it: a number, or "auto" and "auto:N" for `most`."""
    if re.fullmatch(r"auto(:\d+)?", str(batch_size)):
        return 8 if most is None else whole_number("max_batch_size", most, 1)
    number = int(batch_size) if isinstance(batch_size, str) and batch_size.isdecimal() else batch_size
    return whole_number("batch_size", number, 1, told='of 1 or more, or "auto"')


def check_examples(tasks: Mapping[str, Any], num_fewshot: int) -> None:
    """ValueError if a task has fewer documents to take examples from. The harness would find out once the model is
    loaded."""
    for name, task in tasks.items():
        documents = task.fewshot_docs()
        count = len(documents) if isinstance(documents, Sized) else len(list(documents))
        if count < num_fewshot and task.get_config("num_fewshot") != 0:  # 0 in the task's own file counts more
            raise ValueError(
                f"num_fewshot={num_fewshot}, but {name} has {counted(count, 'document')} to take examples from; pass "
                f"{count} at most"
            )
