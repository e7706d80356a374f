"""One system in a process of its own, which holds its model and sleeps until it is told what to run next.

    python systems.py '{"system": "ours", …}'    # [prompts, new ids] on a line of stdin, an answer on one of stdout

Prompts are rows of ids, all of one length. The first answer is what loading took; imports are not counted in it, and
each system imports only what it needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any, Optional

from process_memory import megabytes

Rows = list[list[int]]
Run = tuple[float, Optional[float], list[int]]  # seconds to the first token, mean seconds of a step, ids of row 0


class Ours:
    """This library through `Llama.build`, in the mode that the spec says."""

    loads_by_itself = True

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        from llama import Llama
        from llama.commands import bench

        # On a CPU what is not compiled is the step in C++, as it comes; `False` would run it operator by operator.
        compile = bool(spec.get("compile")) or (None if spec["device"] == "cpu" else False)
        self.bench, options = bench, {"quantize": spec.get("quantize"), "compile": compile}
        self.began = time.perf_counter()
        sizes = spec["max_seq_len"], spec["max_batch_size"]
        self.llama = Llama.build(
            spec["path"], spec["tokenizer_path"], *sizes, device=spec["device"], dtype="bfloat16", **options
        )
        self.facts = {"weights_bytes": bench.weight_bytes(self.llama.model), "threads": torch.get_num_threads()}
        if spec["device"] != "cpu":
            self.facts["peak_device_MB"] = torch.cuda.max_memory_allocated() / 1e6

    def run(self, rows: Rows, new: int) -> Run:
        return self.bench.timed_run(self.llama, rows, new)


class MetasWay(Ours):
    """Meta's arithmetic on the weights that we loaded, eagerly."""

    loads_by_itself = False

    def run(self, rows: Rows, new: int) -> Run:
        import torch
        from metas_way import forward

        model, ids, moments = self.llama.model, [], []
        tokens, start = torch.tensor(rows, device=model.norm.weight.device), 0
        began = time.perf_counter()
        for _ in range(new):
            best = forward(model, tokens, start)[:, -1].argmax(-1)
            ids.append(best.tolist()[0])  # waits for the device
            moments.append(time.perf_counter())
            tokens, start = best[:, None], start + tokens.shape[1]
        return _timed(began, moments, ids)


class Transformers:
    """`generate` of Hugging Face's transformers, greedy, as it comes otherwise."""

    loads_by_itself = True

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        import transformers
        from transformers import LlamaForCausalLM

        transformers.logging.disable_progress_bar()
        self.torch, self.transformers = torch, transformers
        self.began = time.perf_counter()
        self.model = LlamaForCausalLM.from_pretrained(spec["path"], dtype=torch.bfloat16).to(spec["device"]).eval()
        self.model.generation_config.eos_token_id = None  # random weights may draw it
        embedding = self.model.model.embed_tokens.weight
        weights = sum(p.nbytes for p in self.model.parameters() if p is not embedding)
        self.facts = {"weights_bytes": weights, "threads": torch.get_num_threads()}

    def run(self, rows: Rows, new: int) -> Run:
        torch, moments = self.torch, []

        class Clock(self.transformers.StoppingCriteria):  # type: ignore[name-defined]
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                ids.append(input_ids[0, -1].item())  # waits for the device
                moments.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids: list[int] = []
        tokens = torch.tensor(rows, device=self.model.device)
        clock = self.transformers.StoppingCriteriaList([Clock()])
        began = time.perf_counter()
        self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False, pad_token_id=0,
            stopping_criteria=clock,
        )  # fmt: skip
        return _timed(began, moments, ids)


