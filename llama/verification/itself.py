"""This code against itself, on this machine, with these weights: each way to the same numbers beside one pass over a
text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..generation import Llama
from ..layers.quantized import Quantized
from ..model import process_counts
from ..runtime import device_kind
from ..system.printable import escaped
from .results import Result, failed, not_applicable, passed
from .texts import PROSE, STORIES

TOKENS = 48  # length of the text that is read both ways
NEW_TOKENS = 24
# The mean divergence (Kullback-Leibler, nats a token) that rounding explains.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}
QUANTIZED = {"int8": 0.02, "int4": 0.5}
# Two tokens that are no more nats apart may change places.
NEAR = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.05}
CHILD_SECONDS = 3600.0
BUG = (
    "The two are the same mathematics in other orders of sums. A larger difference is a fault of this library, of "
    "torch or of the machine: update torch, try --device cpu or --dtype float32, and report it with this table."
)
TOO_COARSE = (
    "Rounding costs this model more than usual: its weights have outliers, are small, or were rounded once before. Run "
    "it as it is stored, or in int8 instead of int4."
)


def sample(llama: Llama) -> list[int]:
    """The ids of the text that is read, BOS in front."""
    ids = [llama.tokenizer.encode(text[0], bos=True, eos=False)[:TOKENS] for text in (STORIES, PROSE)]
    return [*ids[0][: TOKENS // 2], *ids[1][1 : TOKENS // 2]]


@torch.inference_mode()
def one_pass(llama: Llama, ids: Sequence[int]) -> torch.Tensor:
    """log-probabilities of every next token: float32 (tokens, vocabulary), on the CPU."""
    return llama.model(torch.tensor([list(ids)]), 0)[0].float().log_softmax(-1).cpu()


@torch.inference_mode()
def _step_by_step(llama: Llama, ids: Sequence[int]) -> torch.Tensor:
    steps = [llama.model(torch.tensor([[token]]), i)[0] for i, token in enumerate(ids)]
    return torch.cat(steps).float().log_softmax(-1).cpu()


def _plainly(llama: Llama, ids: Sequence[int]) -> torch.Tensor:
    """Meta's way through the modules, which a hook switches on."""
    hook = llama.model.norm.register_forward_pre_hook(lambda *_: None)
    try:
        return one_pass(llama, ids)
    finally:
        hook.remove()


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence of rows of log-probabilities, nats."""
    found = torch.nn.functional.kl_div(q.double(), p.double(), reduction="batchmean", log_target=True).item()
    return max(0.0, found)  # rounding may take it below


def compare(name: str, what: str, p: torch.Tensor, q: torch.Tensor, bound: float, means: str = BUG) -> Result:
    found, most = divergence(p, q), (p.exp() - q.exp()).abs().max().item()
    told = f"{what}: {found:.1e} nats apart a token (bound {bound:g}), a probability by {most:.1e} at most"
    return passed(name, told) if found <= bound else failed(name, told, means)


def check_itself(llama: Llama) -> Iterator[Result]:
    """What one process can compare, with one loaded model."""
    dtype = llama.model.norm.weight.dtype
    ids, bound = sample(llama), ROUNDING[dtype]
    told = f"{len(ids)} tokens, {str(dtype).removeprefix('torch.')}"
    reference = one_pass(llama, ids)
    yield compare("step by step", f"{told}, one pass beside steps", reference, _step_by_step(llama, ids), bound)
    yield compare("plain modules", f"{told}, fast ways beside Meta's", reference, _plainly(llama, ids), bound)
    llama.forget()
    yield _generation(llama, ids[: TOKENS // 2])
    yield _compiled(llama, ids[: TOKENS // 2])


def _generation(llama: Llama, prompt: list[int]) -> Result:
    """What was generated, scored again in one pass over prompt and answer."""
    tokens, scores = _greedy(llama, prompt)
    if not tokens:
        return not_applicable("generation", "the model ends the text at once")
    dtype, logprobs = llama.model.norm.weight.dtype, one_pass(llama, [*prompt, *tokens])[len(prompt) - 1 : -1]
    again = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    apart = (again - torch.tensor(scores)).abs().max().item()
    behind = (logprobs.amax(-1) - again).max().item()
    told = (
        f"{len(tokens)} tokens scored again: log-probabilities {apart:.1e} apart, the best token {behind:.1e} ahead "
        f"at most"
    )
    right = max(apart, behind) <= NEAR[dtype]
    told += f" (bound {NEAR[dtype]:g})"
    return passed("generation", told) if right else failed("generation", told, BUG)


def _greedy(llama: Llama, prompt: list[int]) -> tuple[list[int], list[float]]:
    [tokens], scores = llama.generate([prompt], NEW_TOKENS, temperature=0, logprobs=True)
    assert scores is not None
    [logprobs] = scores
    return tokens, logprobs


def _compiled(llama: Llama, prompt: list[int]) -> Result:
    name = "compiled step"
    if llama._engine.graph is None:
        return not_applicable(name, "nothing was compiled for this model and machine; --compile does it, in minutes")
    plain = Llama(llama.model, llama.tokenizer, compile=False)
    (ours, scores), (others, plain_scores) = _greedy(llama, prompt), _greedy(plain, prompt)
    same = next((i for i, (a, b) in enumerate(zip(ours, others)) if a != b), min(len(ours), len(others)))
    # The token at which they part is compared too: there two tokens are equally good.
    pairs = list(zip(scores[: same + 1], plain_scores[: same + 1]))
    apart, near = max((abs(a - b) for a, b in pairs), default=0.0), NEAR[llama.model.norm.weight.dtype]
    told = f"{same} of {len(ours)} tokens alike, log-probabilities {apart:.1e} apart (bound {near:g})"
    return passed(name, told) if apart <= near else failed(name, told, BUG)


def check_quantized(build: Callable[..., Llama], kind: str, reference: torch.Tensor, ids: Sequence[int]) -> Result:
    """int8 or int4 beside the weights as they are stored."""
    try:
        llama = build(quantize=kind)
    except ValueError as error:
        return not_applicable(kind, str(error))
    return compare(
        kind, f"{len(ids)} tokens, rounded beside stored", reference, one_pass(llama, ids), QUANTIZED[kind], TOO_COARSE
    )


def is_quantized(llama: Llama) -> bool:
    return any(isinstance(module, Quantized) for module in llama.model.modules())


def startable(llama: Llama, most: int) -> list[int]:
    """The numbers of processes, above 1, that this machine can start for the model."""
    place = llama.model.norm.weight.device
    there = torch.cuda.device_count() if device_kind(place) == "cuda" else 1 if device_kind(place) != "cpu" else most
    return [n for n in process_counts(llama.model.params) if 1 < n <= min(there, most)]


def check_processes(count: int, given: dict[str, Any], reference: torch.Tensor, ids: Sequence[int]) -> Result:
    """The same pass on several processes, which torchrun starts. given: the arguments of `build`."""
    name = f"{count} processes"
    with TemporaryDirectory() as folder:
        out = Path(folder) / "logprobs.pt"
        job = json.dumps({"build": given, "ids": list(ids), "out": str(out)})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                   "-m", "llama.verification.child", job]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return failed(name, escaped(str(error)), BUG)
        if done.returncode or not out.exists():
            said = [line for line in done.stderr.splitlines() if "Error: " in line] or ["no word of why"]
            told = f"they ended with {done.returncode}: {escaped(said[0])}"
            return not_applicable(name, told) if "not enough memory" in said[0] else failed(name, told, BUG)
        theirs, dtype = torch.load(out)
    return compare(name, f"{len(ids)} tokens, shared beside alone", reference, theirs, ROUNDING[dtype])
