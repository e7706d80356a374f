"""fairscale's model-parallel layers with a forward made for inference. No other file calls collectives.

A layer says how its weight is cut. `shard_dim` is the dimension of the full matrix that the ranks of the model-parallel
group share evenly, in rank order; `copies` is how many neighbouring ranks hold the same part. A layer with several
tensors gives `shard_dims`, one entry per tensor. Only this says how a weight is cut; loading, resharding and quantizing
read it.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any, Optional, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as mpu
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import nn

from ..runtime import acts_alone, chosen_device, current, device_kind, has_failed, machine, release_first
from ..system import peers
from ..system.launch import is_first_process as is_first_process
from ..system.printable import reason
from ..system.progress import say
from . import shared_memory
from .products import product

Make = Callable[[list[torch.Tensor]], torch.Tensor]  # makes the tensor that holds several, one below the other
Group = Optional["dist.ProcessGroup"]  # None: this process holds the whole model

# Most bytes of a message that is summed by reading the other GPUs' memory, if `prepare_small_all_reduces` allows it:
# one row takes 9 microseconds, and 16 to 18 with NCCL. Every rank reads the whole message of every other, so NCCL sums
# larger ones. Inductor draws the line at the same size.
SMALL = 128 * 1024


def world() -> Group:
    """All processes that act alike, or None if this one has joined none."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and not acts_alone() else None


def model_parallel_group() -> Group:
    """The ranks that share one copy of the model, or None if one process holds all of it."""
    if acts_alone() or not mpu.model_parallel_is_initialized() or mpu.get_model_parallel_world_size() == 1:
        return None
    return mpu.get_model_parallel_group()


def group_size(group: Group) -> int:
    """How many ranks share the model."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This process's rank in the group."""
    return 0 if group is None else dist.get_rank(group)


def several_processes() -> bool:
    """Whether this process has joined others, of this copy of the model or of another."""
    return group_size(world()) > 1


def split(full: int, what: str, group: Group, parts: Optional[int] = None) -> int:
    """The size of this rank's part of a dimension of `full` entries, cut into `parts`, or one part for each rank.

    ValueError, which calls the dimension `what`, if the parts are not even.
    """
    ranks = group_size(group)
    parts = parts or ranks
    if full % parts or ranks % parts:
        raise ValueError(f"{what} ({full}) cannot be shared evenly by {ranks} processes; use a divisor of {full}")
    return full // parts


def all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the group, in `x`'s dtype: in `x` itself, or in a new tensor. Use `x` no more."""
    if group is None:
        return x
    _check_step(group)
    if (room := _room(x, group)) is not None and x.dtype in shared_memory.SUMMED:
        if torch.compiler.is_compiling() or not x.is_contiguous():
            return torch.ops.llama_shared.sum(x.contiguous(), room)
        torch.ops.llama_shared.sum_(x, room)
        return x
    if group.group_name in _small and _is_small(x.dtype, x.numel()):
        return small_all_reduce(x, group.group_name)
    _run(dist.all_reduce, x, group=group)
    return x


def _run(collective: Callable[..., Any], *tensors: Any, group: dist.ProcessGroup, **more: Any) -> None:
    """Run one of torch's collectives, and wait for its end. Raises the errors of `peers.wait_until`, if `tensors` are a
    CPU's.

    gloo waits until the group's time limit for a message of which a part was sent, or received, when the other process
    died: as it closes the connection, it tells those only that wait for their turn.
    """
    if torch.compiler.is_compiling() or device_kind(tensors[0]) != "cpu":
        collective(*tensors, group=group, **more)
        return
    work = collective(*tensors, group=group, async_op=True, **more)
    try:
        peers.wait_until(partial(_has_ended, work))
    except BaseException:
        if not work.is_completed():
            threading.Thread(target=_outlast, args=(work, group), name="llama-message", daemon=True).start()
        raise


