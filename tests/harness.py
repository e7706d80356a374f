"""lm-evaluation-harness (`pip install 'lm_eval[api]'`) through the server, on tasks of local files: each number of its must be
that of `Llama.score`.

    python tests/harness.py --processes 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from serve_load import server  # noqa: E402

from llama import Llama  # noqa: E402
from llama.commands import cli  # noqa: E402
from llama.loading import DEMO  # noqa: E402

WORDS = ["dog", "cat", "girl", "boy", "ball", "tree"]
DATA = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


def write_tasks(folder: Path) -> None:
    """Two tasks, and their data."""
    rng = random.Random(1)
    rows: dict[str, list[dict[str, Any]]] = {"choice": [], "rolling": []}
    for _ in range(20):
        first, *others = rng.sample(WORDS, 4)
        question = f"Once upon a time there was a {first}. The {first} saw a"
        rows["choice"].append({"question": question, "choices": others, "label": 0})
        rows["rolling"].append({"text": f"{question} {others[0]}. They played in the park, and were happy."})
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(DATA.format(name=name, file=file) + text)


def difference(llama: Llama, sample: dict[str, Any]) -> float:
    """The largest between the harness' numbers of a sample and `Llama.score`'s."""
    worst = 0.0
    for (context, *rest), response in zip(sample["arguments"], sample["resps"]):
        told = response[0][0] if isinstance(response[0], (list, tuple)) else response[0]
        whole = context + (rest[0] if rest else "")
        before = len(llama.score([context])[0]["logprobs"]) if rest else 1
        worst = max(worst, abs(told - sum(llama.score([whole])[0]["logprobs"][before:])))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, server(options.processes, 8, "--device=cpu", "--dtype=float32") as (_, url):
        write_tasks(Path(name))
        cli.run(["convert", str(DEMO), f"{name}/hf", "--to=hf"])
        told: dict[str, dict[str, Any]] = {"samples": {}, "results": {}}
        # BOS in front, as `score` has it: transformers' tokenizer puts it there; of a rolling task it is the prefix.
        transformers = {"tokenizer": f"{name}/hf", "add_bos_token": True}
        remote = {"tokenizer_backend": "remote", "custom_prefix_token_id": 1}
        for task, begin in (("local_choice", transformers), ("local_rolling", remote)):
            how = {"model": "demo", "base_url": f"{url}/v1/completions", "num_concurrent": 4}
            tasks = TaskManager(include_path=name, include_defaults=False)
            model = {"model": "local-completions", "model_args": {**how, **begin}}
            one = lm_eval.simple_evaluate(tasks=[task], task_manager=tasks, log_samples=True, bootstrap_iters=0, **model)
            told = {part: {**told[part], **one[part]} for part in told}
    llama = Llama.build(device="cpu", dtype="float32", max_batch_size=8)
    worst = {task: max(difference(llama, sample) for sample in samples) for task, samples in told["samples"].items()}
    count = {task: len(samples) for task, samples in told["samples"].items()}
    results = {task: {k: v for k, v in values.items() if isinstance(v, float)} for task, values in told["results"].items()}
    print(json.dumps({"processes": options.processes, "samples": count, "largest_difference": worst, "results": results}))


if __name__ == "__main__":
    main()
