"""Known models, and whether a folder gives their published numbers. `published.json` has the numbers and their
sources."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from ..generation import Llama
from ..model import ModelArgs
from ..perplexity import perplexity
from ..system.files import listed
from ..system.printable import shortened
from ..weights.checkpoint import Checkpoint
from . import repairs
from .itself import NEAR, is_quantized, one_pass
from .results import Result, failed, not_applicable, passed

KNOWN = "known model"
# The tolerances are those of float16; other dtypes have them times this.
COARSER = {torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 4.0}
PERPLEXITY_WITHIN = 0.01  # as a share
OTHER_NUMBERS = (
    "The weights or the settings are not those of the model: damaged, converted or merged wrongly, or a fine-tune that "
    "has kept its name or its norms. Compare the checksums with those of the source."
)


class Known(NamedTuple):
    """What a folder was recognised as. entries: the models of `published.json` that it may be; one of them if `how`
    says by what it was recognised."""

    entries: list[dict[str, Any]]
    how: str = ""

    @property
    def entry(self) -> Optional[dict[str, Any]]:
        return self.entries[0] if self.how else None

    @property
    def names(self) -> str:
        return listed([entry["name"] for entry in self.entries], 5)

    @property
    def window(self) -> int:
        """Tokens that the methods of its published perplexities read at once."""
        return 4096 if any("perplexity" in entry for entry in self.entries) else 2048

    def stated(self, what: str) -> Optional[float]:
        """A setting, if all models that the folder may be agree on it."""
        values = {entry[what] for entry in self.entries}
        return values.pop() if len(values) == 1 else None


@cache
def published() -> list[dict[str, Any]]:
    """The models of `published.json`."""
    text = Path(__file__).with_name("published.json").read_text(encoding="utf-8")
    return json.loads(text)["models"]


def digest(checkpoint: Checkpoint, name: str) -> str:
    """A short digest of a norm, rounded to bfloat16: the same for a folder and what was converted from it."""
    numbers = checkpoint.read(name, None, 0, 1).to(torch.bfloat16).contiguous()
    return hashlib.sha256(numbers.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def recognise(checkpoint: Checkpoint, args: ModelArgs) -> Known:
    """The known models that a folder may be: by the last norm, or else by shape and name, or else by shape alone."""
    shape = {
        name: getattr(args, name) for name in ("dim", "n_layers", "n_heads", "kv_heads", "ffn_width", "vocab_size")
    }
    last = digest(checkpoint, "norm.weight")
    for entry in published():
        if entry.get("digests", {}).get("norm") == last:
            return Known([entry], "the digest of its last norm")
    alike = [entry for entry in published() if entry["shape"] == shape and "digests" not in entry]
    parts = [part.lower().rpartition("--")[2].removesuffix(".gguf") for part in checkpoint.folder.resolve().parts[-4:]]
    names = {part.removesuffix("-hf") for part in parts}
    for entry in alike:
        if names.intersection(entry["names"]):
            return Known([entry], "its shape and its folder's name")
    return Known(alike)


def check_known(known: Known) -> Result:
    if known.entry is not None:
        return passed(KNOWN, f"{known.entry['name']}, recognised by {known.how}")
    if known.entries:
        told = f"it has the shape of {known.names}; neither a digest nor the folder's name says which of them it is"
        return not_applicable(KNOWN, told)
    return not_applicable(KNOWN, "none whose numbers this package has")


def check_setting(known: Known, check: str, value: float) -> Optional[Result]:
    """rope_theta or norm_eps beside that of the known model; None if there is none. A fine-tune may have another
    rope_theta."""
    stated = known.stated(check)
    if stated is None or (known.entry is None and check == repairs.THETA):
        return None
    whose = known.names if known.entry is not None else f"models of its shape ({known.names})"
    if math.isclose(stated, value, rel_tol=1e-3):
        return passed(check, f"{value:g}, as {whose}")
    return failed(check, f"{check} is {value:g}, and that of {whose} is {stated:g}", repairs.MEANS[check])


def check_order(known: Known, checkpoint: Checkpoint) -> Optional[Result]:
    """The layers by the digests of their norms; None if they do not tell."""
    stated = (known.entry or {}).get("digests", {}).get("layers")
    if stated is None:
        return None
    found = [digest(checkpoint, f"layers.{i}.attention_norm.weight") for i in range(len(stated))]
    if found == stated or sorted(found) != sorted(stated):
        return None
    moved = [
        f"layer {i} is the model's layer {stated.index(each)}" for i, each in enumerate(found) if each != stated[i]
    ]
    return failed(repairs.LAYERS, f"by the digests of {known.names}, {listed(moved)}", repairs.MEANS[repairs.LAYERS])


def check_published(llama: Llama, known: Known) -> Iterator[Result]:
    """The published logits and texts of a model that the folder is, or may be."""
    for entry in known.entries:
        if "logits" in entry:
            yield _logits(llama, known, entry)
        for number, text in enumerate(entry.get("texts", ()) if known.entry is not None else (), start=1):
            yield _text(llama, f"published text {number}", text)


def _wrong(name: str, known: Known, told: str) -> Result:
    if known.entry is None:
        return not_applicable(name, f"{told}; it is no {known.entries[0]['name']}, or not as published")
    return failed(name, told, OTHER_NUMBERS)


def _logits(llama: Llama, known: Known, entry: dict[str, Any]) -> Result:
    name, numbers = "published logits", entry["logits"]
    if is_quantized(llama):
        return not_applicable(name, "the weights are rounded to int8 or int4")
    coarser = COARSER[llama.model.norm.weight.dtype]
    with torch.inference_mode():
        logits = llama.model(torch.tensor([numbers["ids"]]), 0)[0].float().cpu()
    means = (logits.mean(-1) - torch.tensor(numbers["means"])).abs().max().item()
    first = (logits[0, : len(numbers["first"])] - torch.tensor(numbers["first"])).abs().max().item()
    bounds = numbers["means_within"] * coarser, numbers["first_within"] * coarser
    told = (
        f"{entry['name']}'s: means {means:.3f} apart at most (bound {bounds[0]:g}), single ones {first:.3f} (bound "
        f"{bounds[1]:g}); {numbers['source']}"
    )
    return passed(name, told) if means <= bounds[0] and first <= bounds[1] else _wrong(name, known, told)


def _text(llama: Llama, name: str, text: dict[str, str]) -> Result:
    """Whether each token of a published greedy text is the likeliest after those before it, or as good as the
    likeliest."""
    if is_quantized(llama):
        return not_applicable(name, "the weights are rounded to int8 or int4")
    tokenizer = llama.tokenizer
    prompt, ids = (tokenizer.encode(t, bos=True, eos=False) for t in (text["prompt"], text["prompt"] + text["answer"]))
    start = next((i for i, (a, b) in enumerate(zip(prompt, ids)) if a != b), len(prompt))
    start, ids = max(1, start), ids[: llama.model.params.max_seq_len]
    logprobs = one_pass(llama, ids[:-1])[start - 1 :]
    behind = logprobs.amax(-1) - logprobs.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
    near, chance = NEAR[llama.model.norm.weight.dtype], -math.log(logprobs.shape[1])
    where = f"{shortened(text['prompt'], 40)}, {text['source']}"
    if (wrong := (behind > near).nonzero()).numel():
        at = int(wrong[0])
        told = f"token {at + 1} of {len(behind)} should be {shortened(tokenizer.piece(ids[start + at]))}, and is "
        told += (
            f"{behind[at]:.2f} nats less likely than {shortened(tokenizer.piece(int(logprobs[at].argmax())))} ({where})"
        )
        return failed(name, told, OTHER_NUMBERS)
    if not logprobs.amax(-1).mean().item() > chance + 1:  # then all tokens are equally likely
        return failed(name, f"no token is likelier than chance has it ({where})", OTHER_NUMBERS)
    return passed(name, f"each of {len(behind)} tokens is the likeliest ({where})")


def check_perplexities(llama: Llama, known: Known, text: str) -> Iterator[Result]:
    """The perplexity of WikiText-2's test split by each method that a number is published for."""
    size = llama.model.params.max_seq_len
    entry = next((entry for entry in known.entries if "perplexity" in entry), None)
    numbers: list[dict[str, Any]] = [{"method": f"joined-{min(size, 2048)}"}] if entry is None else entry["perplexity"]
    for number in numbers:
        method = number["method"]
        name = f"wikitext {method}"
        try:
            figures = perplexity(llama, text, method)
        except ValueError as error:
            yield not_applicable(name, str(error))
            continue
        found, of = figures["perplexity"], "token"
        if method == "lm-eval":
            found, of = figures["word_perplexity"], "word"
        told = f"perplexity {found:.4f} of a {of}, in windows of {figures['window']}"
        if entry is None:
            yield not_applicable(name, f"{told}; no number is published here for this model")
            continue
        told += f"; {number['value']} is published for {entry['name']} ({number['source']})"
        right = abs(found / number["value"] - 1) <= PERPLEXITY_WITHIN
        yield passed(name, told) if right else _wrong(name, known, told)