def _outlast(work: Any, group: dist.ProcessGroup) -> None:
    """Keep a group as long as one of its messages, which was given up, goes on: a group that ends would wait for it."""
    with suppress(RuntimeError):  # nobody asks any more how the message ended
        work.wait()


def _has_ended(work: Any, seconds: float) -> bool:
    try:
        work.wait(timedelta(seconds=seconds))
        return True
    except RuntimeError:
        if not work.is_completed():  # the message goes on
            return False
    work.wait()  # raises its error
    return True


def _room(x: torch.Tensor, group: dist.ProcessGroup) -> Optional[torch.Tensor]:
    """This process's part in the memory that the group's processes share, if they do and x lies on a CPU."""
    return _rooms.get(group.group_name) if device_kind(x) == "cpu" else None


def room_of(group: Group) -> Optional[torch.Tensor]:
    """This process's part in the memory that the group's processes share; None if they do not."""
    return None if group is None else _rooms.get(group.group_name)


def messages_of(group: Group) -> Optional[tuple[int, int]]:
    """What a step in C++ needs to sum and gather with the group's processes: their room, and the address of `Messages`.
    Zeros for one process; None if they share no memory."""
    if group is None:
        return 0, 0
    room = room_of(group)
    return None if room is None else (int(room), int(torch.ops.llama_shared.messages(room)))


@contextmanager
def sharing(group: Group, room: torch.Tensor) -> Iterator[None]:
    """A block in which the group's messages go over this room: a step that is compiled has it as an input."""
    assert group is not None
    _rooms[group.group_name] = room
    try:
        yield
    finally:
        del _rooms[group.group_name]


# Name of a group -> this process's part in its shared memory; None for one whose messages all go over gloo.
_rooms: dict[str, Optional[torch.Tensor]] = {}
_world_of_rooms: Group = None  # the world of all these groups


def share_memory(group: Group, device: torch.device) -> None:
    """Let what CPUs sum and gather go over memory that the group's processes share, if all run on this machine.

    Call it on all ranks alike: all share it, or none, and then gloo carries their messages.
    """
    global _world_of_rooms
    if group is None:  # this process may act alone beside a group that goes on
        return
    if _world_of_rooms is not world():  # the caller has left that one, and groups of the new one have the same names
        _leave_rooms()
        _world_of_rooms = world()
    if device_kind(device) != "cpu" or group.group_name in _rooms:
        return
    _rooms[group.group_name] = None
    if "cpu:gloo" not in dist.get_backend_config(group):
        return
    ranks, rank = group_size(group), group_rank(group)
    places = gather_objects(shared_memory.place(), group)
    if None in places or len(set(places)) > 1:
        return
    joined: list[torch.Tensor] = []
    with torch.inference_mode(False), ExitStack() as stack:
        try:
            _on_all(lambda: None if rank else shared_memory.load(), group)  # the others find what it has compiled
            _on_all(shared_memory.load, group)
            memories = _on_all(lambda: stack.enter_context(shared_memory.made(ranks, rank)), group)
            _on_all(lambda: joined.append(shared_memory.join(memories, rank, _patience(group))), group)
            _on_all(lambda: shared_memory.check(joined[0], ranks, rank), group)
        except _Unable as error:
            say(f"Sums over several processes go over gloo, which is slow: {error}")
            for room in joined:
                torch.ops.llama_shared.leave(room)
            return
    _rooms[group.group_name] = joined[0]


def _patience(group: dist.ProcessGroup) -> float:
    """The group's time limit in seconds; torch has only a private name for it."""
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def _leave_rooms() -> None:
    global _world_of_rooms
    _world_of_rooms = None
    for room in _rooms.values():
        if room is not None:
            torch.ops.llama_shared.leave(room)
    _rooms.clear()


class _Unable(Exception):
    """A rank cannot do what all were to do."""


