"""lm-evaluation-harness (`pip install 'lm_eval[api,hf]'`) on tasks of local files.

python tests/harness.py --processes 1                    through the server: each number must be that of `Llama.score`
python tests/harness.py --processes 2 --model llama      each answer must be that of the harness' own model "hf"
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

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


# A few words that a model writes, up to a stop string or not; and texts of several windows.
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [".", "and then"], max_gen_toks: 30, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: Path) -> None:
    """The tasks, and their data."""
    rng = random.Random(1)
    rows: dict[str, list[dict[str, Any]]] = {"choice": [], "rolling": [], "generate": [], "long": []}
    for _ in range(20):
        first, *others = rng.sample(WORDS, 4)
        question = f"Once upon a time there was a {first}. The {first} saw a"
        rows["choice"].append({"question": question, "choices": others, "label": 0})
        rows["rolling"].append({"text": f"{question} {others[0]}. They played in the park, and were happy."})
    stories = [row["text"] for row in rows["rolling"]]
    for i, row in enumerate(rows["choice"][:]):
        before = " ".join(stories[: i % 4]) + " " * (i % 4 > 0)  # contexts of up to three stories
        # Choices of several ids, one that begins without a space, and for some no context at all.
        choices = [*row["choices"], f"{row['choices'][0]} that sang.", "and then", '\n"Hello"']
        rows["choice"].append({"question": before + row["question"] if i else "", "choices": choices, "label": i % 6})
        rows["generate"].append({**row, "question": before + row["question"]})
    for i in range(4):
        rows["long"].append({"text": " ".join(rng.sample(stories, len(stories)) * (i + 1))})
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE), ("long", ROLLING)):
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


def by_server(folder: Path, processes: int) -> dict[str, Any]:
    """The harness' numbers through our server beside `Llama.score`'s."""
    from serve_load import server

    cli.run(["convert", str(DEMO), f"{folder}/hf", "--to=hf"])
    told: dict[str, dict[str, Any]] = {"samples": {}, "results": {}}
    with server(processes, 8, "--device=cpu", "--dtype=float32") as (_, url):
        # BOS in front, as `score` has it: transformers' tokenizer puts it there; of a rolling task it is the prefix.
        transformers = {"tokenizer": f"{folder}/hf", "add_bos_token": True}
        remote = {"tokenizer_backend": "remote", "custom_prefix_token_id": 1}
        for task, begin in (("local_choice", transformers), ("local_rolling", remote)):
            how = {"model": "demo", "base_url": f"{url}/v1/completions", "num_concurrent": 4}
            one = run(folder, [task], model="local-completions", model_args={**how, **begin})
            told = {part: {**told[part], **one[part]} for part in told}
    llama = Llama.build(device="cpu", dtype="float32", max_batch_size=8)
    worst = {task: max(difference(llama, sample) for sample in samples) for task, samples in told["samples"].items()}
    count = {task: len(samples) for task, samples in told["samples"].items()}
    results = {
        task: {k: v for k, v in values.items() if isinstance(v, float)} for task, values in told["results"].items()
    }
    return {"samples": count, "largest_difference": worst, "results": results}


def run(folder: Path, tasks: list[str], **how: Any) -> Any:
    """The harness' results in this process."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0, **how)


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] | "
    "trim + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
WAYS = {  # what is asked, as options of our command, of `simple_evaluate`, and of "hf"
    "plain": ([], {}, {}),
    "examples": (["--num_fewshot=2"], {"num_fewshot": 2}, {}),
    "chat": (["--num_fewshot=1", "--apply_chat_template"], {"num_fewshot": 1, "apply_chat_template": True}, {}),
    "short": (["--max_seq_len=48"], {}, {"max_length": 48}),
}


def beside_hf(folder: Path, source: Path, processes: int) -> dict[str, Any]:
    """The answers of `llama eval` beside those of the harness' "hf" with the same weights."""
    cli.run(["convert", str(source), f"{folder}/hf", "--to=hf"])
    config = folder / "hf/tokenizer_config.json"
    told = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({**told, "chat_template": TEMPLATE}))
    launcher = [
        sys.executable,
        *(["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []),
    ]
    report: dict[str, Any] = {}
    for way, (options, how, of_hf) in WAYS.items():
        tasks = ["local_choice", "local_rolling", "local_generate", "local_long"]
        if way != "plain":
            tasks = tasks[:1] + tasks[2:3] if way != "short" else [tasks[0], tasks[3]]
        command = [
            *launcher,
            "-m",
            "llama",
            "eval",
            f"{folder}/hf",
            f"--tasks={','.join(tasks)}",
            f"--include_path={folder}",
        ]
        command += [
            f"--out={folder}/out.json",
            "--samples",
            "--dtype=float32",
            "--device=cpu",
            "--bootstrap_iters=0",
            *options,
        ]
        subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        ours = json.loads((folder / "out.json").read_text())["samples"]
        model = {"pretrained": f"{folder}/hf", "dtype": "float32", "device": "cpu", **of_hf}
        theirs = run(folder, tasks, model="hf", model_args=model, **how)["samples"]
        report[way] = {task: compared(ours[task], theirs[task]) for task in tasks}
    return report


def compared(ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """How many answers there are, and how far they are apart: numbers at most, and how many others differ."""
    pairs = [
        (answer, json.loads(json.dumps(other)))
        for one, two in zip(ours, theirs, strict=True)
        for (answer,), (other,) in zip(one["resps"], two["resps"], strict=True)
    ]
    told: dict[str, Any] = {"answers": len(pairs)}
    if isinstance(pairs[0][0], str) and not pairs[0][0].lstrip("-").replace(".", "", 1).isdigit():
        return {**told, "texts that differ": sum(answer != other for answer, other in pairs)}
    numbers = [[float(x[0] if isinstance(x, list) else x) for x in pair] for pair in pairs]
    told["largest difference"] = max(abs(a - b) for a, b in numbers)
    told["relative"] = max(abs(a - b) / abs(b) for a, b in numbers)
    if isinstance(pairs[0][0], list):
        told["is_greedy differs"] = sum(str(a[1]) != str(b[1]) for a, b in pairs)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--model", choices=["server", "llama"], default="server")
    parser.add_argument("--source", type=Path, default=DEMO, help="the checkpoint, for --model llama")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_tasks(Path(name))
        if options.model == "server":
            told = by_server(Path(name), options.processes)
        else:
            told = beside_hf(Path(name), options.source, options.processes)
    print(json.dumps({"processes": options.processes, "model": options.model, **told}, indent=1))


if __name__ == "__main__":
    main()
