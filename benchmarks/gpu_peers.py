"""This library beside transformers and Meta's way of computing, on one device with the same random weights, without a
file.

    python benchmarks/gpu_peers.py [--shape 7B] [--device cuda] [--compiled] [--new 128]

Decode for batches of 1 and 8 behind 100 tokens, prefill of 2048, in turn; and how near the logits are to those of
transformers.
--compiled: transformers with its static cache and torch.compile as well, which compiles for minutes. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import metas_way
import torch
import transformers
from checkpoints import SHAPES, VOCAB_SIZE
from gpu_kernels import Place
from gpu_parts import kind, random_model, tokenizer

from llama import Llama, ModelArgs, Transformer
from llama.commands import bench
from llama.weights.huggingface import to_hf_rows

ROWS, CONTEXT, LONG = (1, 8), 100, 2048


def as_transformers(model: Transformer, dtype: torch.dtype) -> Any:
    """The same weights in Hugging Face's class."""
    args, weight = model.params, model.norm.weight
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=args.dim, intermediate_size=args.ffn_width,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads or args.n_heads,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len, tie_word_embeddings=False, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        with weight.device:
            made = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    made.model.embed_tokens.weight.data = model.tok_embeddings.weight
    made.model.norm.weight.data, made.lm_head.weight.data = weight, model.output.weight
    for theirs, ours in zip(made.model.layers, model.layers):
        theirs.input_layernorm.weight.data = ours.attention_norm.weight
        theirs.post_attention_layernorm.weight.data = ours.ffn_norm.weight
        attention, feed_forward = ours.attention, ours.feed_forward
        theirs.self_attn.q_proj.weight.data = to_hf_rows(attention.wq.weight, attention.head_dim)
        theirs.self_attn.k_proj.weight.data = to_hf_rows(attention.wk.weight, attention.head_dim)
        theirs.self_attn.v_proj.weight.data, theirs.self_attn.o_proj.weight.data = (
            attention.wv.weight,
            attention.wo.weight,
        )
        theirs.mlp.gate_proj.weight.data, theirs.mlp.up_proj.weight.data = (
            feed_forward.w1.weight,
            feed_forward.w3.weight,
        )
        theirs.mlp.down_proj.weight.data = feed_forward.w2.weight
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--new", type=int, default=128)
    args = parser.parse_args()
    place = Place(torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device))
    sizes = {**SHAPES[args.shape], "vocab_size": VOCAB_SIZE, "max_seq_len": LONG + 64, "max_batch_size": max(ROWS)}
    model = random_model(place, ModelArgs(**sizes))  # type: ignore[arg-type]
    llama = Llama(model, tokenizer(), compile=None)
    theirs = as_transformers(model, torch.bfloat16)

    def synchronize() -> None:
        if place.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(work: Callable[[], Any]) -> float:
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - began

    def ours(prompts: list[list[int]], new: int) -> None:
        bench.timed_run(llama, prompts, new)

    def metas(prompts: list[list[int]], new: int) -> None:
        metas_way.generate_batch(model, prompts, new, eos=-1)

    def hugging(prompts: list[list[int]], new: int, **options: Any) -> None:
        ids = torch.tensor(prompts, device=place.device)
        mask = torch.ones_like(ids)
        theirs.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options
        )

    ways: dict[str, Callable[..., None]] = {"ours": ours, "transformers": hugging, "metas_way": metas}
    if args.compiled:
        ways["transformers, static cache, compiled"] = lambda prompts, new: hugging(
            prompts, new, cache_implementation="static"
        )
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "shape": args.shape}
    if place.device.type == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    for rows in ROWS:
        prompts = bench.make_prompts(rows, CONTEXT, VOCAB_SIZE)
        for way in ways.values():
            way(prompts, 8)
            way(prompts, args.new)
        for name, way in ways.items():
            # The prompt's time is taken out by the difference of two lengths.
            short, long = partial(way, prompts, 8), partial(way, prompts, args.new)
            pairs = [(timed(short), timed(long)) for _ in range(3)]
            step = statistics.median((after - before) / (args.new - 8) for before, after in pairs)
            result[f"{name}, B={rows}"] = {"ms": round(step * 1e3, 3), "tok_s": round(rows / step, 1)}
    result["ran"] = kind(llama)
    prompts = bench.make_prompts(1, LONG, VOCAB_SIZE)
    for name, way in list(ways.items())[:3]:
        way(prompts, 1)
        reads = partial(way, prompts, 1)
        result[f"{name}, prefill of {LONG}, ms"] = round(min(timed(reads) for _ in range(4)) * 1e3, 1)
    ids = torch.tensor(bench.make_prompts(2, 200, VOCAB_SIZE), device=place.device)
    expected = theirs(ids).logits.float()
    for name, logits in (("ours", model(ids, 0)), ("metas_way", metas_way.forward(model, ids, 0))):
        error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        result[f"{name} beside transformers, relative difference of logits"] = round(float(error.max()), 5)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