def _on_all(step: Callable[[], Any], group: Group) -> list[Any]:
    """What a step returned on each rank. `_Unable`, on all of them, if it failed on one."""
    try:
        outcome, why = step(), ""
    except Exception as error:
        outcome, why = None, reason(error)
    outcomes = gather_objects((outcome, why), group)
    for rank, (_, why) in enumerate(outcomes):
        if why:
            raise _Unable(f"{why} (on rank {rank})")
    return [outcome for outcome, _ in outcomes]


def _is_small(dtype: torch.dtype, numel: int) -> bool:
    """Whether torch's one-shot kernel can sum such a message: it knows two dtypes, and reads 16 bytes at a time."""
    size = numel * dtype.itemsize
    return dtype in (torch.float32, torch.bfloat16) and 0 < size <= SMALL and size % 16 == 0


def _symmetric_memory() -> Optional[SimpleNamespace]:
    """The parts of torch's symmetric memory used here. None if one is missing: the module is private and still
    changing."""
    try:
        from torch.distributed import _symmetric_memory as module

        one_shot = torch.ops.symm_mem.one_shot_all_reduce
        return SimpleNamespace(empty=module.empty, rendezvous=module.rendezvous, one_shot_all_reduce=one_shot)
    except (ImportError, AttributeError):
        return None


