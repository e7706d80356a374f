"""What a request may ask for: every option once, checked in one place, and the object that carries a request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Optional, TypedDict, Union

from .constraints import Constraint
from .decoding.settings import Sampling
from .system.checks import whole, whole_number
from .system.printable import counted, escaped, shortened
from .system.program import nearest

# What other programs call these options.
ALSO_CALLED = {
    "max_tokens": "max_gen_len", "max_new_tokens": "max_gen_len", "max_length": "max_gen_len",
    "n_predict": "max_gen_len", "temp": "temperature", "repeat_penalty": "repetition_penalty",
}  # fmt: skip


class Options(TypedDict, total=False):
    """What every completion and stream takes beside Meta's arguments.

    Attributes:
        stop: a text or several; an answer ends before the first that comes up, also across ids. Default: None.
        stop_ids: ids that end an answer as EOS does. Default: ().
        seed: one for the call, or a list with one for each prompt. A prompt with a seed gives the same text whatever
            else runs, but for rounding (see `batch_invariant`). Default: None.
        top_k: draw one of this many best ids; 0 means all. Default: 0.
        min_p: draw from ids that are at least this share as probable as the best. Default: 0.0.
        repetition_penalty: makes ids less probable that the row has already, prompt included; from 1e-10 to 1e10, and 1
            does nothing. Default: 1.0.
        presence_penalty: what is subtracted, once, from the logits of ids that were generated. Default: 0.0.
        frequency_penalty: what is subtracted from the logits of ids for each time that they were generated. Default:
            0.0.
        logit_bias: ids, and what is added to their logits: at most 1e10, and -inf forbids an id. Default: None.
        draft: at temperature 0, whether to verify in one pass several ids that the text itself suggests. None does so
            in float32 on a CPU, where it changes no id. True does so everywhere; rounding may then choose another of
            equally good ids. With a draft model its guesses are verified as well; False does without all guesses, and
            then drawn ids are what they are without a draft model. Default: None.
        n: answers to each prompt, which is read once. Those of prompt i are the results n * i to n * i + n - 1; the
            k-th draws with the prompt's seed + k, if it has one. Default: 1.
        constraint: the form that each answer is to have: {"json_schema": …}, {"json_object": True}, {"regex": …},
            {"choice": […]} or {"grammar": …}; see docs/PYTHON.md. If the answer is whole, EOS and stop_ids may come,
            and only then; max_gen_len and stop texts end it anywhere. Default: None.
    """

    stop: Union[str, Sequence[str], None]
    stop_ids: Sequence[int]
    seed: Union[int, Sequence[int], None]
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Optional[Mapping[int, float]]
    draft: Optional[bool]
    n: int
    constraint: Optional[Mapping[str, Any]]


class TurnOptions(Options, total=False):
    """What a conversation takes for all its turns, or for one: `Options`, but no n, and arguments of Meta's.

    Attributes:
        temperature: 0 takes the best id; above it, ids are drawn, the more freely the higher it is. Default: 0.6.
        top_p: ids are drawn from the fewest best whose mass exceeds this. Default: 0.9.
        max_gen_len: ids of a reply, at most; None lets it have all the room. Default: None.
        logprobs: whether chunks have each id's log-probability, or how many of the best ids at each place. Default:
            False.
    """

    temperature: float
    top_p: float
    max_gen_len: Optional[int]
    logprobs: Union[bool, int]


class Prompts(NamedTuple):
    """Prompts as ids. begun: for each prompt the ids at its end that begin the reply; empty if no prompt has such ids.
    places: the index of each prompt among the dialogs that were passed; unsafe dialogs are not run. scored: for each
    prompt the ids to score, its last ones and one behind it; empty if no prompt has such ids."""

    ids: Sequence[Sequence[int]]
    begun: Sequence[Sequence[int]] = ()
    places: Sequence[int] = ()
    scored: Sequence[Sequence[int]] = ()

    def times(self, n: int) -> Prompts:
        """Each prompt n times in a row."""
        return Prompts(
            [ids for ids in self.ids for _ in range(n)],
            [ids for ids in self.begun for _ in range(n)],
            [n * place + k for place in self.places for k in range(n)],
            [ids for ids in self.scored for _ in range(n)],
        )


@dataclass(frozen=True)
class Asked:
    """A call as it was made, before it is checked. prompts: makes the prompts, and raises if they are wrong; it is
    called once, when the processes compare what they were given. options: Meta's arguments and `Options` by name.
    continues: the prompt goes on from what is likely to be in the cache.
    """

    prompts: Callable[[], Prompts]
    options: Mapping[str, Any]
    echo: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Choice:
    """Meta's arguments and `Options`, checked. Either the prompts have seeds, or the call has one, or neither."""

    sampling: Sampling
    length: int  # the most ids that may follow a prompt
    scored: bool
    alternatives: int
    stops: tuple[str, ...]
    stop_ids: tuple[int, ...]
    seeds: tuple[Optional[int], ...]  # one for each answer
    seed: Optional[int]
    draft: Optional[bool]
    n: int  # answers to each prompt
    constraint: Optional[Constraint] = None

    def values(self) -> dict[str, Any]:
        """The options by name. What means the same looks the same: stop and stop_ids, which may come as sets, are
        sorted."""
        seeds = self.seed if self.seed is not None else self.seeds
        stops = {"stop": sorted(set(self.stops)), "stop_ids": sorted(set(self.stop_ids))}
        metas = {"max_gen_len": self.length, "logprobs": self.alternatives or self.scored}
        others = {"seed": seeds, "draft": self.draft, "n": self.n, "constraint": self.constraint}
        return {**metas, **vars(self.sampling), **stops, **others}


