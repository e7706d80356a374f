"""What int8 and int4 cost in perplexity on held-out stories: of the demo model, and of any other that tells stories.

    python benchmarks/quality.py --text tinystories-2MiB.txt [--ckpt_dir stories260K/] [--stories 100]

Each story is scored with `Llama.score`, from BOS on; every twentieth story of the text is held out, as for the demo model's
card. int4 is shown with plain rounding and with the rounding that `quantize` uses, for groups of 32 and 64.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from pathlib import Path
from typing import Optional

import fire

from llama import Llama
from llama.layers import int4, rounding
from llama.system.files import check_file
from llama.weights import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
from data import read_stories

# A name, the kind, the size of a group, the rounds of refinement.
FORMS = [
    ("int8", "int8", 64, 0),
    *(
        (f"int4, groups of {group}{', plain' if not rounds else ''}", "int4", group, rounds)
        for group in (64, 32)
        for rounds in (0, rounding.REFINEMENTS)
    ),
]


def perplexity(ckpt_dir: Optional[str], stories: list[str], **options: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        llama = Llama.build(ckpt_dir, max_seq_len=512, max_batch_size=8, device="cpu", **options)  # type: ignore[arg-type]
    scores = [logprob for score in llama.score(stories) for logprob in score["logprobs"][1:]]
    return math.exp(-sum(scores) / len(scores))


def main(text: str, ckpt_dir: Optional[str] = None, stories: int = 100) -> None:
    check_file(Path(text))
    held_out = read_stories(Path(text))[1][:stories]
    print(f"{len(held_out)} held-out stories, {ckpt_dir or 'the demo model'}")
    whole = perplexity(ckpt_dir, held_out)
    print(f"{'as stored':30s}{whole:9.4f}")
    to_int4 = int4.to_int4
    for name, kind, group, refinements in FORMS:
        form = rounding.Quantization(kind, group)
        checkpoint.Quantization = lambda kind, form=form: form  # type: ignore[assignment,misc]
        int4.to_int4 = lambda w, g, refinements=refinements: to_int4(w, g, refinements)  # type: ignore[assignment]
        value = perplexity(ckpt_dir, held_out, quantize=kind)
        print(f"{name:30s}{value:9.4f}  {100 * (value / whole - 1):+.2f} %", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
