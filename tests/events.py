"""Random requests that come, are read, cancelled and left, beside what each prompt gives alone.

    python tests/events.py --events 200000 --seed 1
    python tests/events.py --events 1000 --exactly bfloat16 int8

Prints how many texts were compared, and resident memory along the way. `tests/test_scheduler.py` runs some hundred
events.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch

from llama import Llama
from llama.decoding.calls import Call, Source
from llama.decoding.requests import Request, Step
from llama.decoding.sampling import Sampling

SAMPLINGS = [
    Sampling(0),
    Sampling(0.9, 0.9),
    Sampling(1.3, 1.0, top_k=20),
    Sampling(0.7, 0.95, min_p=0.05),
    Sampling(0, repetition_penalty=1.3),
    Sampling(0, presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(0.8, 0.9, repetition_penalty=1.2, logit_bias={5: 2.0, 9: -1.0}),
]
BEGINNINGS = [[1, *range(20, 20 + n)] for n in (2, 17, 40)]


class OnlyEven:
    """A grammar: ids are even."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def fill(self, bits: torch.Tensor) -> None:
        bits.fill_(0x55555555)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def drawn(rng: random.Random, longest: int = 60) -> Request:
    """One of some thousand requests: equal ones come again, and many begin alike."""
    prompt = [
        *rng.choice(BEGINNINGS),
        *(rng.randrange(60, 70) for _ in range(rng.randrange(longest) if rng.random() < 0.3 else 3)),
    ]
    sampling = rng.choice(SAMPLINGS)
    return Request(
        prompt,
        rng.choice([0, 1, 5, 12, 25]),
        sampling,
        seed=rng.randrange(4) if sampling.temperature else None,
        ends=frozenset(range(100, 400, 23)),
        logprobs=rng.random() < 0.2,
        draft=rng.choice([None, True, False]),
        grammar=OnlyEven() if rng.random() < 0.1 else None,
    )


def opened(seed: int, number: int) -> tuple[list[Request], bool]:
    """The requests of a call, and whether it streams: of its number alone."""
    rng = random.Random(f"{seed} {number}")
    return [drawn(rng) for _ in range(rng.choice([1, 1, 2, 3, 6]))], rng.random() < 0.7


class Alone:
    """What each request gives by itself, in a model of its own. near: what rounding changes of a probability. greedy:
    also for rows that do not draw. guessed: draw as beside a draft model, of which there is none here."""

    def __init__(self, llama: Llama, near: float = 1e-4, greedy: bool = False, guessed: bool = False) -> None:
        self.llama, self.near, self.greedy = llama, near, greedy
        llama._scheduler.chooser.guessed = self.guessed = guessed
        self.known: dict[str, tuple[list[int], Optional[str]]] = {}
        self.ties = 0

    @torch.inference_mode()
    def is_tie(self, request: Request, ours: list[int], theirs: list[int]) -> bool:
        """Whether rounding may choose either id where the two part: they are as likely as each other. Noise belongs to
        ranks, as in Meta's release, so a draw may turn on which of two such ids is the likelier. Where the ids do not
        tell, since one of them ended its row or penalties changed them, any two of the likeliest count."""
        if not (request.draws or self.greedy):
            return False
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs)))
        logits = self.llama.model(torch.tensor([request.prompt + theirs[:same]]), 0)[0, -1]
        probs = torch.softmax(logits / (request.sampling.temperature or 1.0), -1)
        if same < min(len(ours), len(theirs)) and not request.sampling.counts_ids:
            one, other = probs[ours[same]], probs[theirs[same]]
            return bool((one - other).abs() < self.near * torch.minimum(one, other)) or self._is_at_an_edge(
                request, probs
            )
        best = probs.sort(descending=True).values[: 60 if request.draws or request.sampling.counts_ids else 2]
        return bool((best[:-1] - best[1:] < self.near * best[1:]).any())

    def _is_at_an_edge(self, request: Request, probs: torch.Tensor) -> bool:
        """Whether rounding may let the last id of the nucleus be in it or not."""
        mass = probs.sort(descending=True).values.cumsum(0)
        return request.draws and bool(((mass - request.sampling.top_p).abs() < self.near * probs.max()).any())

    def __call__(self, request: Request) -> tuple[list[int], Optional[str]]:
        draft = None if self.guessed and request.draws and request.draft is not False else False
        key = repr((request.prompt, request.max_new, request.sampling, request.seed, request.grammar is None, draft))
        if key not in self.known:
            self.llama.forget()
            fresh = replace(request, draft=draft, grammar=OnlyEven() if request.grammar else None)
            steps = list(Call(self.llama._scheduler, [fresh], Source(1)))
            self.known[key] = [s.token for s in steps if s.token is not None], steps[-1].finish_reason
        return self.known[key]


