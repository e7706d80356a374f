"""The base of quantized layers: how weights become their tensors, and how these follow the model to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional, cast

import torch
from torch import nn

from ..runtime import device_kind
from . import own_kernels
from .rounding import Quantization

PIECE = 2**17  # numbers that one core works on at a time, so that they stay in its cache
WIDENED = 2**22  # numbers of a matrix that a CPU has in memory at a time in a wider dtype
# Most rows of activations that a GPU multiplies with the stored weights; for more it dequantizes the matrix first.
STORED_ROWS = 64


def blocks(weight: torch.Tensor, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """A weight (rows, columns) in float32 on a device: which rows, and those rows, some at a time."""
    numbers = PIECE * torch.get_num_threads() if device_kind(device) == "cpu" else 2**24
    step = max(1, numbers // weight.shape[1])
    for i in range(0, len(weight), step):
        yield slice(i, i + step), weight[i : i + step].to(device, torch.float32)


class Quantized(nn.Module):
    """The base of all quantized layers. `weight` and its companions have the stored form until `pack` gives them the
    form that the device multiplies fastest; the state dict always has the stored form.

    rows, columns: those of the part of the matrix that this rank holds.
    """

    kind: str
    quantization: Quantization
    in_features: int  # columns of the full matrix
    out_features: int  # its rows
    shard_dim: int
    shard_dims: dict[str, Optional[int]]  # how each tensor is cut; see `parallel`
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
        """The tensors of the stored form, by name, without numbers yet."""
        raise NotImplementedError

    def quantize(
        self, weight: torch.Tensor, maxima: Optional[torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The stored form, on a device, of `weight` (rows, columns). maxima: as in `round`; None if `weight` has full
        rows."""
        if device_kind(device) == device_kind(weight) == "cpu" and own_kernels.loaded():
            known = own_kernels.in_known_type(weight)
            known = known if known.stride(1) == 1 else known.contiguous()
            return dict(zip(self.shard_dims, self.rounded(known, maxima)))
        made = self.empty(len(weight), weight.shape[1], device)
        for rows, block in blocks(weight, device):
            into = {name: tensor[rows] for name, tensor in made.items()}
            self.round(block, None if maxima is None else maxima[rows], into)
        return made

    def rounded(self, weight: torch.Tensor, maxima: Optional[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The tensors of the stored form, of `weight` (rows, columns) on a CPU, from an operator of `own_kernels`: in a
        tenth of the time. maxima: as in `round`."""
        raise NotImplementedError

    def round(self, block: torch.Tensor, maxima: Optional[torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        """Round rows of the layer, float32, into the same rows of its tensors. maxima: float32 (rows,), of the full
        rows; None if these are full."""
        raise NotImplementedError

    def plain(self) -> dict[str, torch.Tensor]:
        """The tensors in their stored form, by name."""
        raise NotImplementedError

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Pack for this device and activations in `dtype`. Returns the stored tensors that were replaced."""
        raise NotImplementedError

    def for_step(self) -> Optional[tuple[torch.Tensor, int, Optional[torch.Tensor]]]:
        """What `cpu_step.h` multiplies with: the weight, the columns of a group, and the scales if they lie apart.
        None: the weight does not lie as that file knows it."""
        return None

    def extra_repr(self) -> str:
        """The part of `repr` that torch asks for."""
        return self.kind

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor.detach() for name, tensor in self.plain().items()})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`.to()` moves the stored integers unchanged, and packs them again for the new device and dtype."""
        probe = fn(torch.empty(0, dtype=torch.bfloat16, device=self.device))
        if not self.packed:
            from_gpu = device_kind(self.device) == "cuda"
            super()._apply(lambda t: t.to(probe.device), recurse)  # type: ignore[no-untyped-call]
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
    def numbers(self) -> int:
        """Weights of the part of the matrix that this rank holds."""
        rows = getattr(self, "output_size_per_partition", self.out_features)
        return int(rows * getattr(self, "input_size_per_partition", self.in_features))

    @property
    def device(self) -> torch.device:
        """The device that the tensors lie on."""
        return cast(torch.Tensor, self.weight).device


def refuse_gradients(x: torch.Tensor) -> None:
    """ValueError if a gradient would go through a quantized layer with input x."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("no gradients through quantized weights; build without quantize, or use torch.no_grad()")
