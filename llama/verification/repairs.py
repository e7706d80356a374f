"""Faults that leave every shape right and every number finite, each as the change of a loaded model that would mend it.

No weight is copied: a `Repair` exchanges modules, turns the order of what q and k give by hooks, or puts another number
or table in its place; leaving the `ExitStack` undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from ..model import ModelArgs, RMSNorm, Transformer, check_args, precompute_freqs_cis
from ..rotary import RotaryScaling, scaled_freqs_cis

ORDER_QK, THETA, EPS, LAYERS, PARTS, HEADS = (
    "order of q and k", "rope_theta", "norm_eps", "order of layers", "parts of a layer", "number of heads",
)  # fmt: skip
OTHERS_SETTINGS = "params.json or config.json belongs to another model{}. Take that file from the model's own source."
MEANS = {
    ORDER_QK: "A converter between Meta's and Hugging Face's formats has put the rows of q and k in order once too "
    "often, or not at all. Convert the original once more: llama convert does it right both ways.",
    THETA: OTHERS_SETTINGS.format(" (Llama 2 has 10000, Code Llama 1000000), or a converter left rope_scaling out"),
    EPS: OTHERS_SETTINGS.format(" (Llama 2 and Code Llama have 1e-05, LLaMA 1 has 1e-06)"),
    HEADS: OTHERS_SETTINGS.format(" (n_heads and n_kv_heads)"),
    LAYERS: "What converted, cut or merged the weights has numbered the layers wrongly. Convert the original again.",
    PARTS: "What converted or merged the weights has given them each other's names. Convert the original again.",
}
THETAS = (1e4, 1e6, 5e5, 1e5)
EPSILONS = (1e-5, 1e-6)  # all that Llama's releases have
FACTORS = (2.0, 4.0, 8.0)  # linear scaling by these; it is the one that changes every position
ALL_PAIRS = 8  # up to this number of layers all pairs are tried; of more, neighbours and what the norms suggest

Change = Callable[[Transformer, ExitStack], None]
Reorder = Callable[[torch.Tensor, int], torch.Tensor]


class Repair(NamedTuple):
    """A change that would mend a fault. check: the fault's row in the table. fault: what is wrong if the change makes
    texts likelier. first: the first layer whose numbers change."""

    check: str
    fault: str
    first: int
    change: Change


def repairs(model: Transformer) -> Iterator[Repair]:
    """All that are tried, those of the whole model first."""
    yield from _orders_of_qk(model)
    yield from _positions(model.params)
    yield from _epsilons(model.params)
    yield from _heads(model.params)
    yield from _exchanged_parts(model)
    yield from _orders_of_layers(model)


def put(stack: ExitStack, target: Any, **values: Any) -> None:
    """Give an object other attributes until the stack is left."""
    for name, value in values.items():
        stack.callback(setattr, target, name, getattr(target, name))
        setattr(target, name, value)


def to_meta_order(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Features of heads (…, H * D), from Hugging Face's order (all even ones of a head, then all odd ones) to Meta's
    pairs."""
    return x.unflatten(-1, (-1, 2, head_dim // 2)).transpose(-1, -2).flatten(-3)


def to_hf_order(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`to_meta_order` backwards."""
    return x.unflatten(-1, (-1, head_dim // 2, 2)).transpose(-1, -2).flatten(-3)


def _orders_of_qk(model: Transformer) -> Iterator[Repair]:
    n, both = model.n_layers, ("wq", "wk")
    ways = ((to_meta_order, "are in Hugging Face's order of rows (a converter left them so)"),
            (to_hf_order, "were put in Meta's order of rows twice"))  # fmt: skip
    for reorder, what in ways:
        for names in (both, *((name,) for name in both)):
            told = f"{' and '.join(name[1] for name in names)} {what}"
            told = told if len(names) > 1 else told.replace("are in", "is in").replace("were", "was")
            yield Repair(ORDER_QK, f"{told}, in all layers", 0, partial(_reorder, range(n), names, reorder))
    args = model.params
    if (
        args.kv_heads != args.n_heads
        and (size := args.kv_heads * args.head_size // args.n_heads) >= 2
        and size % 2 == 0
    ):
        told = (
            f"k was put in order with the {args.n_heads} query heads in place of its own {args.kv_heads}, in all layers"
        )

        def by_queries(x: torch.Tensor, head_dim: int) -> torch.Tensor:
            return to_meta_order(to_hf_order(x, size), head_dim)

        yield Repair(ORDER_QK, told, 0, partial(_reorder, range(n), ("wk",), by_queries))
    for i in range(n) if n > 1 else ():
        for reorder, what in ways:
            yield Repair(ORDER_QK, f"q and k {what}, in layer {i}", i, partial(_reorder, (i,), both, reorder))


def _reorder(
    layers: Sequence[int], names: Sequence[str], reorder: Reorder, model: Transformer, stack: ExitStack
) -> None:
    for i in layers:
        attention = model.layers[i].attention
        for name in names:
            hook = getattr(attention, name).register_forward_hook(lambda _, __, x: reorder(x, model.params.head_size))
            stack.callback(hook.remove)


def _positions(args: ModelArgs) -> Iterator[Repair]:
    def turn(table: Callable[[int, int], torch.Tensor], model: Transformer, stack: ExitStack) -> None:
        place = model.freqs_cis
        put(stack, model, freqs_cis=table(args.head_size, len(place)).to(place.device))

    if args.rope_scaling is not None:
        rule = f"{args.rope_scaling.kind}, factor {args.rope_scaling.factor:g}"
        told = f"positions are scaled ({rule}), and the model's are not"
        yield Repair(THETA, told, 0, partial(turn, lambda dim, end: precompute_freqs_cis(dim, end, args.rope_theta)))
        return
    for theta in THETAS:
        if theta != args.rope_theta:
            table = partial(precompute_freqs_cis, theta=theta)
            yield Repair(
                THETA, f"rope_theta is {args.rope_theta:g}, and the model's is {theta:g}", 0, partial(turn, table)
            )
    for factor in FACTORS:
        scaling = RotaryScaling("linear", factor, 4096)

        def scaled(dim: int, end: int, scaling: RotaryScaling = scaling) -> torch.Tensor:
            return scaled_freqs_cis(dim, 0, end, args.rope_theta, scaling)

        told = f"positions are not scaled, and the model's are (rope_scaling: linear, factor {factor:g})"
        yield Repair(THETA, told, 0, partial(turn, scaled))


def _epsilons(args: ModelArgs) -> Iterator[Repair]:
    def give(eps: float, model: Transformer, stack: ExitStack) -> None:
        for module in model.modules():
            if isinstance(module, RMSNorm):
                put(stack, module, eps=eps)

    for eps in EPSILONS:
        if eps != args.norm_eps:
            yield Repair(EPS, f"norm_eps is {args.norm_eps:g}, and the model's is {eps:g}", 0, partial(give, eps))


def _heads(args: ModelArgs) -> Iterator[Repair]:
    """Twice or half as many heads, of half or twice the size, which fit the same matrices."""
    for times in (0.5, 2.0):
        heads, kv_heads, size = args.n_heads * times, args.kv_heads * times, args.head_size / times
        if not all(number.is_integer() for number in (heads, kv_heads, size)):
            continue
        changed = ModelArgs(**{**vars(args), "n_heads": int(heads), "n_kv_heads": int(kv_heads), "head_dim": int(size)})
        try:
            check_args(changed, 1)
        except ValueError:
            continue
        told = f"n_heads is {args.n_heads}, and the model's is {heads:g}"
        yield Repair(HEADS, told, 0, partial(_share_out, changed))


def _share_out(args: ModelArgs, model: Transformer, stack: ExitStack) -> None:
    for attention in model.attentions():
        K, D = args.kv_heads, args.head_size
        caches = {
            name: cache.new_zeros(*cache.shape[:2], K, D)
            for name in ("cache_k", "cache_v")
            for cache in [getattr(attention, name)]
        }
        put(stack, attention, head_dim=D, n_kv_heads=K, n_local_heads=args.n_heads, n_local_kv_heads=K, **caches)
    table = precompute_freqs_cis(args.head_size, len(model.freqs_cis), args.rope_theta)
    put(stack, model, freqs_cis=table.to(model.freqs_cis.device))


def _exchanged_parts(model: Transformer) -> Iterator[Repair]:
    pairs = [("feed_forward", "w1", "w3"), ("attention", "wk", "wv"), ("", "attention_norm", "ffn_norm")]
    if model.params.kv_heads == model.params.n_heads:
        pairs.append(("attention", "wq", "wk"))
    n = model.n_layers
    for home, a, b in pairs:
        yield Repair(PARTS, f"{a} and {b} are exchanged in all layers", 0, partial(_exchange, range(n), home, a, b))
    for home, a, b in pairs if n > 1 else ():
        for i in range(n):
            yield Repair(PARTS, f"{a} and {b} are exchanged in layer {i}", i, partial(_exchange, (i,), home, a, b))


def _exchange(layers: Sequence[int], home: str, a: str, b: str, model: Transformer, stack: ExitStack) -> None:
    for i in layers:
        parent = getattr(model.layers[i], home) if home else model.layers[i]
        put(stack, parent, **{a: getattr(parent, b), b: getattr(parent, a)})


def _orders_of_layers(model: Transformer) -> Iterator[Repair]:
    n = model.n_layers
    natural = list(range(n))
    by_text = sorted(natural, key=str)
    back = sorted(natural, key=by_text.__getitem__)
    whole = [(natural[::-1], "the layers are in the reverse order")]
    if by_text != natural:
        whole += [
            (order, "the layers are sorted as texts are (0, 1, 10, 11, …, 2, 20, …)") for order in (by_text, back)
        ]
    if n > 2:
        whole += [([*natural[1:], 0], "layer 0 is the last one, and the others begin with 1"),
                  ([n - 1, *natural[:-1]], "the last layer comes first")]  # fmt: skip
    for order, told in whole if n > 2 else ():
        yield Repair(LAYERS, told, 0, partial(_arrange, order))
    for i, j in _pairs(model):
        order = natural.copy()
        order[i], order[j] = j, i
        yield Repair(LAYERS, f"layers {i} and {j} are exchanged", i, partial(_arrange, order))


def _arrange(order: Sequence[int], model: Transformer, stack: ExitStack) -> None:
    before = list(model.layers)

    def place(layers: Sequence[Any]) -> None:
        for i, layer in enumerate(layers):
            model.layers[i] = layer

    stack.callback(place, before)
    place([before[i] for i in order])


def _pairs(model: Transformer) -> list[tuple[int, int]]:
    """The layers that may have been exchanged: all pairs of few layers; of many, neighbours, and those pairs whose
    exchange makes the means of the norms, which change little from layer to layer, smoother: the 2 n best."""
    n = model.n_layers
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    if n <= ALL_PAIRS:
        return pairs
    layers: list[Any] = list(model.layers)
    norms = [[layer.attention_norm.weight.detach(), layer.ffn_norm.weight.detach()] for layer in layers]
    means = torch.tensor([[float(weight.float().mean()) for weight in pair] for pair in norms])
    means = means / means.diff(dim=0).abs().mean(0).clamp(min=1e-9)

    def roughness(i: int, j: int) -> float:
        order = list(range(n))
        order[i], order[j] = j, i
        return means[order].diff(dim=0).abs().sum().item()

    now, near = roughness(0, 0), [(i, j) for i, j in pairs if j == i + 1]
    far = sorted((rough, pair) for pair in pairs if pair not in near and (rough := roughness(*pair)) < now)
    return near + [pair for _, pair in far[: 2 * n]]
