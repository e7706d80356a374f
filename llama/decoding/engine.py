"""One step of the model over its cache: prompts in, or one token of every row. Ids only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Optional

import torch

from .. import memory, runtime
from ..cache_use import CacheUse
from ..layers.parallel import group_size
from ..layers.products import AMX
from ..model import RMSNorm, Transformer
from ..runtime import device_kind
from .compiled import Recorded, make_graph
from .cpu_step import CpuStep, make_step

LOGITS_BYTES = 64 * 2**20  # bytes of a prompt's logits that exist at once, at most
CHUNK = 512  # columns of prompts in one pass, at least; the passes keep the memory of long prompts small
PASS = 2048  # tokens in one pass if the rows are few: fewer do not keep a GPU busy, and later passes need a mask
KEPT = 2**25 - 2**16  # bytes; see `keep_pages`


class WithoutOneDNN:
    """A block in which torch multiplies without oneDNN. For one row in bfloat16 on a CPU without AMX, oneDNN reads the
    weights at two thirds of the speed of torch's own product. The switch is the process's: the last thread to leave
    turns it back."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Condition(), 0, True

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """A block in which nobody turns oneDNN off."""
        with self._lock:
            self._lock.wait_for(lambda: self._inside == 0)
            yield

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags does the same, but warns about TF32

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch._C._set_mkldnn_enabled(self._before)
                self._lock.notify()


without_onednn = WithoutOneDNN()


def keep_pages() -> None:
    """Let glibc keep freed pieces of up to 32 MB, as it does once it has seen one freed. Otherwise it hands the pages
    of each large tensor back to the system, which zeroes them anew: a tenth to a quarter of a prompt's time. Touches no
    memory."""
    torch.empty(KEPT, dtype=torch.uint8)


