"""Trains the demo model. Run by hand, with the library installed; needs torch 2.9 for its Muon.

    python demo/tell.py --text tinystories-2MiB.txt --teacher HuggingFaceTB/SmolLM2-135M-Instruct --out told.txt
    python demo/train.py --text tinystories-2MiB.txt --told told.txt --out DIR --minutes 4.2

DIR gets a checkpoint in Meta's format, rewritten whenever the held-out stories are predicted better than before. The
learning rate follows the clock: it is nothing when the minutes are over.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import IGNORED, Lexicon, documents, read_stories, stories_of, train_tokenizer
from measure import score
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from llama.model import ModelArgs, Transformer

SHAPE: dict[str, Any] = {"dim": 192, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32, "norm_eps": 1e-5}
CONTEXT = 512
VOCAB_SIZE = 2048
CHAT_SHARE = 0.65  # of the stories, in each epoch, are told in a dialog
WARMUP = 200  # steps
STEPS_BETWEEN_LOOKS = 500
STORIES_OF_A_PIECE = 2000  # documents are made by other processes, a piece of an epoch each


class Epochs:
    """Batches without end. Each epoch's documents are made anew, while the one before is learned."""

    def __init__(
        self, stories: list[str], lexicon: Lexicon, proto: bytes, tokens: int, device: torch.device, seed: int
    ):
        self.stories, self.lexicon, self.proto, self.tokens, self.device = stories, lexicon, proto, tokens, device
        self.rng, self.passed = random.Random(seed), 0
        # Forked before CUDA is there, since children of a process that has begun with it may not.
        self.pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2), multiprocessing.get_context("fork"))
        self.coming = self.begin()

    def begin(self) -> list[Future[Any]]:
        self.rng.shuffle(self.stories)
        pieces = range(0, len(self.stories), STORIES_OF_A_PIECE)
        return [
            self.pool.submit(
                documents, self.stories[i : i + STORIES_OF_A_PIECE], self.lexicon, self.proto, CONTEXT, CHAT_SHARE,
                self.rng.randrange(2**31),
            )
            for i in pieces
        ]  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            made = [future.result() for future in self.coming]
            self.coming = self.begin()
            yield from self.batches(*(np.concatenate(parts) for parts in zip(*made)))
            self.passed += 1

    def batches(self, ids: np.ndarray, learn: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, S) of about so many tokens, in random order; neighbours in length share a batch."""
        flat, said = torch.from_numpy(ids).to(self.device), torch.from_numpy(learn).to(self.device)
        begin = torch.from_numpy(np.cumsum(sizes) - sizes).to(self.device)
        order = np.lexsort((np.random.default_rng(self.rng.randrange(2**31)).random(len(sizes)), sizes))
        lengths, groups = torch.from_numpy(sizes).to(self.device), []
        end = len(order)
        while end:
            width = -(-int(sizes[order[end - 1]]) // 32) * 32
            first = max(0, end - max(1, self.tokens // width))
            groups.append((width, torch.from_numpy(order[first:end]).to(self.device)))
            end = first
        self.rng.shuffle(groups)
        for width, rows in groups:
            place = torch.arange(width, device=self.device)
            at = (begin[rows, None] + place).clamp(max=len(flat) - 1)  # (B, width + 1)
            there = place < lengths[rows, None]
            whole = flat[at].long() * there
            targets = torch.where((there & said[at])[:, 1:], whole[:, 1:], IGNORED)
            yield whole[:, :-1].contiguous(), targets


def new_model(rows: int) -> Transformer:
    args = ModelArgs(**SHAPE, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT, max_batch_size=rows)
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


def new_optimizers(model: Transformer, rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the layers' matrices, AdamW for the rest; at one learning rate, steps of one size."""
    weights = dict(model.named_parameters())
    matrices = [w for name, w in weights.items() if w.ndim == 2 and name.startswith("layers.")]
    tables = [w for name, w in weights.items() if w.ndim == 2 and not name.startswith("layers.")]
    gains = [w for w in weights.values() if w.ndim == 1]
    groups = [{"params": tables, "weight_decay": decay}, {"params": gains, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98)),
    ]


class Training:
    def __init__(self, given: argparse.Namespace):
        torch.manual_seed(given.seed)
        self.given, self.device = given, torch.device(given.device)
        stories, self.held_out = read_stories(given.text)
        self.proto = given.tokenizer_path.read_bytes() if given.tokenizer_path else train_tokenizer(stories, VOCAB_SIZE)
        self.tokenizer = SentencePieceProcessor(model_proto=self.proto)
        told = stories_of(given.told) if given.told else []
        lexicon, every = Lexicon(stories), stories * given.times + told
        self.epochs = Epochs(every, lexicon, self.proto, given.batch_tokens, self.device, given.seed)
        self.model = new_model(given.batch_tokens // 32)
        self.model.allocate(self.device, torch.bfloat16)  # under autocast, that is what its cache is handed
        self.model.to(self.device)
        self.averaged = copy.deepcopy(self.model).eval()
        self.optimizers = new_optimizers(self.model, given.rate, given.decay)
        self.best = math.inf

    def run(self) -> None:
        begin, step, loss = math.nan, 0, torch.zeros((), device=self.device)
        for inputs, targets in self.epochs:
            begin = time.monotonic() if step == 0 else begin
            passed = (time.monotonic() - begin) / 60 / self.given.minutes
            rate = self.given.rate * min(1 - passed, (step + 1) / WARMUP)
            if rate > 0:
                now = self.learn(inputs, targets, rate, step)
                loss = now if step == 0 else loss.lerp(now, 0.02)
                step += 1
            if rate <= 0 or step % STEPS_BETWEEN_LOOKS == 0:
                self.look(
                    f"{step} steps, {self.epochs.passed} epochs, {passed:.0%} of the time: train {loss.item():.3f}"
                )
            if rate <= 0:
                break
        self.epochs.pool.shutdown(cancel_futures=True)

    def learn(self, inputs: Tensor, targets: Tensor, rate: float, step: int) -> Tensor:
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16):
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
            share = max(0.002, 1 / (step + 1))  # the newest weights' part in the average
            slow, fast = list(self.averaged.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(slow, fast, share)
        return loss.detach()

    def look(self, words: str) -> None:
        loss, bits = score(self.averaged, self.tokenizer, self.held_out, CONTEXT)
        better = bits < self.best
        print(f"{words}, held out {loss:.4f} nats per token, {bits:.4f} bits per byte{' *' * better}", flush=True)
        if better:
            self.best = bits
            self.export()

    def export(self) -> None:
        out = self.given.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "tokenizer.model").write_bytes(self.proto)
        (out / "params.json").write_text(json.dumps({**SHAPE, "vocab_size": -1}) + "\n")
        weights = {name: weight.to("cpu", torch.bfloat16).clone() for name, weight in self.averaged.named_parameters()}
        torch.save(weights, out / "consolidated.00.pth")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--text", type=Path, required=True, help="stories that each end in <|endoftext|>")
    parser.add_argument("--told", type=Path, help="more of them, which tell.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--tokenizer_path", type=Path, help="else one is trained on the text")
    parser.add_argument("--minutes", type=float, default=4.2)
    parser.add_argument("--rate", type=float, default=5e-3, help="the largest learning rate")
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--batch_tokens", type=int, default=32768)
    parser.add_argument("--times", type=int, default=2, help="how often the text's own stories are in an epoch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    Training(parser.parse_args()).run()


if __name__ == "__main__":
    main()
