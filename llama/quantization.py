"""Weight-only int8 and int4 forms of the parallel layers: what is stored, and the products.

The numbers do not depend on how many processes share them. Plain ATen, because torchao's CPU forms are slower: its int8
reads 1 to 10 billion weights a second where these read 25 on two cores, and its int4 has no form for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple, Optional, cast

import torch
import torch.nn.functional as F
from torch import nn

from . import kernels, proven
from .parallel import ColumnParallelLinear, Make, RowParallelLinear, group_size, join
from .rounding import Quantization, dequantized, pairs, row_maxima, to_int4, to_int8, unpair
from .runtime import device_kind

PIECE = 2**17  # numbers that one core works on at a time, so that they stay in its cache
# Of activations. With more, the packed int4 product (170 GFLOP/s on two cores) loses to dequantised blocks, and reading int8
# weights once for all digits no longer pays.
FEW_ROWS = 64
DEQUANTIZED = 2**21  # int4 numbers at a time: fewer cost more in calls than they save in a cache
BASE = 254  # of the digits that activations are written in: each is half a step wrong at most, which the next one counts in
BLOCK_ROWS = 2048  # of activations that the int8 product takes at a time: what it makes of them is twice their size
PLAIN = 2**21  # numbers: smaller int8 matrices are multiplied as they are, larger ones packed
# On a GPU: up to this many rows are multiplied with the stored weights, for more a plain matrix is made of them first.
STORED_ROWS = 64


def blocks(weight: torch.Tensor, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """A weight in float32 on a device, a few rows at a time."""
    numbers = PIECE * torch.get_num_threads() if device_kind(device) == "cpu" else 2**24
    step = max(1, numbers // weight.shape[1])
    for i in range(0, len(weight), step):
        yield slice(i, i + step), weight[i : i + step].to(device, torch.float32)


# Layers


class Quantized(nn.Module):
    """What the four classes share. `weight` and its companions are as they are stored until `pack` gives them the form
    that the device multiplies fastest with; the state dict has them as they are stored in either case."""

    kind: str
    quantization: Quantization
    in_features: int  # of the full matrix
    out_features: int
    shard_dim: int
    shard_dims: dict[str, Optional[int]]  # how each tensor is cut; as `shard_dim` says of the weight before
    packed = False

    def __init__(self, layer: nn.Module, quantization: Quantization) -> None:
        nn.Module.__init__(self)
        vars(self).update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        self.quantization = quantization
        self.register_parameter("bias", None)
        rows, columns = cast(torch.Tensor, layer.weight).shape
        for name, tensor in self.empty(rows, columns, cast(torch.Tensor, layer.weight).device).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def quantize(self, weight: torch.Tensor, maxima: Optional[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Some of the layer's weights, as they are stored, on a device. maxima: of the full rows, if `weight` has parts."""
        made = self.empty(len(weight), weight.shape[1], device)
        for rows, block in blocks(weight, device):
            self.round(block, row_maxima(block) if maxima is None else maxima[rows], {n: t[rows] for n, t in made.items()})
        return made

    def round(self, block: torch.Tensor, maxima: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """Round rows of the layer, float32, into the same rows of its tensors. maxima: of the full rows."""
        raise NotImplementedError

    def plain(self) -> dict[str, torch.Tensor]:
        """The tensors as they are stored."""
        raise NotImplementedError

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """For the device that the tensors are on, and activations in `dtype`. Returns the tensors as they were before."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return self.kind

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor.detach() for name, tensor in self.plain().items()})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Follows the model to a device and stays the numbers that it is; packed again there for the dtype it is given."""
        probe = fn(torch.empty(0, dtype=torch.bfloat16, device=self.device))
        if not self.packed:
            from_gpu = device_kind(self.device) == "cuda"
            super()._apply(lambda t: t.to(probe.device), recurse)
            if from_gpu and device_kind(probe) == "cpu":
                self.pack(probe.dtype)
            return self
        plain = {name: tensor.to(probe.device) for name, tensor in self.plain().items()}
        for name in list(self._parameters):
            self._parameters[name] = None
        self._parameters.update({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in plain.items()})
        self.pack(probe.dtype)
        return self

    @property
    def device(self) -> torch.device:
        return cast(torch.Tensor, self.weight).device


def _refuse_gradients(x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("no gradients through quantised weights; build without quantize, or use torch.no_grad()")


class Digits(NamedTuple):
    """Rows x (M, columns), each number as the digits of a whole number to the base of 254, the highest first."""

    numbers: torch.Tensor  # int8 (2 or 3, M, columns)
    unit: torch.Tensor  # float32 (M, 1): what 1 stands for


def in_digits(x: torch.Tensor) -> Digits:
    """oneDNN multiplies int8 with int8 only. So each row of x becomes whole numbers of 15 bits (of float32, of 23)."""
    count = 3 if x.dtype == torch.float32 else 2
    numbers = x.new_empty((count, *x.shape), dtype=torch.int8)
    unit = x.new_empty(len(x), 1, dtype=torch.float32)
    step = max(1, 2 * PIECE // x.shape[-1])
    for i in range(0, len(x), step):
        some = slice(i, i + step)
        rest = x[some].float()
        largest = rest.abs().amax(-1, keepdim=True).clamp_min_(1e-30)  # infinity and NaN go on from here into the result
        torch.mul(largest, 1 / (127 * BASE ** (count - 1)), out=unit[some])
        rest = rest * (127 / largest)
        numbers[0, some] = rounded = rest.round()
        for digit in numbers[1:, some]:
            digit.copy_(rounded := rest.sub_(rounded).mul_(BASE).round())
    return Digits(numbers, unit)


class Int8(Quantized):
    kind = "int8"
    weight: nn.Parameter  # int8 (rows, columns)
    scales: nn.Parameter  # float32 (rows,)

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.empty(rows, columns, dtype=torch.int8, device=device),
            "scales": torch.empty(rows, dtype=torch.float32, device=device),
        }

    def round(self, block: torch.Tensor, maxima: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        for name, numbers in zip(("weight", "scales"), to_int8(block, maxima)):
            into[name].copy_(numbers)

    def plain(self) -> dict[str, torch.Tensor]:
        weight = self.weight.detach()
        return {"weight": weight.to_dense().t().contiguous() if weight.is_mkldnn else weight, "scales": self.scales}

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        before = self.weight.detach()
        self.packed = device_kind(before) == "cpu" and onednn_is_exact()
        if self.packed and before.numel() > PLAIN:
            self.weight = nn.Parameter(torch.ops.onednn.qlinear_prepack(before, None), requires_grad=False)
            return [before]
        return []

    def shared(self, x: torch.Tensor) -> Optional[Digits]:
        rows = x.reshape(-1, x.shape[-1])
        return in_digits(rows) if self.packed and len(rows) <= BLOCK_ROWS else None

    def product(self, x: torch.Tensor, shared: Optional[Digits] = None, any_order: bool = False) -> torch.Tensor:
        _refuse_gradients(x)
        rows = x.reshape(-1, x.shape[-1])
        if not self.packed:
            y = self._generic(rows)
        elif len(rows) <= BLOCK_ROWS:
            y = self._of_digits(shared or in_digits(rows), x.dtype)
        else:
            y = torch.cat([self._of_digits(in_digits(some), x.dtype) for some in rows.split(BLOCK_ROWS)])
        return y.view(*x.shape[:-1], -1)

    def _of_digits(self, digits: Digits, dtype: torch.dtype) -> torch.Tensor:
        product = int8_product_op if torch.compiler.is_compiling() else int8_product
        return product(digits.numbers, self.weight, self.scales).mul_(digits.unit).to(dtype)

    def _generic(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if device_kind(weight) == "cpu" and len(x) <= FEW_ROWS and hasattr(torch, "_weight_int8pack_mm"):
            ones = torch.ones(len(weight), dtype=x.dtype)
            y = torch._weight_int8pack_mm(x.contiguous(), weight, ones)
        elif device_kind(weight) == "cpu":  # never all of it in the wider dtype
            step = max(1, 2**22 // weight.shape[1])
            y = torch.cat([F.linear(x, part.to(x.dtype)) for part in weight.split(step)], dim=-1)
        else:
            product = proven.product_int8 if len(x) <= STORED_ROWS else kernels.product_int8
            return product(x.contiguous(), weight, self.scales)
        return (y * self.scales).to(x.dtype)


def int8_product(digits: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Digits int8 (count, M, columns) of rows x, weight int8 (rows, columns) or prepacked, scales float32 (rows,)
    -> x (weight * scales)ᵀ: float32 (M, rows)"""
    count, M, columns = digits.shape
    if not weight.is_mkldnn:
        flat = digits.view(-1, columns)
        whole = torch._int_mm(weight, flat.t()).t().contiguous() if M <= FEW_ROWS else torch._int_mm(flat, weight.t())
        y, *lower = (whole * scales).view(count, M, -1).unbind()
    elif M <= FEW_ROWS:  # all digits at once, so that the weights are read once
        y, *lower = _qlinear(digits, weight, scales).unbind()
    else:  # each added to those before by the product itself
        y = _qlinear(digits[0], weight, scales, BASE ** (count - 1))
        for i in range(1, count):
            y = _qlinear(digits[i], weight, scales, BASE ** (count - 1 - i), y)
        return y
    for digit in lower:
        y = torch.add(digit, y, alpha=BASE)
    return y


def _qlinear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, unit: float = 1.0, plus: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """int8 (..., columns), prepacked int8 (columns, rows), float32 (rows,) -> float32 (..., rows), added to `plus`."""
    zeros = _no_zero_points(len(scales))
    if plus is None:
        return torch.ops.onednn.qlinear_pointwise(
            x, unit, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    return torch.ops.onednn.qlinear_pointwise.binary(
        x, unit, 0, packed, scales, zeros, plus, None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
    )


# The same for the compiler, which does not know the layout of the packed weights. Costs some microseconds a call.
int8_product_op = torch.library.custom_op("llama::int8_product", int8_product, mutates_args=())


@int8_product_op.register_fake
def _(digits: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return scales.new_empty(digits.shape[1], len(scales))


@lru_cache
def _no_zero_points(rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.int32)


@lru_cache
def onednn_is_exact() -> bool:
    """Whether this CPU multiplies int8 in oneDNN fast and without saturating: older ones add pairs in 16 bits."""
    if not torch.backends.mkldnn.is_available() or not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    try:
        weight = torch.full((64, 256), 127, dtype=torch.int8)
        weight[1::2] = -127
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        scales = torch.ones(64)
        for rows in (1, 2, FEW_ROWS + 1):
            digits = torch.full((2, rows, 256), -128, dtype=torch.int8)
            digits[0] = 1
            digits[1, :, ::2] = 127 * (torch.arange(rows)[:, None] % 2)
            expected = (BASE * digits[0].float() + digits[1].float()) @ weight.float().t()  # all below 2^24
            if not all(torch.equal(int8_product(digits, form, scales), expected) for form in (weight, packed)):
                return False
        return torch.equal(packed.to_dense().t(), weight)
    except (AttributeError, RuntimeError):
        return False


class Int4(Quantized):
    kind = "int4"
    weight: nn.Parameter  # uint8 (rows, columns / 2), or packed
    scales: Optional[nn.Parameter]  # bfloat16 (rows, columns / group); packed, both are in
    zeros: Optional[nn.Parameter]
    scales_and_zeros: nn.Parameter  # bfloat16 (columns / group, rows, 2)
    group_columns: int

    @property
    def columns(self) -> int:
        if self.packed:
            return len(self.scales_and_zeros) * self.group_columns
        return 2 * self.weight.shape[1]

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, torch.Tensor]:
        group = self.quantization.group(self.in_features)
        assert group is not None
        self.group_columns = group
        shape = rows, columns // group
        return {
            "weight": torch.empty(rows, columns // 2, dtype=torch.uint8, device=device),
            "scales": torch.empty(shape, dtype=torch.bfloat16, device=device),
            "zeros": torch.empty(shape, dtype=torch.bfloat16, device=device),
        }

    def round(self, block: torch.Tensor, maxima: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        numbers, scales, zeros = to_int4(block, self.group_columns)
        for name, made in (("weight", pairs(numbers)), ("scales", scales), ("zeros", zeros)):
            into[name].copy_(made)

    def plain(self) -> dict[str, torch.Tensor]:
        if not self.packed:
            assert self.scales is not None
            assert self.zeros is not None
            return {"weight": self.weight, "scales": self.scales, "zeros": self.zeros}
        scales, zeros = self.scales_and_zeros.permute(2, 1, 0).contiguous()
        # Multiplied by ones in the diagonal the product shows the numbers, whatever the layout is.
        ones = torch.zeros_like(self.scales_and_zeros)
        ones[..., 0] = 1
        unit = torch.eye(self.columns, dtype=torch.bfloat16, device=self.device)
        shown = [self._few(some, ones).t() for some in unit.split(64)]
        return {"weight": pairs(torch.cat(shown, 1).add_(8).to(torch.uint8)), "scales": scales, "zeros": zeros}

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        assert self.scales is not None
        assert self.zeros is not None
        before = [self.weight.detach(), self.scales.detach(), self.zeros.detach()]
        packed = None if dtype == torch.float32 else self._packed_weight()
        self.packed = packed is not None
        if packed is not None:
            both = torch.stack((self.scales.detach().t(), self.zeros.detach().t()), dim=-1).contiguous()
            self.scales = self.zeros = None
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.scales_and_zeros = nn.Parameter(both, requires_grad=False)
            return before
        return []

    def _packed_weight(self) -> Optional[torch.Tensor]:
        """For torch's own products on a CPU, of bfloat16 with groups of 32 and more. None if there is none."""
        weight, device = self.weight.detach(), self.device
        rows = len(weight)
        if self.group_columns < 32:
            return None
        if device_kind(device) == "cpu" and hasattr(torch, "_weight_int4pack_mm_for_cpu") and rows % 64 == 0:
            return torch._convert_weight_to_int4pack_for_cpu(unpair(weight).int(), 1)
        return None

    def product(self, x: torch.Tensor, shared: Any = None, any_order: bool = False) -> torch.Tensor:
        _refuse_gradients(x)
        rows = x.reshape(-1, x.shape[-1])
        if not self.packed:
            y = self._generic(rows)
        elif len(rows) <= FEW_ROWS or packed_layout() is None:
            y = self._few(rows.bfloat16(), self.scales_and_zeros).to(x.dtype)
        else:
            y = self._many(rows.bfloat16()).to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def _few(self, x: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.weight, self.group_columns, scales_and_zeros)

    def _generic(self, x: torch.Tensor) -> torch.Tensor:
        """In x's own dtype, dequantised a few rows at a time."""
        assert self.scales is not None
        assert self.zeros is not None
        if device_kind(x) == "cuda":
            if len(x) <= STORED_ROWS:
                return proven.product_int4(x.contiguous(), self.weight, self.scales, self.zeros)
            return F.linear(x, proven.dequantize_int4(self.weight, self.scales, self.zeros, x.dtype))
        step = max(1, 2**22 // self.columns) if device_kind(x) == "cpu" else len(self.weight)
        parts = zip(self.weight.split(step), self.scales.split(step), self.zeros.split(step))
        return torch.cat([F.linear(x, dequantized(*part, x.dtype)) for part in parts], dim=-1)

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantised from the packed form in pieces that fit a cache: (n - 8) * scale, and the zeros as rows of their
        own, which multiply the sums of x over each group. (M, columns) -> (M, rows)"""
        layout = packed_layout()
        assert layout is not None
        height, halves = layout
        group, groups = self.group_columns, self.columns // self.group_columns
        x = torch.cat((x, x.unflatten(1, (groups, group)).sum(-1)), dim=1)
        packed = self.weight.view(-1, groups, group, height // 2)  # two rows of a block of `height` in each byte
        scales, zeros = self.scales_and_zeros.detach().unbind(-1)
        scales = scales.unflatten(1, (-1, height)).transpose(0, 1).contiguous()[:, :, None]  # (blocks, groups, 1, height)
        blocks = min(max(1, 2048 // height), len(packed))
        piece = max(1, DEQUANTIZED // (blocks * height * group))
        y = x.new_empty(len(x), len(packed) * height)
        whole = x.new_empty(x.shape[1], blocks * height)
        for i in range(0, len(packed), blocks):
            some = slice(i, i + blocks)
            columns = slice(i * height, (i + blocks) * height)
            weight = whole[:, : y[:, columns].shape[1]]
            weight[self.columns :] = zeros[:, columns]
            target = weight[: self.columns].view(groups, group, -1, height).permute(2, 0, 1, 3)
            for j in range(0, groups, piece):
                part = slice(j, j + piece)
                numbers = packed[some, part]
                for rows, half in zip(halves, (numbers & 15, numbers >> 4)):
                    centred = half.view(torch.int8).sub_(8).to(x.dtype)
                    torch.mul(centred, scales[some, part, :, rows], out=target[:, part, :, rows])
            y[:, columns] = x @ weight
        return y


@lru_cache
def packed_layout() -> Optional[tuple[int, tuple[slice, slice]]]:
    """How torch packs int4 on this CPU, found out by packing known numbers: the rows of a block, and which of them are the
    lower and the upper halves of the bytes that a column of the block is. None where it is something else."""
    rows, columns = 256, 32
    number = torch.arange(rows)[:, None].expand(rows, columns)
    digits = [torch._convert_weight_to_int4pack_for_cpu(d.int().contiguous(), 1) for d in (number % 16, number // 16)]
    for height in (64, 32, 16):
        first, second = (d.view(rows // height, columns, -1) for d in digits)
        found = [(first & 15).int() + 16 * (second & 15), (first >> 4).int() + 16 * (second >> 4)]
        halves = []
        for half in found:
            order = half[0, 0].tolist()
            rows_of_half = slice(order[0], order[-1] + 1, max(1, order[1] - order[0]))
            expected = half[0, 0] + height * torch.arange(rows // height)[:, None, None]
            if order == list(range(height))[rows_of_half] and torch.equal(half, expected.expand_as(half).int()):
                halves.append(rows_of_half)
        if len(halves) == 2:
            columns_too = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
            packed = torch._convert_weight_to_int4pack_for_cpu(columns_too, 1).view(rows // height, columns, -1)
            back = torch.empty(rows // height, columns, height, dtype=torch.int32)
            back[:, :, halves[0]], back[:, :, halves[1]] = packed & 15, packed >> 4
            return (height, (halves[0], halves[1])) if torch.equal(back.transpose(1, 2).flatten(0, 1), columns_too) else None
    return None


class Int8ColumnParallelLinear(Int8, ColumnParallelLinear):
    shard_dims = {"weight": 0, "scales": 0}  # noqa: RUF012


class Int8RowParallelLinear(Int8, RowParallelLinear):
    shard_dims = {"weight": 1, "scales": None}  # noqa: RUF012  # of the full row


class Int4ColumnParallelLinear(Int4, ColumnParallelLinear):
    shard_dims = {"weight": 0, "scales": 0, "zeros": 0}  # noqa: RUF012


class Int4RowParallelLinear(Int4, RowParallelLinear):
    shard_dims = {"weight": 1, "scales": 1, "zeros": 1}  # noqa: RUF012


QUANTIZED = (Int8ColumnParallelLinear, Int8RowParallelLinear, Int4ColumnParallelLinear, Int4RowParallelLinear)


def join_quantized(layers: Sequence[nn.Module], make: Make = torch.cat) -> Optional[Quantized]:
    """One layer over the rows of several, whose tensors become views of its own; see `parallel.join`.

    None if they are not quantised layers of one kind, or lie on a CPU, which multiplies with packed forms.
    """
    first = layers[0]
    if not isinstance(first, Quantized) or any(type(layer) is not type(first) for layer in layers):
        return None
    if device_kind(first.device) == "cpu" or first.shard_dim != 0:
        return None
    names = [name for name, tensor in first.named_parameters(recurse=False)]
    whole = copy(first)  # which shares its dictionaries with the first layer, so the parameters get one of their own
    whole._parameters = {name: nn.Parameter(join(layers, name, make), requires_grad=False) for name in names}
    whole._parameters["bias"] = None
    return whole


def quantize_layers(model: nn.Module, quantization: Quantization) -> None:
    """Put the quantised form, still empty, in the place of every parallel linear layer of a model on the meta device. The
    output matrix is int8 in either case.

    ValueError where the processes cannot share the rows in whole groups.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and not isinstance(layer, Quantized):
                is_int8 = quantization.group(layer.in_features) is None
                if isinstance(layer, ColumnParallelLinear):
                    is_int8 |= layer.gather_output  # the output matrix, a small part of all, costs the most quality
                    form: type[Quantized] = Int8ColumnParallelLinear if is_int8 else Int4ColumnParallelLinear
                else:
                    quantization.check_parts(layer.in_features, group_size(layer.group))
                    form = Int8RowParallelLinear if is_int8 else Int4RowParallelLinear
                setattr(parent, name, form(layer, quantization))