class Open:
    """A call that somebody reads."""

    def __init__(self, llama: Llama, requests: list[Request], streams: bool) -> None:
        slots = llama.model.params.max_batch_size
        self.call = Call(
            llama._leader or llama._scheduler, requests, Source(min(len(requests), slots)), streams=streams
        )
        self.steps: Iterator[Step] = iter(self.call)
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.reasons: list[Optional[str]] = [None] * len(requests)
        self.cancelled: set[int] = set()

    def read(self) -> bool:
        """Take a step; whether there was one."""
        step = next(self.steps, None)
        if step is None:
            return False
        assert step.index not in self.cancelled
        if step.token is not None:
            self.tokens[step.index].append(step.token)
        self.reasons[step.index] = step.finish_reason
        return True

    def check(self, alone: Alone, whole: bool) -> int:
        for i, request in enumerate(self.call.requests):
            tokens, reason = alone(request)
            ended = whole and i not in self.cancelled
            same_so_far = self.tokens[i] == tokens[: len(self.tokens[i])]
            if not same_so_far or (ended and (len(self.tokens[i]), self.reasons[i]) != (len(tokens), reason)):
                assert alone.is_tie(request, self.tokens[i], tokens), (request, self.tokens[i], tokens)
                alone.ties += 1
                continue
            if request.grammar is not None:
                assert all(token % 2 == 0 for token in self.tokens[i])
        return len(self.call.requests)


def insist(llama: Llama) -> list[int]:
    """Let the draft model guess in every pass, from 1 to 4 ids by turns. -> how many of its guesses were right, as they
    come"""
    model, turns, right = llama._scheduler.draft_model, itertools.cycle((4, 1, 3, 2)), list[int]()
    assert model is not None
    judge = model.judge
    model.count = lambda rows, pace: next(turns)  # type: ignore[method-assign]
    counts = lambda row, tried, found: right.append(found) or judge(row, tried, found)  # noqa: E731
    model.judge = counts  # type: ignore[method-assign]
    return right


def run(llama: Llama, alone: Alone, events: int, seed: int) -> dict[str, Any]:
    """Random events; every text is compared, and in the end no slot is taken."""
    rng, calls, compared, memory = random.Random(seed), list[Open](), 0, list[int]()
    numbers = itertools.count()
    for event in range(events):
        if event % max(events // 8, 1) == 0 and Path("/proc/self/statm").exists():
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024)
        kind = rng.random()
        if not calls or (kind < 0.12 and len(calls) < 12):
            calls.append(Open(llama, *opened(seed, next(numbers))))
            continue
        chosen = rng.choice(calls)
        if kind < 0.15:
            index = rng.randrange(len(chosen.tokens))
            chosen.call.cancel(index)
            chosen.cancelled.add(index)
        elif kind < 0.16:
            chosen.steps.close()  # type: ignore[attr-defined]
            compared += chosen.check(alone, whole=False)
            calls.remove(chosen)
        elif not chosen.read():
            compared += chosen.check(alone, whole=True)
            calls.remove(chosen)
    for left in calls:
        while left.read():
            pass
        compared += left.check(alone, whole=True)
    assert llama._leader is not None or not llama._scheduler.rows
    return {"events": events, "seed": seed, "texts": compared, "ties": alone.ties, "resident_MB": memory}


Answers = dict[str, tuple[list[int], Optional[str]]]


class Known(Alone):
    """What each request gave elsewhere."""

    def __init__(self, known: Answers, guessed: bool = False) -> None:
        self.known, self.ties, self.guessed = known, 0, guessed

    def is_tie(self, request: Request, ours: list[int], theirs: list[int]) -> bool:
        return False