class LlamaCpp:
    """llama.cpp through its own C functions, which can run several sequences at once. One context for each batch
    size."""

    loads_by_itself = True

    def __init__(self, spec: dict[str, Any]) -> None:
        import llama_cpp
        import numpy

        self.cpp, self.numpy, self.spec = llama_cpp, numpy, spec
        if spec["device"] != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise RuntimeError("this build of llama.cpp has no GPU support")
        llama_cpp.llama_backend_init()
        self.began = time.perf_counter()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = spec["extra_buffers"]
        params.n_gpu_layers = 0 if spec["device"] == "cpu" else 999
        self.model = llama_cpp.llama_model_load_from_file(spec["path"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {spec['path']}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}
        self._context(1)
        self.facts = {"weights_bytes": spec["weights_bytes"], "threads": spec["threads"]}

    def _context(self, batch: int) -> Any:
        if batch not in self.contexts:
            params = self.cpp.llama_context_default_params()
            each = self.spec["max_seq_len"] if batch == 1 else min(256, self.spec["max_seq_len"])
            params.n_ctx, params.n_seq_max = batch * each, batch
            params.n_batch = max(params.n_batch, each)
            params.n_threads = params.n_threads_batch = self.spec["threads"]
            self.contexts[batch] = self.cpp.llama_init_from_model(self.model, params)
            if not self.contexts[batch]:
                raise RuntimeError(f"llama.cpp cannot make a context for {batch} sequences")
        return self.contexts[batch]

    def run(self, rows: Rows, new: int) -> Run:
        context = self._context(len(rows))
        self.cpp.llama_memory_clear(self.cpp.llama_get_memory(context), False)
        batch = self.cpp.llama_batch_init(len(rows) * len(rows[0]), 0, 1)
        ids, moments, start = [], [], 0
        try:
            began = time.perf_counter()
            for _ in range(new):
                newest = self._decode(context, batch, rows, start)
                ids.append(newest[0])
                moments.append(time.perf_counter())
                start += len(rows[0])
                rows = [[token] for token in newest]
        finally:
            self.cpp.llama_batch_free(batch)
        return _timed(began, moments, ids)

    def _decode(self, context: Any, batch: Any, rows: list[list[int]], start: int) -> list[int]:
        """Run the rows' tokens from position `start`. -> the best id after each row"""
        at, last = 0, []
        for row, tokens in enumerate(rows):
            for i, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, start + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = i == len(tokens) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if code := self.cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode answered {code}")
        as_array = self.numpy.ctypeslib.as_array
        logits = (as_array(self.cpp.llama_get_logits_ith(context, i), (self.vocab_size,)) for i in last)
        return [int(row.argmax()) for row in logits]


class Limits:
    """What the machine can do at best: read its memory, and multiply matrices of the model's shapes."""

    loads_by_itself = False

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        from llama.commands import bench

        self.bench, self.device = bench, torch.device(spec["device"])
        self.dtype, self.nbytes, self.shapes = (
            torch.bfloat16,
            spec["read_bytes"],
            [tuple(shape) for shape in spec["shapes"]],
        )
        self.began = time.perf_counter()
        self.facts = {"weights_bytes": 0, "threads": torch.get_num_threads()}

    def run(self, rows: Rows, new: int) -> Run:
        """In place of seconds: bytes a second and operations a second."""
        return (
            self.bench.read_rate(self.device, self.nbytes),
            self.bench.matmul_rate(self.device, self.dtype, self.shapes),
            [],
        )


SYSTEMS = {"ours": Ours, "meta": MetasWay, "transformers": Transformers, "llama.cpp": LlamaCpp, "limits": Limits}


def _timed(began: float, moments: list[float], ids: list[int]) -> Run:
    steps = len(moments) - 1
    return moments[0] - began, (moments[-1] - moments[0]) / steps if steps else None, ids


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # for answers alone: what libraries print goes where errors go
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    spec = json.loads(sys.argv[1])
    try:
        system = SYSTEMS[spec["system"]](spec)
        seconds = time.perf_counter() - system.began
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    took = {"load_s": seconds, "peak_MB": megabytes("VmHWM"), "private_MB": megabytes("RssAnon")}
    answer({**(took if system.loads_by_itself else dict.fromkeys(took)), **system.facts})
    for line in sys.stdin:
        try:
            first, step, ids = system.run(*json.loads(line))
            answer({"first": first, "step": step, "ids": ids})
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
