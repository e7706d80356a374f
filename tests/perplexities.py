"""Each method of `llama perplexity` beside its own tool, on the same weights in float32: the harness' model "hf" with
its own task's functions, a plain loop over transformers, llama.cpp. (`pip install 'lm_eval[hf]' llama-cpp-python`)

    python tests/perplexities.py TEXT --source CHECKPOINT [--same_ids]

--same_ids: the tools get the ids of our tokenizer, for a vocabulary that theirs read otherwise than SentencePiece does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(ROOT))

import lm_eval  # noqa: E402
import torch  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from llama import Llama  # noqa: E402
from llama.commands import cli  # noqa: E402
from llama.loading import DEMO  # noqa: E402
from llama.perplexity import perplexity  # noqa: E402

WINDOW = 128
Encode = Optional[Callable[[str], list[int]]]
TASK = """
task: own_wikitext
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function preprocess_wikitext.wikitext_detokenizer
process_results: !function preprocess_wikitext.process_results
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


def like_wikitext(text: str) -> str:
    """Stories as articles with titles, and with spaces where WikiText has them."""
    stories = [story.strip() for story in re.split(r"\n\s*\n|<\|endoftext\|>", text) if story.strip()]
    articles = [
        f" = Story {i} = \n \n = = The story = = \n "
        + re.sub(r"([.,!?:;\"'()])", r" \1 ", story).replace("-", " @-@ ")
        + " \n"
        for i, story in enumerate(stories)
    ]
    return " \n" + " \n".join(articles)


def by_the_harness(text: str, folder: Path, length: int, encode: Encode) -> dict[str, float]:
    """The harness' figures of its task "wikitext", whose documents the code of its data set makes."""
    pages, page = [], []
    for line in text.split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            pages.append("\n".join(page))
            page = []
        page.append(line)
    pages = [one for one in pages if one.strip()] + ["\n".join(page)]
    (folder / "pages.jsonl").write_text("".join(json.dumps({"page": one}) + "\n" for one in pages))
    own = Path(lm_eval.__file__).parent / "tasks/wikitext/preprocess_wikitext.py"
    (folder / own.name).write_text(own.read_text())
    (folder / "task.yaml").write_text(TASK.format(file=folder / "pages.jsonl"))
    model = {
        "pretrained": f"{folder}/hf",
        "dtype": "float32",
        "device": "cpu",
        "max_length": length,
        "add_bos_token": False,
    }
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    hf = HFLM(**model)
    if encode is not None:
        hf.tok_encode = lambda text, **_: encode(text)
    told = lm_eval.simple_evaluate(hf, tasks=["own_wikitext"], task_manager=manager, bootstrap_iters=0)
    return {name.partition(",")[0]: value for name, value in told["results"]["own_wikitext"].items() if "," in name}


@torch.no_grad()
def by_a_loop(text: str, folder: Path, length: int, encode: Encode) -> float:
    """The loop of GPTQ's and AWQ's code."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    (folder / "text").write_text(text)
    rows = [row if row.strip() else "" for row in (folder / "text").open(encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/hf")
    model = LlamaForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32)
    rest = encode("\n\n".join(rows)) if encode else tokenizer("\n\n".join(rows), add_special_tokens=False).input_ids
    ids = torch.tensor([[tokenizer.bos_token_id, *rest]])
    losses = []
    for i in range(ids.numel() // length):
        window = ids[:, i * length : (i + 1) * length]
        logits = model(window).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:])
        losses.append(loss.double() * length)
    return math.exp(sum(losses) / (len(losses) * length))


def by_llama_cpp(text: str, folder: Path, length: int, encode: Encode) -> tuple[float, float]:
    """llama-perplexity's chunks, through llama.cpp: the perplexity, and its error."""
    import numpy as np
    from llama_cpp import Llama as Cpp

    # type 0 is float32, for the cache.
    model = Cpp(f"{folder}/f32.gguf", n_ctx=length, n_batch=length, logits_all=True, verbose=False, type_k=0, type_v=0)
    text = text.removesuffix("\n")
    ids = [model.token_bos(), *encode(text)] if encode else model.tokenize(text.encode(), add_bos=True, special=False)
    losses: list[float] = []
    first = length // 2
    for i in range(len(ids) // length):
        chunk = [model.token_bos(), *ids[i * length + 1 : (i + 1) * length]]
        model.reset()
        model.eval(chunk)
        logits = torch.tensor(np.array(model.scores[: len(chunk)]))
        scores = logits.log_softmax(-1)
        losses += [-float(scores[at, chunk[at + 1]]) for at in range(first, length - 1)]
    x = torch.tensor(losses, dtype=torch.float64)
    error = ((x**2).mean() - x.mean() ** 2).div(len(x) - 1).sqrt()
    return math.exp(x.mean()), float(error) * math.exp(x.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--source", type=Path, default=DEMO)
    parser.add_argument("--same_ids", action="store_true")
    options = parser.parse_args()
    text = like_wikitext(options.text.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cli.run(["convert", str(options.source), f"{folder}/hf", "--to=hf", "--dtype=float32"])
        cli.run(["convert", str(options.source), f"{folder}/f32.gguf", "--to=gguf", "--dtype=float32"])
        llama = Llama.build(str(options.source), None, WINDOW, 4, device="cpu", dtype="float32")
        encode = (lambda text: llama.tokenizer.encode(text, bos=False, eos=False)) if options.same_ids else None
        told: dict[str, Any] = {"characters": len(text), "source": options.source.name, "same ids": options.same_ids}
        ours: Any = perplexity(llama, text, "lm-eval")
        theirs = by_the_harness(text, folder, WINDOW, encode)
        figures = ("word_perplexity", "byte_perplexity", "bits_per_byte")
        told["lm-eval"] = {"documents": ours["documents"], **{name: (ours[name], theirs[name]) for name in figures}}
        ours = perplexity(llama, text, f"joined-{WINDOW}")
        told[f"joined-{WINDOW}"] = ours["perplexity"], by_a_loop(text, folder, WINDOW, encode)
        ours = perplexity(llama, text, f"llama.cpp-{WINDOW}")
        of_cpp = by_llama_cpp(text, folder, WINDOW, encode)
        told[f"llama.cpp-{WINDOW}"] = (ours["perplexity"], ours["standard_error"]), of_cpp
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