class _OneShot:
    """Small sums over a group: this rank's message lies in memory that the others read. Call the methods on all ranks.

    One buffer is enough. torch's kernel waits for all ranks before it reads, and again before it ends, until all have
    read (`sync_remote_blocks` in CUDASymmetricMemoryOps.cu); the next message is written behind it on the same stream.
    The form that also copies the message (`one_shot_all_reduce_copy`) would save a launch, but signals before all of
    its threads have copied.
    """

    def __init__(self, memory: SimpleNamespace, group: dist.ProcessGroup, device: torch.device) -> None:
        self.memory, self.group, self.device = memory, group, device

    def allocate(self) -> bool:
        """Make the buffer. All dtypes share it: a second one may lie at an offset in torch's pool, which the kernels of
        some releases forget."""
        self.buffer = self.memory.empty(SMALL // 4, dtype=torch.float32, device=self.device)
        return True

    def meet(self) -> bool:
        """Exchange the buffers' addresses with the other ranks."""
        self.handle = self.memory.rendezvous(self.buffer, self.group.group_name)
        return self.handle is not None

    def check(self) -> bool:
        """Whether two sums, one after the other, are right. A rank that sees a wrong one goes on with the others."""
        ranks, numbers = group_size(self.group), torch.arange(SMALL // 4, dtype=torch.float32, device=self.device)
        sums = [self(numbers + turn * group_rank(self.group)) for turn in (1, 2)]
        return all(torch.equal(sums[i], numbers * ranks + (i + 1) * ranks * (ranks - 1) / 2) for i in range(2))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        message = self.buffer.view(x.dtype)[: x.numel()].view(x.shape)
        with current(self.device):  # the kernel goes to the current device's stream
            message.copy_(x)
            return self.memory.one_shot_all_reduce(message, "sum", self.group.group_name)


_small: dict[str, _OneShot] = {}  # name of a group -> its prepared sums
_without: set[str] = set()  # names of groups whose sums are all NCCL's


@torch.library.custom_op("llama::small_all_reduce", mutates_args=())
def small_all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """`all_reduce` of a small message. An operator, because a compiler would put a tensor of its own in the buffer's
    place."""
    return _small[group](x)


@small_all_reduce.register_fake
def _(x: torch.Tensor, group: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def prepare_small_all_reduces(group: Group, device: torch.device, dtype: torch.dtype, numel: int) -> bool:
    """Let `all_reduce` sum small messages over memory that the group's GPUs share. Returns whether it will for `numel`
    numbers.

    Call it on all ranks alike, outside of any capture of a graph. All ranks get the same answer; it is False on CPUs,
    on several machines, and if any rank lacks something or computes a wrong sum.
    """
    if group is None or not _is_small(dtype, numel) or group.group_name in _without:
        return False
    if group.group_name in _small:
        return True
    memory = _symmetric_memory() if device_kind(device) == "cuda" else None
    places = gather_objects(None if memory is None else machine(), group)
    if memory is not None and set(places) == {machine()}:
        one_shot = _OneShot(memory, group, device)
        # All ranks end a step before the next: nobody waits there for a rank that failed here.
        if all(_everywhere(step, group, device) for step in (one_shot.allocate, one_shot.meet, one_shot.check)):
            _small[group.group_name] = one_shot
            return True
    _without.add(group.group_name)
    return False


def _everywhere(step: Callable[[], bool], group: Group, device: torch.device) -> bool:
    try:
        # Outside of inference mode, whose tensors cannot be written later.
        with current(device), torch.inference_mode(False), torch.no_grad():
            well = step()
    except Exception:
        well = False
    return all_agree(well, group)


def forget_small_all_reduces(group: Group) -> None:
    """From now on NCCL sums all messages of this group. Call it on all ranks, once no graph uses the buffer."""
    if group is not None:
        _small.pop(group.group_name, None)
        _without.add(group.group_name)


def _forget_groups() -> None:
    """The groups end, and a later one may have the same name."""
    if not has_failed():  # freeing the buffer waits for the GPU
        _small.clear()
    _without.clear()
    _leave_rooms()
    _patient.clear()


release_first(_forget_groups)


def _talks_on(group: Group) -> torch.device:
    """The device of small messages: the CPU, or the GPU if the caller's own group has no gloo."""
    gloo = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if gloo else torch.device("cuda", torch.cuda.current_device())


# The model's group on a process that others follow -> the thread that steps now, or None between two steps.
_led: WeakKeyDictionary[dist.ProcessGroup, Optional[int]] = WeakKeyDictionary()


@contextmanager
def a_step(group: Group) -> Iterator[None]:
    """A block in which the processes that follow this one take part."""
    if group is None:
        yield
        return
    _led[group] = threading.get_ident()
    try:
        yield
    finally:
        _led[group] = None


def between_steps(group: Group, led: bool = True) -> None:
    """From now on the group's processes follow this one, in `a_step` only; or no more."""
    if group is not None and led:
        _led[group] = None
    elif group is not None:
        _led.pop(group, None)


def _check_step(group: Group) -> None:
    """ValueError if nobody would take part."""
    if _led and group is not None and group in _led and _led[group] != threading.get_ident():
        raise ValueError(
            "the other processes follow the methods of this Llama (generate, score, embed and so on), and no call of "
            "its model or of a part of that; build in one process, or have torchrun start a script in which all "
            "processes call it"
        )


def all_agree(flag: bool, group: Group) -> bool:
    """Whether `flag` is true on all ranks of the group. A collective."""
    return bool(least(int(flag), group))


def least(number: int, group: Group) -> int:
    """The smallest of the ranks' numbers. A collective."""
    if group is None:
        return number
    _check_step(group)
    return int(all_gather(torch.tensor([number], device=_talks_on(group)), group).min())


# torch 2.13 renames it, and warns about the old name.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(..., n) on each rank -> (..., n * ranks), in rank order. For one row, a view of the message."""
    if group is None:
        return x
    _check_step(group)
    ranks = group_size(group)
    if (room := _room(x, group)) is not None:
        return torch.ops.llama_shared.gather(x.contiguous(), room, ranks)
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])  # gloo takes no other form
    _run(_gather, parts, x.contiguous(), group=group)
    return parts.view(ranks, *x.shape).movedim(0, -2).flatten(-2)


def sum_in_order(x: torch.Tensor, group: Group) -> torch.Tensor:
    """`all_reduce` that adds in rank order, whatever the message's size; in float32, if x has 16 bits. gloo and NCCL go
    around in a ring, where each part of a message begins at another rank. Sums over shared memory are always so."""
    if group is None:
        return x
    if _room(x, group) is not None:
        return all_reduce(x, group)
    _check_step(group)
    parts = x.new_empty(group_size(group) * x.shape[0], *x.shape[1:])
    _run(_gather, parts, x.contiguous(), group=group)
    total, *others = parts.view(group_size(group), *x.shape).unbind()
    total = total.float() if x.dtype.itemsize == 2 else total
    for other in others:
        total = total + other
    return total.to(x.dtype)


def broadcast_random_state(device: torch.device, group: Group) -> None:
    """Give every rank the generator state of the group's first rank, so that all of them draw the same tokens."""
    if group is None:
        return
    on_gpu = device_kind(device) == "cuda"
    with current(device):  # NCCL, if the group has nothing else, sends from the current GPU
        state = _from_first(torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state(), group)
    if on_gpu:
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Every rank's value, in rank order. Without a group: of all processes."""
    group = _or_world(group)
    with current(chosen_device()):  # NCCL, if the group has nothing else, sends from the current GPU
        mine, everyones, sizes = _room_for_all(value, group)
        _run(_gather, everyones, mine, group=group)
    return list(map(_unpacked, everyones.view(len(sizes), -1), sizes))


def _packed(value: Any, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)


def _unpacked(message: torch.Tensor, size: Optional[int] = None) -> Any:
    return pickle.loads(message[:size].cpu().numpy().tobytes())


def _from_first(value: Any, group: dist.ProcessGroup) -> Any:
    """The value of the group's first rank, on every rank."""
    device, sends = _talks_on(group), dist.get_rank(group) == 0
    message = _packed(value if sends else None, device)
    size = torch.tensor([len(message)], device=device)
    _run(dist.broadcast, size, group=group, group_src=0)
    message = message if sends else message.new_empty(int(size))
    _run(dist.broadcast, message, group=group, group_src=0)
    return value if sends else _unpacked(message)


def _room_for_all(value: Any, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """This rank's value as a message that is as long as the longest of all ranks; room for all messages, one behind the
    other; and their own sizes."""
    device, ranks = _talks_on(group), dist.get_world_size(group)
    mine = _packed(value, device)
    sizes = torch.empty(ranks, dtype=torch.long, device=device)
    _run(_gather, sizes, torch.tensor([len(mine)], device=device), group=group)
    longest = int(sizes.max())
    return F.pad(mine, (0, longest - len(mine))), mine.new_empty(ranks * longest), sizes.tolist()


def replica() -> tuple[int, int]:
    """(index, count): which copy of the model this process belongs to, and how many there are."""
    if acts_alone() or not mpu.model_parallel_is_initialized():
        return 0, 1
    return mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()


def gather_from_replicas(mine: list[Any]) -> list[list[Any]]:
    """The lists of all replicas, in their order, on every process."""
    _, replicas = replica()
    if replicas == 1:
        return [mine]
    return gather_objects(mine, mpu.get_data_parallel_group())


def from_first_process(value: Any, everyone: Group = None) -> Any:
    """The first process's value, on every process. The others wait for it as long as it takes: it may be typing.
    everyone: the `patient_group` if not given."""
    everyone = everyone or patient_group()
    if everyone is None:
        return value
    return _from_first(value, everyone)


def to_first_process(value: Any, everyone: Group) -> list[Any]:
    """Every process's value, on the first one; elsewhere nothing."""
    assert everyone is not None
    mine, everyones, sizes = _room_for_all(value, everyone)
    parts = everyones.view(len(sizes), -1)
    receives = dist.get_rank(everyone) == 0
    _run(dist.gather, mine, list(parts) if receives else None, group=everyone, group_dst=0)
    return list(map(_unpacked, parts, sizes)) if receives else []


def patient_group() -> Group:
    """All processes, without a limit of time; None if there is only one."""
    if not several_processes():
        return None
    if _patient.get("world") is not world():
        connect = partial(dist.new_group, backend="gloo", timeout=timedelta(days=365))
        _patient.update(world=world(), group=peers.connected(connect))
    return cast(dist.ProcessGroup, _patient["group"])


_patient: dict[str, Any] = {}  # "group", which has a year's time limit, and the "world" that it was made in


def all_alike(value: Optional[str], group: Group) -> bool:
    """Whether all processes of the group gave the same text. False if one gave None. One small collective."""
    _check_step(group)
    group = _or_world(group)
    digest = hashlib.sha256((value or "").encode("utf-8", "surrogatepass")).digest()
    mine = torch.tensor(
        [[value is not None, int.from_bytes(digest[:7], "big")]], dtype=torch.long, device=_talks_on(group)
    )
    everyones = mine.new_empty(dist.get_world_size(group), 2)
    with peers.waiting(*members(group)):
        _run(_gather, everyones, mine, group=group)
        votes = everyones.tolist()
    return all(vote == votes[0] for vote in votes) and bool(votes[0][0])


def members(group: Group) -> tuple[list[int], str]:
    """The global ranks of a group, and its name. Without a group: of all processes."""
    group = _or_world(group)
    return dist.get_process_group_ranks(group), group.group_name


def _or_world(group: Group) -> dist.ProcessGroup:
    group = group or dist.group.WORLD
    assert group is not None
    return group


def _needs_autograd(weight: torch.Tensor, x: torch.Tensor, group: Group) -> bool:
    """Across ranks a gradient needs fairscale's autograd functions; on one process torch's own do."""
    if group is None or not torch.is_grad_enabled() or not (weight.requires_grad or x.requires_grad):
        return False
    _check_step(group)
    return True


def _new_weight(rows: int, columns: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns))
    if not weight.is_meta:  # on the meta device it would only import torch's compiler
        nn.init.xavier_normal_(weight)
    return weight


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """y = x Wᵀ, each rank holding some of W's rows. (..., in_features) -> (..., out_features / parts); with
    gather_output (..., out_features).

    parts: how many W is cut into, by default one for each rank; 4 parts on 8 ranks lie 0 0 1 1 2 2 3 3. Copies have no
    gradient, and gather no output. With gather_output the parts need not be even: the last ones are filled up, and what
    is gathered ends after out_features. fairscale's constructor is not run: on more than one rank it fills the full
    matrix first.
    """

    shard_dim = 0

    def __init__(
        self, in_features: int, out_features: int, *, gather_output: bool, parts: Optional[int] = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.gather_output = gather_output
        self.group = model_parallel_group()
        self.copies = group_size(self.group) // (parts or group_size(self.group))
        even = -(-out_features // group_size(self.group)) * group_size(self.group) if gather_output else out_features
        self.output_size_per_partition = split(even, "out_features", self.group, parts)
        self.weight = _new_weight(self.output_size_per_partition, in_features)
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _needs_autograd(self.weight, x, self.group):
            if self.copies > 1:
                raise ValueError(
                    f"no gradients where {self.copies} processes have the same heads; use fewer processes, or "
                    f"torch.no_grad()"
                )
            return self._without_filling(super().forward(x)) if self.gather_output else super().forward(x)
        y = self.product(x)
        return self.gathered(y) if self.gather_output else y

    def gathered(self, y: torch.Tensor) -> torch.Tensor:
        """The whole of what each rank has a part of."""
        return self._without_filling(all_gather(y, self.group))

    def _without_filling(self, y: torch.Tensor) -> torch.Tensor:
        return y[..., : self.out_features] if y.shape[-1] > self.out_features else y

    def shared(self, x: torch.Tensor) -> Any:
        """The form of x that `product` multiplies, if it must be made: layers of one kind and input can share it."""
        return None

    def product(self, x: torch.Tensor, shared: Any = None, any_order: bool = False) -> torch.Tensor:
        """`forward` without gradient and gathering. any_order: see `products.product`."""
        return product(x, self.weight, any_order)


def fuse(layers: Sequence[nn.Module], make: Make = torch.cat) -> Optional[torch.Tensor]:
    """Make the layers' weights parts of one matrix and return that matrix: one product reads it faster than several.

    None if a layer's weight is not plain; for quantized ones see `quantization.join_quantized`. make: see `join`.
    """
    if any(type(layer) is not ColumnParallelLinear for layer in layers):
        return None
    return join(layers, "weight", make)


def join(layers: Sequence[nn.Module], name: str, make: Make = torch.cat) -> torch.Tensor:
    """Make the layers' parameters of that name views of one tensor, one below the other, and return it.

    make: the parameters -> that tensor. With any but `torch.cat` their numbers change, or are still to come.
    """
    parts: list[torch.Tensor] = [layer.get_parameter(name) for layer in layers]
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor cannot be trained or edited later
        whole = make(parts)
        for layer, old, part in zip(layers, parts, whole.split([len(part) for part in parts])):
            if type(old) is nn.Parameter and torch._has_compatible_shallow_copy_type(old, part):
                old.data = part  # the same object: an optimizer may hold it
            else:
                setattr(layer, name, nn.Parameter(part, requires_grad=old.requires_grad))
    return whole


def products(
    x: torch.Tensor, fused: Any, layers: Sequence[ColumnParallelLinear], any_order: bool = False
) -> Sequence[torch.Tensor]:
    """Each layer's product with x, as layer(x) would be. any_order: see `products.product`.

    fused: the matrix (`fuse`) or quantized layer (`join_quantized`) that holds all layers, for one product in place of
    several; None if there is neither.
    """
    if torch.is_grad_enabled():  # a gradient goes to each layer's own weight
        return [layer(x) for layer in layers]
    if fused is None:
        shared = layers[0].shared(x)
        return [layer.product(x, shared, any_order) for layer in layers]
    y = product(x, fused, any_order) if isinstance(fused, torch.Tensor) else fused.product(x, any_order=any_order)
    return y.split([layer.output_size_per_partition for layer in layers], dim=-1)


def is_fused(whole: torch.Tensor, layers: Sequence[nn.Module], name: str = "weight") -> bool:
    """Whether the layers' parameters of that name are still the parts of `whole`, in this order."""
    tensors = [getattr(layer, name, None) for layer in layers]
    parts = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if len(parts) < len(layers):
        return False
    ends = [part.data_ptr() + part.nbytes for part in parts]
    return [*(part.data_ptr() for part in parts), whole.data_ptr() + whole.nbytes] == [whole.data_ptr(), *ends]


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """y = x Wᵀ, each rank holding some of W's columns: (..., in_features / ranks) -> (..., out_features) on every
    rank."""

    shard_dim = 1

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.input_is_parallel = True
        self.group = model_parallel_group()
        self.input_size_per_partition = split(in_features, "in_features", self.group)
        self.weight = _new_weight(out_features, self.input_size_per_partition)
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _needs_autograd(self.weight, x, self.group):
            return super().forward(x)
        return all_reduce(self.product(x), self.group)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's share of the sum that `forward` returns."""
        return product(x, self.weight, any_order=self.group is None)


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """Rows of a (num_embeddings, embedding_dim) table by id: (...) int64 -> (..., embedding_dim) on every rank.

    Llama 2 cuts the table along the embedding (dimension 1); Llama 3 along the vocabulary.
    """

    shard_dim = 1

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None
        self.max_norm = None
        self.norm_type = 2.0  # type: ignore[assignment]
        self.scale_grad_by_freq = False
        self.sparse = False
        self.group = model_parallel_group()
        self.embedding_dim_per_partition = split(embedding_dim, "embedding_dim", self.group)
        self.weight = _new_weight(num_embeddings, self.embedding_dim_per_partition)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if _needs_autograd(self.weight, self.weight, self.group):
            return super().forward(ids)
        return all_gather(F.embedding(ids, self.weight), self.group)