def answers(alone: Alone, events: int, seed: int) -> Answers:
    """Those of all calls that so many events may open."""
    for number in range(events // 5):
        for request in opened(seed, number)[0]:
            alone(request)
    return alone.known


def led(
    folder: str, tokenizer_path: str, parallel: int, known: Answers, events: int, seed: int, draft: Optional[str] = None
) -> Optional[dict[str, Any]]:
    """Random events on the first of several processes, which takes requests for all."""
    llama = Llama.build(folder, tokenizer_path, 128, 4, parallel, device="cpu", draft=draft)
    if draft is not None:
        insist(llama)
    found = llama.lead(lambda: run(llama, Known(known, draft is not None), events, seed))
    assert not any(row for row in llama._scheduler.rows if not row.is_over)
    return found


def scored(step: Step) -> tuple[Any, ...]:
    return (
        step.token,
        step.logprob,
        step.alternatives,
        step.finish_reason,
        step.prompt_logprobs,
        step.prompt_alternatives,
    )


def run_exactly(llama: Llama, alone: Llama, mixtures: int, seed: int) -> dict[str, Any]:
    """Models with batch_invariant: random mixtures of calls that come, are read, cancelled and left, whose slots go on
    holding what was read. Each step is to the bit what its request gives alone, read anew and without drafts."""
    rng, compared, known = random.Random(seed), 0, dict[str, list[Any]]()

    def expected(request: Request) -> list[Any]:
        key = repr((replace(request, draft=None, grammar=None), request.grammar is None))
        if key not in known:
            alone.forget()
            fresh = replace(request, draft=False, grammar=OnlyEven() if request.grammar else None)
            known[key] = [scored(step) for step in Call(alone._scheduler, [fresh], Source(1))]
        return known[key]

    for _ in range(mixtures):
        calls = []
        for _ in range(rng.choice([1, 2, 3])):
            requests = [replace(drawn(rng), logprobs=True, alternatives=3) for _ in range(rng.choice([1, 2, 4]))]
            if rng.random() < 0.2:
                requests[0] = replace(requests[0], scored=requests[0].prompt)
            lanes = min(len(requests), llama.model.params.max_batch_size)
            call = Call(llama._scheduler, requests, Source(lanes), streams=rng.random() < 0.7)
            calls.append((call, iter(call), [[] for _ in requests]))  # type: ignore[var-annotated]
        while calls:
            chosen = rng.choice(calls)
            call, steps, found = chosen
            kind = rng.random()
            if kind < 0.01:
                call.cancel(rng.randrange(len(found)))
            step = None if kind > 0.995 else next(steps, None)
            if step is not None:
                found[step.index].append(scored(step))
                continue
            steps.close()  # type: ignore[attr-defined]
            calls.remove(chosen)
            for request, got in zip(call.requests, found):
                assert got == expected(request)[: len(got)], request
                compared += len(got)
    return {"mixtures": mixtures, "seed": seed, "steps": compared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="of which the first takes requests for all")
    parser.add_argument("--parallel", type=int, help="processes for one copy of the model; all if not given")
    parser.add_argument("--draft", action="store_true", help="a draft model guesses up to 4 ids a pass")
    parser.add_argument(
        "--exactly", nargs=2, metavar=("DTYPE", "KIND"), help="that many mixtures with batch_invariant=True"
    )
    args = parser.parse_args()
    from conftest import near, random_weights, train_tokenizer, write_checkpoint
    from workers import Pool

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = write_checkpoint(Path(root) / "tiny", random_weights())
        tokenizer = Path(root) / "tokenizer.model"
        tokenizer.write_bytes(train_tokenizer())
        draft = str(write_checkpoint(Path(root) / "draft", near(random_weights()))) if args.draft else None
        options: dict[str, Any] = {"draft": draft}
        if args.exactly:
            dtype, kind = args.exactly
            options = {"batch_invariant": True, "dtype": dtype, "quantize": kind if kind in ("int8", "int4") else None}
        shared = Llama.build(str(folder), str(tokenizer), 128, 4, device="cpu", **options)
        if args.exactly:
            single = Llama.build(str(folder), str(tokenizer), 128, 1, device="cpu", **options)
            print(json.dumps(run_exactly(shared, single, args.events, args.seed)))
            return
        if draft is not None:
            insist(shared)
        alone = Alone(Llama.build(str(folder), str(tokenizer), 128, 1, device="cpu"), guessed=args.draft)
        print(json.dumps(run(shared, alone, args.events, args.seed)))
        if args.processes > 1:
            pool = Pool(args.processes)
            told = (
                str(folder),
                str(tokenizer),
                args.parallel or args.processes,
                answers(alone, args.events, args.seed),
                args.events,
                args.seed,
                draft,
            )
            print(json.dumps(pool.run(led, *told, seconds=10**6)[0]))
            pool.close()


if __name__ == "__main__":
    sys.exit(main())
