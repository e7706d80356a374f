"""Finds faults of meaning: if one is mended, texts like those that the model was trained on become clearly likelier.

Every `Repair` is tried on the loaded model, and the log-probabilities of the same tokens are compared, before and
after. Only what no chance explains counts: the mean gain must be `SURE` times its standard error. A few tokens are read
first: what makes them `WORSE` is not tried on all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from ..generation import Llama
from ..system.printable import counted
from ..system.progress import bar
from . import repairs as kinds
from .repairs import Repair
from .results import Result, failed, not_applicable, passed
from .texts import KINDS

LENGTH = 256  # tokens of a text that are read
FEW = 64  # tokens that are read first
WORSE = -2.0  # standard errors; the right repair makes the few tokens likelier, except once in 1000 faults
SURE = 4.5  # standard errors: by chance once in 300,000 trials
LEAST_GAIN = 0.01  # nats a token that a repair must bring; another norm_eps changes less
LIKELY = 0.5  # nats below chance from which on a text counts as likely
PASS_SECONDS = 4.0  # the longest that reading all texts once may take; a slower machine reads fewer texts
ROUNDS = 4  # faults of one folder that are looked for
CHECKS = (kinds.ORDER_QK, kinds.THETA, kinds.EPS, kinds.LAYERS, kinds.PARTS, kinds.HEADS)


class Gain(NamedTuple):
    """By how much a repair makes a token likelier, nats: the mean, and that divided by its standard error."""

    mean: float
    certainty: float


class Reading:
    """Texts as the model reads them, with the states in front of every layer, so that what changes only later layers
    need not be read from the beginning."""

    def __init__(self, llama: Llama, texts: Iterable[str], length: int) -> None:
        self.model = llama.model
        rows = [llama.tokenizer.encode(text, bos=True, eos=False)[:length] for text in texts]
        longest = max(map(len, rows))
        place = self.model.norm.weight.device
        self.tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=place)
        self.counts = torch.tensor([[i < len(row) for i in range(1, longest)] for row in rows], device=place)
        self.states: list[torch.Tensor] = []
        self.read_anew()

    @torch.inference_mode()
    def read_anew(self) -> None:
        """Read with the model as it is now, and keep the states."""
        self.states = [self.model.tok_embeddings(self.tokens)]
        self.before = self._losses(0, keep=True)

    @torch.inference_mode()
    def losses(self, first: int) -> torch.Tensor:
        """Nats of every token, float32 (tokens,), with a model that has changed from layer `first` on."""
        return self._losses(first, keep=False)

    def _losses(self, first: int, keep: bool) -> torch.Tensor:
        h = self.states[first]
        S = h.shape[1]
        turns = self.model.turns(0, S, S).to(h.device)
        mask = torch.full((S, S), -math.inf, dtype=h.dtype, device=h.device).triu(1)
        for layer in self.model.layers[first:]:
            h = layer(h, 0, turns, mask)
            if keep:
                self.states.append(h)
        losses = [
            torch.nn.functional.cross_entropy(self.model.output(row[:-1]).float(), tokens[1:], reduction="none")
            for row, tokens in zip(self.model.norm(h), self.tokens)
        ]
        return torch.stack(losses)[self.counts]

    def gain(self, repair: Repair) -> Gain:
        with ExitStack() as stack:
            repair.change(self.model, stack)
            gains = (self.before - self.losses(repair.first)).cpu().double()  # MPS has no float64
        mean, error = gains.mean().item(), gains.std().item() / math.sqrt(len(gains))
        if not math.isfinite(mean):
            return Gain(-math.inf, -math.inf)
        return Gain(mean, mean / error if error > 0 else 0.0)


class Search(NamedTuple):
    """What a search has found. gains: of each repair in the last round. untried: how many the time did not suffice
    for."""

    found: list[tuple[Repair, Gain]]
    gains: dict[Repair, Gain]
    untried: int
    loss: float  # nats a token, of the mended model
    tokens: int


def read_likeliest(llama: Llama, texts: Sequence[str] = ()) -> tuple[str, list[Reading]]:
    """The kind of text that the model finds likelier, and two readings of it: of a few tokens, and of all. texts: in
    place of those that come with this package."""
    given = {"the given text": list(texts)} if texts else {kind: list(of_kind) for kind, of_kind in KINDS.items()}
    few, seconds = {}, {}
    for kind, of_kind in given.items():
        started = time.monotonic()
        few[kind] = Reading(llama, of_kind[:1], min(FEW, llama.model.params.max_seq_len))
        seconds[kind] = time.monotonic() - started
    kind = min(few, key=lambda kind: few[kind].before.mean().item())
    affordable = max(1, int(PASS_SECONDS / seconds[kind] * FEW / LENGTH))
    rows = min(affordable, llama.model.params.max_batch_size)
    length = min(LENGTH, llama.model.params.max_seq_len)
    return kind, [few[kind], Reading(llama, given[kind][:rows], length)]


def search(readings: Sequence[Reading], candidates: Sequence[Repair], seconds: float) -> Search:
    """Look for the repairs that make the texts clearly likelier, the most helpful first; the model keeps none of them.
    readings: those of `read_likeliest`."""
    deadline = time.monotonic() + seconds
    found: list[tuple[Repair, Gain]] = []
    gains: dict[Repair, Gain] = {}
    few, whole = readings
    with ExitStack() as kept:
        for _ in range(ROUNDS):
            gains = {}
            for repair in bar(iterable=candidates, desc="Repairs", unit="repair"):
                if time.monotonic() > deadline:
                    break
                gain = few.gain(repair)
                gains[repair] = gain if gain.certainty < WORSE else whole.gain(repair)
            sure = {repair: gain for repair, gain in gains.items() if _is_sure(repair, gain)}
            if not sure:
                break
            best = max(sure, key=lambda repair: sure[repair].mean)
            found.append((best, sure[best]))
            best.change(whole.model, kept)
            for reading in readings:
                reading.read_anew()
        loss, tokens = whole.before.mean().item(), len(whole.before)
    return Search(found, gains, len(candidates) - len(gains), loss, tokens)


def _is_sure(repair: Repair, gain: Gain) -> bool:
    return gain.certainty > SURE and (gain.mean > LEAST_GAIN or repair.check == kinds.EPS)


def check_meaning(llama: Llama, seconds: float, texts: Sequence[str] = ()) -> list[Result]:
    """The results of all checks of meaning. seconds: the search ends after them."""
    kind, readings = read_likeliest(llama, texts)
    chance, before = math.log(llama.model.vocab_size), readings[-1].before.mean().item()
    outcome = search(readings, list(kinds.repairs(llama.model)), seconds)
    told = f"{before:.2f} nats a token of {kind} ({outcome.tokens} tokens; chance is {chance:.2f})"
    if not outcome.loss < chance - LIKELY:
        why = (
            f"{told}: the weights are untrained, or trained on something else, so no text shows whether they are in "
            f"order"
        )
        results = [not_applicable("likely text", why)]
        return results + [not_applicable(check, "needs a text that the model finds likely; pass one with --text")
                          for check in CHECKS if check != kinds.EPS] + [_of_eps(llama, {})]  # fmt: skip
    if outcome.found:
        after = f"{told}; {outcome.loss:.2f} with what is named below"
        results = [failed("likely text", after, "See the failure below that names what makes the text likelier.")]
    else:
        results = [passed("likely text", told)]
    for check in CHECKS:
        gains = {repair: gain for repair, gain in outcome.gains.items() if repair.check == check}
        if faults := [(f"{repair.fault}: mended, a token is {gain.mean:.3g} nats likelier ({gain.certainty:.0f} "
                      f"standard errors)")
                      for repair, gain in outcome.found if repair.check == check]:  # fmt: skip
            results.append(failed(check, "; ".join(faults), kinds.MEANS[check]))
        elif check == kinds.EPS:
            results.append(_of_eps(llama, gains))
        elif not gains:
            told = (
                "there is no other that fits the shapes"
                if not outcome.untried
                else "--seconds were over before its turn"
            )
            results.append(not_applicable(check, told))
        else:
            results.append(_no_better(check, gains, outcome.untried))
    return results


def _no_better(check: str, gains: dict[Repair, Gain], untried: int) -> Result:
    worse = sum(gain.certainty < WORSE for gain in gains.values())
    told = f"{counted(len(gains), 'other form')} tried: {worse} less likely, none clearly likelier"
    if untried:
        told += f" (--seconds were over before {untried} of all)"
    return passed(check, told) if worse else not_applicable(check, f"{told}; the text cannot tell them apart")


def _of_eps(llama: Llama, gains: dict[Repair, Gain]) -> Result:
    eps = llama.model.params.norm_eps
    if eps not in kinds.EPSILONS:
        told = f"norm_eps is {eps:g}; Llama's releases have {' or '.join(f'{e:g}' for e in kinds.EPSILONS)}"
        return failed(kinds.EPS, told, kinds.MEANS[kinds.EPS])
    if gains and all(gain.certainty < -SURE for gain in gains.values()):
        return passed(kinds.EPS, f"{eps:g}; the text is clearly less likely with another")
    told = f"{eps:g} is one of the usual ones, and no text tells here which of them is the model's"
    return not_applicable(kinds.EPS, told)
