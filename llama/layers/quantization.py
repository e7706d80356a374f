"""Puts quantized layers in the place of a model's parallel layers, and joins several into one.

The numbers do not depend on how many processes share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Optional

import torch
from torch import nn

from ..runtime import device_kind
from .int4 import Int4ColumnParallelLinear, Int4RowParallelLinear
from .int8 import Int8ColumnParallelLinear, Int8RowParallelLinear
from .one_digit import (
    W4A8ColumnParallelLinear,
    W4A8RowParallelLinear,
    W8A8ColumnParallelLinear,
    W8A8RowParallelLinear,
)
from .parallel import ColumnParallelLinear, Make, RowParallelLinear, group_size, join
from .quantized import Quantized
from .rounding import Quantization

# kind -> the layers that are cut along their rows, and along their columns
FORMS: dict[str, tuple[type[Quantized], type[Quantized]]] = {
    "int8": (Int8ColumnParallelLinear, Int8RowParallelLinear),
    "int4": (Int4ColumnParallelLinear, Int4RowParallelLinear),
    "w8a8": (W8A8ColumnParallelLinear, W8A8RowParallelLinear),
    "w4a8": (W4A8ColumnParallelLinear, W4A8RowParallelLinear),
}
QUANTIZED = tuple(form for forms in FORMS.values() for form in forms)


def join_quantized(layers: Sequence[nn.Module], make: Make = torch.cat) -> Optional[Quantized]:
    """One layer over the rows of several; their tensors become views of its own. make: see `parallel.join`.

    None if they are not quantized layers of one kind, or lie on a CPU, which multiplies with packed forms.
    """
    first = layers[0]
    if not isinstance(first, Quantized) or any(type(layer) is not type(first) for layer in layers):
        return None
    if device_kind(first.device) == "cpu" or first.shard_dim != 0:
        return None
    names = [name for name, tensor in first.named_parameters(recurse=False)]
    whole = copy(first)  # the copy shares its dictionaries with the first layer, so its parameters get a new one
    whole._parameters = {name: nn.Parameter(join(layers, name, make), requires_grad=False) for name in names}
    whole._parameters["bias"] = None
    return whole


def quantize_layers(model: nn.Module, quantization: Quantization) -> None:
    """Put the quantized form, still empty, in the place of every parallel linear layer of a model on the meta device.

    ValueError if the processes cannot share the rows in whole groups.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and not isinstance(layer, Quantized):
                by_rows = isinstance(layer, ColumnParallelLinear)
                if not by_rows:
                    quantization.check_parts(layer.in_features, group_size(layer.group))
                kind = quantization.kind_of(layer.in_features, getattr(layer, "gather_output", False))
                setattr(parent, name, FORMS[kind][0 if by_rows else 1](layer, quantization))
