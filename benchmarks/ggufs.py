"""llama.cpp's file format: any checkpoint that the library reads as GGUF, and GGUF quantized by llama.cpp.

python ggufs.py SOURCE TARGET Q8_0 THREADS    quantizes in a process of its own, which may crash
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from llama import Transformer
from llama.weights.checkpoint import check_weights, cut, open_checkpoint

TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
OF_BLOCK = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
QUANTIZED = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def gguf_name(name: str) -> str:
    """layers.3.attention.wq.weight -> blk.3.attn_q.weight"""
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, block, part = stem.split(".", 2)
    return f"blk.{block}.{OF_BLOCK[part]}.weight"


def write_gguf(source: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """The checkpoint as GGUF in this dtype, without a tokenizer, tensor by tensor.

    Rows of q and k stand in Meta's interleaved order, which is that of GGUF's llama architecture too; norms are
    float32, as llama.cpp wants them.
    """
    import gguf
    import numpy

    checkpoint = open_checkpoint(source)
    rows = checkpoint.shape("tok_embeddings.weight", 1)[0]
    args = replace(checkpoint.args, vocab_size=rows, max_seq_len=1, max_batch_size=1)
    with torch.device("meta"):
        model = Transformer(args)
    check_weights(model, checkpoint)
    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    part = target.with_name(target.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_width)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_key_length(args.head_size)
    writer.add_value_length(args.head_size)
    writer.add_rope_dimension_count(args.head_size)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("none")
    tensors = []
    for name, (shape, dim, _) in cut(model).items():
        form = torch.float32 if len(shape) == 1 else dtype
        tensors.append((name, dim, 0 if dim is None else shape[dim], form))
        count = torch.Size(shape).numel()
        raw = (*shape[:-1], shape[-1] * form.itemsize)  # as bytes, which is how numpy holds a bfloat16
        writer.add_tensor_info(gguf_name(name), raw, numpy.dtype("uint8"), count * form.itemsize, raw_dtype=types[form])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, dim, stop, form in tensors:
        weight = checkpoint.read(name, dim, 0, stop)
        writer.write_tensor_data(weight.to(form).contiguous().view(torch.uint8).numpy())
        checkpoint.mapped.release(weight)
    writer.close()
    part.rename(target)


def quantize(source: Path, target: Path, form: str, threads: int) -> None:
    """`source` with all matrices in Q8_0 or Q4_0. RuntimeError where llama.cpp does not manage it."""
    part = target.with_name(target.name + ".part")
    command = [sys.executable, __file__, str(source), str(part), form, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(
            f"llama.cpp did not quantize {source} to {form}: exit status {done.returncode} {''.join(said)}"
        )
    part.rename(target)


def _quantize(source: str, target: str, form: str, threads: str) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, QUANTIZED[form])
    params.nthread = int(threads)
    params.pure = True  # otherwise some matrices are kept in a larger form
    return llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))


def step_bytes(path: Path) -> int:
    """Bytes of weights that a decode step reads: all but the embedding."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if tensor.name != "token_embd.weight")


if __name__ == "__main__":
    sys.exit(_quantize(*sys.argv[1:]))