METAS_OPTIONS = ("temperature", "top_p", "max_gen_len", "logprobs")
SAMPLING_OPTIONS = tuple(field.name for field in fields(Sampling))
DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(Sampling)},
    **{"max_gen_len": None, "logprobs": False, "stop": None, "stop_ids": (), "seed": None, "draft": None, "n": 1},
    "constraint": None,
}
TOLD = {  # the sentence that the terminal's help has for each option of an answer
    "temperature": "0 takes the best id; more is freer",
    "top_p": "draw among the best ids of this mass",
    "top_k": "draw among this many best ids; 0 is all",
    "min_p": "draw ids at least this share as probable as the best",
    "repetition_penalty": "above 1, ids that were there before get rarer",
    "presence_penalty": "taken once from the logits of generated ids",
    "frequency_penalty": "taken from those for each time that they came",
    "max_gen_len": "tokens of an answer at most; all that fit if not given",
    "stop": "a text that ends the answer; several as a JSON list",
}
SETTABLE = [*TOLD, "seed"]  # options that /set changes in a chat
# Options that a line of --jsonl may have as keys.
IN_JSON = [name for name in DEFAULTS if name not in ("logprobs", "logit_bias", "seed", "n")]


def _several(name: str, value: Any, what: str) -> tuple[Any, ...]:
    """The parts of a list of texts, ids or seeds. An iterator is refused, since it would be empty at the next call."""
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Collection):
        raise ValueError(f"{name}={shortened(value)} must be {what}, in a list")
    try:
        return tuple(value)
    except TypeError as error:  # an array without dimensions
        raise ValueError(f"{name}={shortened(value)} must be {what}, in a list") from error


def stop_strings(stop: Any) -> tuple[str, ...]:
    """The texts of the option `stop`, which may be None, one text or several."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else _several("stop", stop, "texts")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"stop={shortened(stop)} must be texts that are not empty")
    return stops


def with_stops(options: Mapping[str, Any], ids: Sequence[int] = (), texts: Sequence[str] = ()) -> dict[str, Any]:
    """The options, with further ids and texts that end an answer."""
    added: dict[str, Any] = {}
    if ids:
        given = options.get("stop_ids")
        added["stop_ids"] = (*(() if given is None else _several("stop_ids", given, "ids")), *ids)
    if texts:
        added["stop"] = (*stop_strings(options.get("stop")), *texts)
    return {**options, **added}


def _seeds(given: Any, prompts: int) -> tuple[Optional[int], tuple[Optional[int], ...]]:
    """The option `seed` as (the call's seed, the seed of each prompt)."""
    is_one = (
        given is None or whole(given) is not None or not isinstance(given, Collection) or isinstance(given, (str, Set))
    )
    told = (given,) if is_one else _several("seed", given, "a whole number, or one for each prompt")
    if not is_one and len(told) != prompts:
        raise ValueError(
            f"{counted(len(told), 'seed')} for {counted(prompts, 'prompt')}; give one seed, or one for each prompt"
        )
    numbers = tuple(None if n is None else whole_number("seed", n, 0, 2**63 - 1, "from 0 to 2**63 - 1") for n in told)
    return (numbers[0], (None,) * prompts) if is_one else (None, numbers)


def parse_options(given: Mapping[str, Any], prompts: int, vocab_size: int, max_seq_len: int) -> Choice:
    """ValueError for an option that does not exist or is out of range. What is not given has Meta's default."""
    known = (*Options.__annotations__, *METAS_OPTIONS)
    if unknown := sorted(set(given) - set(known)):
        told = ", ".join(f"{escaped(name)}{nearest(name, known, also_called=ALSO_CALLED)}" for name in unknown)
        raise ValueError(f"unknown option {told}; there are {', '.join(known)}")
    length, logprobs = given.get("max_gen_len"), given.get("logprobs", False)
    alternatives = 0 if isinstance(logprobs, bool) else whole(logprobs)
    if alternatives is None or alternatives < 0:
        raise ValueError(f"logprobs={shortened(logprobs)} must be True, False, or how many alternatives to report")
    ids = given.get("stop_ids")
    stop_ids = [whole(i) for i in (() if ids is None else _several("stop_ids", ids, "ids"))]
    if not all(i is not None and 0 <= i < vocab_size for i in stop_ids):
        raise ValueError(f"stop_ids={shortened(ids)} must be ids from 0 to {vocab_size - 1}")
    seed, seeds = _seeds(given.get("seed"), prompts)
    draft = given.get("draft")
    if draft is not None and not isinstance(draft, bool):
        raise ValueError(f"draft={shortened(draft)} must be True, False or None")
    n = whole_number("n", given.get("n", 1), 1)
    sampling = Sampling(**{name: given[name] for name in SAMPLING_OPTIONS if name in given})
    sampling.check_bias(vocab_size)
    return Choice(
        sampling,
        max_seq_len - 1 if length is None else whole_number("max_gen_len", length, 0),
        logprobs is True or alternatives > 0,
        alternatives,
        stop_strings(given.get("stop")),
        tuple(i for i in stop_ids if i is not None),
        tuple(None if seed is None else seed + k for seed in seeds for k in range(n)),
        seed,
        draft,
        n,
        Constraint.of(given.get("constraint")),
    )
