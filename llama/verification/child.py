"""One of the processes that `itself.check_processes` starts: loads the model, reads the ids, and writes what it
found."""

from __future__ import annotations

import json
import sys

import torch

from .. import runtime
from ..generation import Llama
from ..system.launch import Launch
from .itself import one_pass


def main() -> None:
    job = json.loads(sys.argv[1])
    llama = Llama.build(**job["build"])
    logprobs = one_pass(llama, job["ids"])
    if Launch.read().rank == 0:
        torch.save((logprobs, llama.model.norm.weight.dtype), job["out"])
    runtime.shutdown()


if __name__ == "__main__":
    main()
