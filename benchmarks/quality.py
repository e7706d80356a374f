"""What quantizing costs in perplexity on held-out stories: of the demo model, and of any other that tells stories.

    python benchmarks/quality.py --text tinystories-2MiB.txt [--ckpt_dir stories260K/] [--stories 100]

Each story is scored with `Llama.score` in float32, from BOS on; every twentieth story of the text is held out, as for
the demo model's card. The matrices get the numbers that `quantize=` gives them. int4 is shown with plain rounding and
with the rounding that `quantize` uses, for groups of 32 and 64. In w8a8 and w4a8 activations are rounded too, so these
are built.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Optional

import fire
import torch

from llama import Llama
from llama.layers.rounding import REFINEMENTS, Quantization, dequantized, pairs, row_maxima, to_int4, to_int8
from llama.system.files import check_file
from llama.system.program import as_a_program

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
from data import read_stories

INT8 = Quantization("int8")
FORMS = [  # a name, the numbers, the rounds of refinement
    ("int8", INT8, 0),
    *(
        (f"int4, groups of {group}{'' if refinements else ', plain'}", Quantization("int4", group), refinements)
        for group in (64, 32)
        for refinements in (0, REFINEMENTS)
    ),
]


def rounded(weight: torch.Tensor, quantization: Quantization, refinements: int) -> torch.Tensor:
    """float32 (rows, columns) -> the same matrix as its stored numbers say it."""
    group = quantization.group(weight.shape[1])
    if group is None:
        numbers, scales = to_int8(weight, row_maxima(weight))
        return numbers * scales[:, None]
    numbers, *scales_and_zeros = to_int4(weight, group, refinements)
    return dequantized(pairs(numbers), *scales_and_zeros, torch.float32)


def perplexity(llama: Llama, stories: list[str]) -> float:
    scores = [logprob for score in llama.score(stories) for logprob in score["logprobs"][1:]]
    return math.exp(-sum(scores) / len(scores))


def build(ckpt_dir: Optional[str], kind: Optional[str] = None) -> Llama:
    return Llama.build(ckpt_dir, max_seq_len=512, max_batch_size=8, device="cpu", dtype="float32", quantize=kind)


def main(text: str, ckpt_dir: Optional[str] = None, stories: int = 100) -> None:
    check_file(Path(text))
    held_out = read_stories(Path(text))[1][:stories]
    llama = build(ckpt_dir)
    print(f"{len(held_out)} held-out stories, {ckpt_dir or 'the demo model'}")
    whole = perplexity(llama, held_out)
    print(f"{'as stored':30s}{whole:9.4f}")
    stored = {name: weight.clone() for name, weight in llama.model.state_dict().items()}
    matrices = [name for name, weight in stored.items() if weight.ndim == 2 and name != "tok_embeddings.weight"]
    for name, quantization, refinements in FORMS:
        forms = {matrix: INT8 if matrix == "output.weight" else quantization for matrix in matrices}
        changed = {matrix: rounded(stored[matrix], form, refinements) for matrix, form in forms.items()}
        llama.model.load_state_dict(stored | changed)
        value = perplexity(llama, held_out)
        print(f"{name:30s}{value:9.4f}  {100 * (value / whole - 1):+.2f} %", flush=True)
    for kind in ("w8a8", "w4a8"):
        value = perplexity(build(ckpt_dir, kind), held_out)
        print(f"{kind:30s}{value:9.4f}  {100 * (value / whole - 1):+.2f} %", flush=True)


if __name__ == "__main__":
    with as_a_program(main):  # a misspelt flag is refused before hours of work
        fire.Fire(main)
