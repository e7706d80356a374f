"""What int8 and int4 layers share: how weights become their tensors, and how these follow the model to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional, cast

import torch
from torch import nn

from ..runtime import device_kind
from .rounding import Quantization, row_maxima

PIECE = 2**17  # numbers that one core works on at a time, so that they stay in its cache
# On a GPU: up to this many rows are multiplied with the stored weights, for more a plain matrix is made of them first.
STORED_ROWS = 64


def blocks(weight: torch.Tensor, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """A weight in float32 on a device, a few rows at a time."""
    numbers = PIECE * torch.get_num_threads() if device_kind(device) == "cpu" else 2**24
    step = max(1, numbers // weight.shape[1])
    for i in range(0, len(weight), step):
        yield slice(i, i + step), weight[i : i + step].to(device, torch.float32)


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


def refuse_gradients(x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("no gradients through quantised weights; build without quantize, or use torch.no_grad()")