class Engine:
    """Steps a `Transformer` over the rows ("slots") of its cache."""

    batch_invariant = False  # whether a row's numbers are the same to the bit whatever else runs

    def __init__(self, model: Any, compile: Optional[bool] = False) -> None:
        """model: a `Transformer`, or any module with its `params` and Meta's `forward(tokens, start_pos)`. compile:
        `wanted` of `make_graph`."""
        self.model = model
        self._compile = compile
        self.graph: Any = None
        self._few_rows: Optional[CpuStep] = None  # comes before the graph, for steps and small passes
        self._make_graph(compile)
        self._explained: Callable[[], AbstractContextManager[None]] = nullcontext
        keep_pages()
        if isinstance(model, Transformer):
            processes, sharers = group_size(model.output.group), runtime.memory_sharers(self.device)
            quantization = getattr(model.output, "quantization", None)
            placement = memory.Placement(model.params, self.dtype, processes, self.device, sharers, quantization)
            self._explained = partial(memory.explained, placement)  # adds advice to out-of-memory errors
        self.as_built = False  # whether the model was so at the last `refresh`
        self._ready = self.graph  # self.graph, or None while the model is not as it was built
        # A module that wraps a Transformer, as torch.compile's does, has its cache.
        inside = (m for m in model.modules() if isinstance(m, Transformer))
        self._use = next((m.cache_use for m in inside), None) or CacheUse()
        self._samples: tuple[list[int], list[torch.Tensor]] = [], []

    def _make_graph(self, compile: Optional[bool]) -> None:
        """Make the graph for the model as it is now."""
        self.graph, self._few_rows = None, None
        if isinstance(self.model, Transformer):
            self._few_rows = make_step(self.model, self._compile)
            if self._few_rows is None or not self._few_rows.takes(self.model.params.max_batch_size):
                self.graph = make_graph(self.model, compile)
        self._made_for = self._form()

    def _form(self) -> tuple[torch.device, torch.dtype, list[float]]:
        """What a graph contains beside shapes: the model's device, its dtype, and the eps of its norms."""
        parts = self.model.parts if isinstance(self.model, Transformer) else ()
        return self.device, self.dtype, [part.eps for part in parts if isinstance(part, RMSNorm)]

    @property
    def device(self) -> torch.device:
        """The device that the model is on now."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in now."""
        return self._weight.dtype

    @property
    def _weight(self) -> torch.Tensor:
        return self.model.norm.weight if isinstance(self.model, Transformer) else next(self.model.parameters())

    @property
    def is_as_built(self) -> bool:
        """Whether nothing was put into the model; looks anew each time."""
        return isinstance(self.model, Transformer) and self.model.as_built

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        """Meta's call: ids (B, S) at start_pos -> logits float32 (B, S, V). Whatever was put into the model runs."""
        with self._explained(), runtime.current(self.device):
            return self.model.forward(tokens, start_pos).float()

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[int],
        start: int = 0,
        *,
        layers: int = -1,
        pass_length: int = 0,
    ) -> Iterator[tuple[list[int], torch.Tensor, int]]:
        """Read prompts into slots, a chunk of columns at a time. start: how many of their first tokens are there
        already.

        Yields (rows, hidden, at): the rows whose prompts reach the chunk, its hidden states (rows, columns, dim), and
        the position of its first column. Shorter rows are filled up on the right. The padding is never read: attention
        is causal, and each padded column is overwritten by a real token before any query reaches it. layers,
        pass_length: as in the model.
        """
        lengths = [len(prompt) for prompt in prompts]
        chunk = max(CHUNK, PASS // len(prompts))
        for at in range(start, max(lengths), chunk):
            end = min(at + chunk, max(lengths))
            rows = [row for row, length in enumerate(lengths) if length > at]
            end = min(end, max(lengths[row] for row in rows))
            ids = [[*prompts[row][at:end], *[0] * (end - max(at, lengths[row]))] for row in rows]
            owned = runtime.to_device([slots[row] for row in rows], self.device)
            with self._explained(), runtime.current(self.device):
                batch, how = runtime.to_device(ids, self.device), {"layers": layers, "pass_length": pass_length}
                hidden = self.model.hidden_states(batch, at, slots=owned, **how)
            yield rows, hidden, at

    def decode(self, tokens: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """One token of every row, (B,), at its own position; row i owns slot i. -> float32 logits (B, vocab_size),
        which are good until the next call."""
        span = max(positions) + 1
        with self._explained(), runtime.current(self.device), self._fast_products(len(positions)):
            if (step := self._step_of(len(positions))) is not None:
                return step(tokens, positions, range(len(positions)))
            if self._ready is not None:
                return self._ready(tokens, positions)
            same = len(set(positions)) == 1
            start_pos = positions[0] if same else runtime.to_device(positions, self.device)
            hidden = self.model.hidden_states(tokens[:, None], start_pos, span=span)
            return self.model.output(hidden[:, -1]).float()

    def _step_of(self, rows: int) -> Optional[CpuStep]:
        """The form that runs so many tokens, of one slot or of several, in one go, if there is one."""
        step = self._few_rows if self.as_built else None
        return step if step is not None and step.takes(rows) else None

    @property
    def looks_ahead(self) -> bool:
        """Whether a step costs the host so little that the next may be queued before it knows this one's ids."""
        return self.fills_up and device_kind(self.device) == "cuda"

    @property
    def fills_up(self) -> bool:
        """Whether steps are filled up with rows that nobody asked for; they write behind what `keep_columns` keeps."""
        return isinstance(self._ready, Recorded)

    def fetch(self, tensors: Sequence[torch.Tensor], meanwhile: Optional[Callable[[], None]] = None) -> list[Any]:
        """Tensors of the device as lists of numbers, with one wait for all. meanwhile: may queue work there, which is
        not waited for."""
        if device_kind(tensors[0]) != "cuda":
            if meanwhile is not None:
                meanwhile()
            return [tensor.tolist() for tensor in tensors]
        host = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True) for tensor in tensors]
        with runtime.current(self.device):
            for tensor, target in zip(tensors, host):
                target.copy_(tensor, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            if meanwhile is not None:
                meanwhile()
            copied.synchronize()
        return [target.tolist() for target in host]

    def verify(
        self, tokens: Sequence[Sequence[int]], positions: Sequence[int], slots: Optional[Sequence[int]] = None
    ) -> torch.Tensor:
        """Run the newest token of each row, at its position (above 0), and what may follow it, (B, S), in one pass.
        slots: those of the rows; row i owns slot i if not given.

        -> float32 logits (B, S, vocab_size). What refused drafts leave in the cache is overwritten before
        any query reaches it.
        """
        S = len(tokens[0])
        span = max(positions) + S
        with self._explained(), runtime.current(self.device):
            if (step := self._step_of(len(tokens) * S)) is not None:
                rows = range(len(tokens)) if slots is None else slots
                at = [position + i for position in positions for i in range(S)]
                every = torch.tensor(tokens, device="cpu").flatten()
                return step(every, at, [slot for slot in rows for _ in range(S)]).unflatten(0, (-1, S))
            batch = runtime.to_device(tokens, self.device)
            start_pos = positions[0] if len(set(positions)) == 1 else runtime.to_device(positions, self.device)
            owned = None if slots is None else runtime.to_device(slots, self.device)
            hidden = self.model.hidden_states(batch, start_pos, slots=owned, span=span, pass_length=0)
            return self.model.output(hidden).float()

    @property
    def joins_passes(self) -> bool:
        """Whether a pass over several tokens of some rows pays in place of their steps. A GPU's step is recorded, and
        takes a fifth of the time of a pass, which is not (7B on an H200)."""
        return not (isinstance(self.graph, Recorded) and device_kind(self.device) == "cuda")

    def run_each(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """Run tokens in one pass, (N,), each at its position (above 0) in its slot; some of a slot follow one another.
        -> float32 logits (N, vocab_size)"""
        if (step := self._step_of(len(tokens))) is not None:
            with self._explained():
                return step(torch.tensor(tokens, device="cpu"), positions, slots)
        if len(set(slots)) == 1:
            return self.verify([tokens], positions[:1], slots[:1])[0]
        with self._explained(), runtime.current(self.device):
            batch, start_pos, owned = (runtime.to_device(each, self.device) for each in (tokens, positions, slots))
            hidden = self.model.hidden_states(
                batch[:, None], start_pos, slots=owned, span=max(positions) + 1, pass_length=0
            )
            return self.model.output(hidden[:, 0]).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, dim) -> float32 (B, vocab_size)"""
        with self._explained(), runtime.current(self.device), self._fast_products(len(hidden)):
            return self.model.output(hidden).float()

    def _fast_products(self, rows: int) -> AbstractContextManager[None]:
        one_row = rows == 1 and self.dtype == torch.bfloat16 and device_kind(self.device) == "cpu" and not AMX
        return without_onednn if one_row else nullcontext()

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor, alternatives: int = 0) -> tuple[torch.Tensor, ...]:
        """`scores` after hidden states (N, dim).

        The head runs over a few at a time: all logits of a long prompt would take more memory than the model.
        """
        step = max(1, LOGITS_BYTES // (4 * self.model.vocab_size))
        some = [slice(i, i + step) for i in range(0, len(targets), step)]
        parts = [self.scores(self.logits(hidden[rows]), targets[rows], alternatives) for rows in some]
        none = targets.new_empty(0, min(alternatives, self.model.vocab_size))
        return (
            tuple(map(torch.cat, zip(*parts)))
            if parts
            else (targets.float(), *[none, none.float()] * bool(alternatives))
        )

    def scores(self, logits: torch.Tensor, targets: torch.Tensor, alternatives: int = 0) -> tuple[torch.Tensor, ...]:
        """ln p of targets (N,) under float32 logits (N, V): float32 (N,), NaN where logits are not finite. With
        alternatives also this number of `best` at each place: their ids, and ln p of each."""
        told = self.of_rows(prompt_logprobs, logits, targets)
        return (told, *self.best(logits, alternatives)) if alternatives else (told,)

    def best(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest ids under float32 logits (N, V), and ln p of each: (N, count), or (N, V) if that is fewer."""
        top = self.of_rows(partial(torch.log_softmax, dim=-1), logits).topk(min(count, logits.shape[-1]), dim=-1)
        return top.indices, top.values

    def of_rows(self, function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
        """A function that computes something for each of some rows."""
        return function(*rows)

    @property
    def lock(self) -> threading.RLock:
        """While a thread holds it, no other thread steps."""
        return self._use.lock

    @property
    def stepping(self) -> bool:
        """Whether a turn is under way."""
        return self._use.stepping

    def turn(self) -> AbstractContextManager[None]:
        """See `CacheUse.turn`."""
        return self._use.turn(self._made_for[0])

    def refresh(self) -> None:
        """Look at what the model has become, so that the next call runs with that. Call it on all ranks alike."""
        form = self._form()
        if form != self._made_for:
            self._make_graph(self._compile if form[:2] != self._made_for[:2] else None)
        self.as_built = self.is_as_built
        if self.as_built:
            self.model.keep_fused()
        self._ready = self.graph if self.as_built else None
        if self._ready is not None:
            self._ready.refresh()
        if self._few_rows is not None:
            self._few_rows.refresh()

    def take(self, user: object) -> bool:
        """From now on the cache is this user's, in its turns. -> whether it is as this user's steps left it"""
        return self._use.take(user)

    def owned_by(self, user: object) -> bool:
        """Whether nobody else has written to the cache since."""
        return self._use.is_of(user)

    def weights_state(self) -> tuple[Any, torch.Tensor]:
        """-> a key, and some numbers of each weight, on the device. If a weight changes, one of the two does; an edit
        of `.data` shows in the numbers only."""
        table = self.model.freqs_cis
        tensors = [p for part in self.model.parts for p in part._parameters.values() if p is not None]
        tensors.append(torch.view_as_real(table) if table.is_complex() else table)
        # A matrix that oneDNN has packed has no address, and no numbers to see.
        plain = [t for t in tensors if not t.is_mkldnn]
        places = [id(t) if t.is_mkldnn else t.data_ptr() for t in tensors]
        if places != self._samples[0]:
            lines = [t.detach().diagonal() if t.ndim > 1 else t.detach() for t in plain]
            self._samples = places, [t.flatten()[:: max(1, t.numel() // 8)] for t in lines]
        versions = [-1 if t.is_inference() else t._version for t in tensors]
        return (self._made_for, places, versions), torch.cat(self._samples[1])

    def keep_columns(self, columns: Sequence[int]) -> None:
        """Say how many first columns of each slot are to stay when steps are filled up with rows that nobody asked
        for."""
        self._use.columns = list(columns)

    def not_finite(self, prompt: int, what: str = "logits", slot: Optional[int] = None) -> ValueError:
        """The error for a prompt of which `what` is not finite. Zeroes its slot, or all if that is None: NaN in a
        column reaches every query that sees the column, even with a weight of 0."""
        self.clear(slot)
        way = "check the weights" if self.dtype == torch.float32 else "build it with dtype='float32' (or 'bfloat16')"
        return ValueError(f"the model's {what} for prompt {prompt} are not finite in {self.dtype}; {way}")

    def check_files(self) -> None:
        """ValueError if somebody has written to the files that the model reads its weights from."""
        if (files := getattr(self.model, "files", None)) is not None:
            files.check_unchanged(self.model.parameters())

    def clear(self, slot: Optional[int]) -> None:
        """Zero a slot, or all if it is None."""
        for cache in self._caches():
            (cache if slot is None else cache[slot]).zero_()

    def copy(self, source: int, target: int, columns: int) -> None:
        """Copy the first columns of one slot into another."""
        for cache in self._caches():
            cache[target, :columns] = cache[source, :columns]

    def swap(self, a: int, b: int, columns: tuple[int, int]) -> None:
        """Exchange the contents of two slots. columns: how many of the first ones are used in each."""
        for cache in self._caches():
            kept = cache[a, : columns[0]].clone()
            cache[a, : columns[1]] = cache[b, : columns[1]]
            cache[b, : columns[0]] = kept

    def _caches(self) -> Iterator[torch.Tensor]:
        """The caches of all layers; none of a module that is no Transformer."""
        for attention in self.model.attentions() if isinstance(self.model, Transformer) else ():
            yield attention.cache_k
            yield attention.cache_v


def prompt_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`token_logprobs`, but NaN if any of a row's logits is not finite."""
    return torch.add(token_logprobs(logits, tokens), logits.sum(dim=-1), alpha=0)  # x + 0 y


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """ln p of tokens (N,) under float32 logits (N, vocab_size), before any temperature or top-p. -> (N,)"""
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
