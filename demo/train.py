"""Trains the demo model. Run by hand, with the library installed; needs torch 2.9 for its Muon.

    python demo/train.py --text tinystories-2MiB.txt --out DIR [--resume]

DIR gets a checkpoint in Meta's format, rewritten whenever the held-out stories are predicted better than before, and
`training.pt`, from which --resume goes on. The text is small, so each story is seen two dozen times: dropout, weight
decay, an average of the weights and prompts that are never the same twice keep the model from learning it by heart.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import IGNORED, Mixture, batches, read_stories, train_tokenizer
from measure import score
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama.model import ModelArgs, Transformer

SHAPE: dict[str, Any] = {"dim": 192, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32, "norm_eps": 1e-5}
CONTEXT = 512
VOCAB_SIZE = 2048
CHAT_SHARE = 0.3  # of the stories, in each epoch, are told as the answer in a dialog
BATCH_TOKENS = 2048  # few: on this little text, more steps are worth more than smoother ones
AVERAGE = 0.998  # the share of the averaged weights that a step leaves as it was
STEPS_BETWEEN_LOOKS = 300


@dataclass(frozen=True)
class Leg:
    steps: int
    learning_rate: float  # after the warmup; it would reach nothing in `steps_to_zero` steps
    steps_to_zero: int
    warmup: int
    weight_decay: float
    dropout: float
    embedding_dropout: float


# The second leg begins with the averaged weights of the first, where that began to learn by heart.
LEGS = (
    Leg(5400, 3e-3, 6800, warmup=100, weight_decay=0.5, dropout=0.2, embedding_dropout=0.1),
    Leg(3000, 1e-3, 3160, warmup=50, weight_decay=0.7, dropout=0.25, embedding_dropout=0.15),
)


def new_model() -> Transformer:
    args = ModelArgs(**SHAPE, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT, max_batch_size=BATCH_TOKENS // 32)
    model = Transformer(args)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.ones_(weight)
            continue
        std = 0.02 if name in ("tok_embeddings.weight", "output.weight") else weight.shape[1] ** -0.5
        if name.endswith(("wo.weight", "w2.weight")):  # what adds to the residual stream, twice a layer
            std /= math.sqrt(2 * args.n_layers)
        nn.init.normal_(weight, std=std)
    return model


def drop_in(module: nn.Module, share: float) -> RemovableHandle:
    """Dropout on what the module returns, while it trains."""
    return module.register_forward_hook(lambda module, _, out: F.dropout(out, share, module.training))


def new_optimizers(model: Transformer, leg: Leg) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the layers' matrices, AdamW for the rest; at one learning rate, steps of one size."""
    weights = dict(model.named_parameters())
    matrices = [w for name, w in weights.items() if w.ndim == 2 and name.startswith("layers.")]
    tables = [w for name, w in weights.items() if w.ndim == 2 and not name.startswith("layers.")]
    gains = [w for w in weights.values() if w.ndim == 1]
    groups = [{"params": tables, "weight_decay": leg.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=leg.learning_rate, weight_decay=leg.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=leg.learning_rate, betas=(0.9, 0.98)),
    ]


class Training:
    def __init__(self, text: Path, out: Path, seed: int = 1):
        torch.manual_seed(seed)
        self.out, self.rng = out, random.Random(seed)
        stories, self.held_out = read_stories(text)
        self.proto = train_tokenizer(stories, VOCAB_SIZE)
        self.tokenizer = SentencePieceProcessor(model_proto=self.proto)
        self.mixture = Mixture(stories, self.tokenizer, CONTEXT, CHAT_SHARE, self.rng)
        self.model = new_model()
        self.averaged = copy.deepcopy(self.model).eval()
        self.model.allocate(torch.device("cpu"), torch.bfloat16)  # under autocast, that is what its cache is handed
        self.best = math.inf
        self.drops: list[RemovableHandle] = []
        self.begin(0)

    def begin(self, number: int) -> None:
        self.number, self.leg, self.step = number, LEGS[number], 0
        self.model.load_state_dict(self.averaged.state_dict())
        self.optimizers = new_optimizers(self.model, self.leg)
        for drop in self.drops:
            drop.remove()
        self.drops = [drop_in(self.model.tok_embeddings, self.leg.embedding_dropout)]
        for layer in self.model.layers:
            self.drops += [
                drop_in(layer.get_submodule(part), self.leg.dropout) for part in ("attention", "feed_forward")
            ]

    def run(self) -> None:
        while True:
            self.run_leg()
            if self.number + 1 == len(LEGS):
                return
            self.begin(self.number + 1)

    def run_leg(self) -> None:
        loss = math.nan
        while self.step < self.leg.steps:
            # An epoch that --resume cuts short begins anew: its documents are drawn again anyway.
            for inputs, targets in batches(self.mixture.epoch(), BATCH_TOKENS, self.rng):
                now = self.learn(inputs, targets)
                loss = now if math.isnan(loss) else 0.98 * loss + 0.02 * now
                if self.step % STEPS_BETWEEN_LOOKS == 0 or self.step == self.leg.steps:
                    self.look(loss)
                if self.step == self.leg.steps:
                    break

    def learn(self, inputs: Tensor, targets: Tensor) -> float:
        rate = self.leg.learning_rate * min(1 - self.step / self.leg.steps_to_zero, (self.step + 1) / self.leg.warmup)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(inputs, 0)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 1 - AVERAGE)
        self.step += 1
        return loss.item()

    def look(self, train_loss: float) -> None:
        loss, bits = score(self.averaged, self.tokenizer, self.held_out, CONTEXT)
        print(f"leg {self.number + 1}, step {self.step}: train {train_loss:.3f}, held out {loss:.4f} nats per token, "
              f"{bits:.4f} bits per byte{' *' if bits < self.best else ''}", flush=True)  # fmt: skip
        if bits < self.best:
            self.best = bits
            self.export()
        self.save()

    def export(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "tokenizer.model").write_bytes(self.proto)
        (self.out / "params.json").write_text(json.dumps({**SHAPE, "vocab_size": -1}) + "\n")
        weights = {name: weight.to(torch.bfloat16).clone() for name, weight in self.averaged.named_parameters()}
        torch.save(weights, self.out / "consolidated.00.pth")

    def parts(self) -> list[Any]:
        return [self.model, self.averaged, *self.optimizers]

    def save(self) -> None:
        state = {"parts": [part.state_dict() for part in self.parts()], "number": self.number, "step": self.step}
        state |= {"best": self.best, "rng": self.rng.getstate(), "torch_rng": torch.get_rng_state()}
        torch.save(state, self.out / "training.pt.new")
        (self.out / "training.pt.new").replace(self.out / "training.pt")  # whole, or not at all

    def resume(self) -> None:
        path = self.out / "training.pt"
        if not path.exists():
            raise ValueError(f"there is no {path} to resume from; run without --resume")
        state = torch.load(path, weights_only=True)
        self.begin(state["number"])
        for part, values in zip(self.parts(), state["parts"], strict=True):
            part.load_state_dict(values)
        self.step, self.best = state["step"], state["best"]
        self.rng.setstate(state["rng"])
        torch.set_rng_state(state["torch_rng"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--text", type=Path, required=True, help="stories that each end in <|endoftext|>")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/training.pt")
    given = parser.parse_args()
    training = Training(given.text, given.out)
    if given.resume:
        training.resume()
    training.run()


if __name__ == "__main__":
    main()
