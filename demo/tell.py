"""Tells new stories like those of a sample: a larger model learns from the sample, and writes. Run by hand, on a GPU.

    python demo/tell.py --text tinystories-2MiB.txt --teacher HuggingFaceTB/SmolLM2-135M-Instruct --out told.txt

Two thousand stories are too few to learn English from. A model that knows English learns from them what the stories
are like (a few epochs, until it predicts the held-out ones worse), each under a heading with words of it; then it is
given headings with other words and names. Needs transformers. --seconds is the time for writing alone.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from data import END_OF_STORY, IGNORED, NAME, Lexicon, read_stories
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

LONGEST = 416  # tokens of a heading and a story
BATCH_TOKENS = 8192
EPOCHS = 8  # at most
LEARNING_RATE = 3e-4
LEAST_SHARE = 0.02  # a token is drawn if it is at least so likely as this share of the likeliest (min-p)
STEPS_BETWEEN_LOOKS = 16


class Headings:
    """What a story is to have, as a line before it."""

    def __init__(self, lexicon: Lexicon, rng: random.Random):
        self.lexicon, self.rng = lexicon, rng

    def of(self, story: str) -> str:
        """Some words of a story, and its first name."""
        words = sorted(self.lexicon.words.intersection(re.findall(r"[a-z]+", story)))
        some = self.rng.sample(words, min(len(words), self.rng.randint(1, 3)))
        name = NAME.search(story)
        return self.line(some, name[1] if name and self.rng.random() < 0.8 else "")

    def new(self) -> str:
        some = self.rng.sample(self.lexicon.sorted_words, self.rng.randint(1, 3))
        if self.rng.random() < 0.7:
            some[0] = self.rng.choice(self.lexicon.sorted_things)
        return self.line(some, self.rng.choice(self.lexicon.names) if self.rng.random() < 0.6 else "")

    def line(self, words: list[str], name: str) -> str:
        return f"Words: {', '.join(words)}.{f' Name: {name}.' if name else ''}\n\n"


class Teacher:
    def __init__(self, name: str, device: torch.device):
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
        self.device, self.end = device, self.tokenizer.eos_token_id

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def batches(self, stories: list[str], headings: Headings) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, S); only the story and its end count."""
        rows = []
        for story in stories:
            heading, text = self.ids(headings.of(story)), self.ids(story)
            rows.append((([self.end, *heading, *text, self.end])[: LONGEST + 1], len(heading) + 1))
        rows.sort(key=lambda row: len(row[0]))
        groups = []
        while rows:
            n = max(1, BATCH_TOKENS // len(rows[-1][0]))
            groups.append(rows[-n:])
            del rows[-n:]
        headings.rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            whole = torch.tensor([ids + [self.end] * (width - len(ids)) for ids, _ in group])
            targets = whole[:, 1:].clone()
            for target, (ids, first) in zip(targets, group):
                target[: first - 1] = target[len(ids) - 1 :] = IGNORED
            yield whole[:, :-1].to(self.device), targets.to(self.device)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def bits_per_byte(self, stories: list[str], headings: Headings) -> float:
        self.model.eval()
        nats = sum(self.loss(*batch).item() for batch in self.batches(stories, headings))
        return nats / math.log(2) / sum(len(story.encode()) for story in stories)

    def learn(self, stories: list[str], held_out: list[str], headings: Headings) -> None:
        """Keeps the weights of the epoch after which the held-out stories are likeliest."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
        steps, best, kept = 0, math.inf, {}
        whole = EPOCHS * sum(len(self.ids(story)) + 15 for story in stories) / BATCH_TOKENS
        for epoch in range(EPOCHS):
            self.model.train()
            for inputs, targets in self.batches(stories, headings):
                (self.loss(inputs, targets) / (targets != IGNORED).sum()).backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * min((steps + 1) / 20, max(0.02, 1 - steps / whole))
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
            bits = self.bits_per_byte(held_out, headings)
            print(f"epoch {epoch + 1}, {steps} steps: held out {bits:.4f} bits per byte", flush=True)
            if bits >= best:
                break
            best, kept = bits, copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(kept)


class Writing:
    """Many stories side by side, each at its own place: one step gives each row its next token."""

    def __init__(self, teacher: Teacher, rows: int):
        self.model = teacher.model.to(torch.bfloat16).eval()
        config, device = self.model.config, teacher.device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.ids = torch.full((rows, LONGEST + 1), teacher.end, device=device)
        self.given = torch.ones(rows, dtype=torch.long, device=device)  # ids of a row that are not drawn: its heading
        self.place = torch.zeros(rows, dtype=torch.long, device=device)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        shape = (config.num_hidden_layers, rows, self.kv_heads, LONGEST, self.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.row = torch.arange(rows, device=device)
        self.cos, self.sin = (
            table[0].to(torch.bfloat16)
            for table in self.model.model.rotary_emb(
                torch.zeros(1, device=device), torch.arange(LONGEST, device=device)[None]
            )
        )
        self.end = teacher.end
        self.step = self.recorded() if device.type == "cuda" else self.plain_step

    @torch.no_grad()
    def plain_step(self) -> None:
        inner = self.model.model
        h = inner.embed_tokens(self.ids[self.row, self.place])  # (B, dim)
        hidden = torch.arange(LONGEST, device=h.device) > self.place[:, None]  # (B, LONGEST)
        mask = torch.zeros(hidden.shape, dtype=h.dtype, device=h.device).masked_fill(hidden, -math.inf)[:, None, None]
        cos, sin = self.cos[self.place][:, None], self.sin[self.place][:, None]

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        for i, layer in enumerate(inner.layers):
            x, attention = layer.input_layernorm(h), layer.self_attn
            q = rotated(attention.q_proj(x).unflatten(-1, (self.heads, -1)))
            self.keys[i, self.row, :, self.place] = rotated(attention.k_proj(x).unflatten(-1, (self.kv_heads, -1)))
            self.values[i, self.row, :, self.place] = attention.v_proj(x).unflatten(-1, (self.kv_heads, -1))
            q = q.unflatten(1, (self.kv_heads, -1)) * self.head_dim**-0.5  # (B, kv_heads, heads of each, head_dim)
            weights = (q @ self.keys[i].transpose(-1, -2) + mask).softmax(-1)
            h = h + attention.o_proj((weights @ self.values[i]).flatten(1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        logits = self.model.lm_head(inner.norm(h)).float()
        unlikely = logits < logits.amax(-1, keepdim=True) + math.log(LEAST_SHARE)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = -torch.empty_like(logits).exponential_().log()
        drawn = logits.masked_fill(unlikely, -math.inf).add_(noise).argmax(-1)
        after = self.place + 1
        told = torch.where((after < self.given) | self.done, self.ids[self.row, after], drawn)
        self.ids[self.row, after] = told
        self.done |= (told == self.end) & (after >= self.given)
        self.place.copy_(after.clamp(max=LONGEST - 1))

    def recorded(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.plain_step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.plain_step()
        return graph.replay

    def stories(self, heading: Callable[[], list[int]], seconds: float) -> Iterator[list[int]]:
        """The ids of stories that came to their end, with their headings, until the time is over."""
        self.done.fill_(True)
        stop, first = time.monotonic() + seconds, True
        while time.monotonic() < stop:
            over = (self.done | (self.place == LONGEST - 1)).nonzero().flatten()
            if not first:
                for ids, at, done in zip(self.ids[over].tolist(), self.given[over].tolist(), self.done[over].tolist()):
                    if done:
                        yield ids[at : ids.index(self.end, at)]
            first = False
            if rows := over.tolist():
                new = [[self.end, *heading()] for _ in rows]
                self.ids[over] = torch.tensor([ids + [self.end] * (LONGEST + 1 - len(ids)) for ids in new]).to(
                    over.device
                )
                self.given[over] = torch.tensor([len(ids) for ids in new]).to(over.device)
                self.place[over], self.done[over] = 0, False
            for _ in range(STEPS_BETWEEN_LOOKS):
                self.step()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write new stories like those of a sample.")
    parser.add_argument("--text", type=Path, required=True, help="stories that each end in <|endoftext|>")
    parser.add_argument("--teacher", required=True, help="a Llama of transformers: a folder or a name on the hub")
    parser.add_argument("--out", type=Path, required=True, help="the file of new stories")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--rows", type=int, default=2048, help="stories side by side")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    torch.manual_seed(1)
    rng = random.Random(1)
    stories, held_out = read_stories(given.text)
    lexicon = Lexicon(stories)
    headings = Headings(lexicon, rng)
    teacher = Teacher(given.teacher, torch.device(given.device))
    teacher.learn(stories, held_out, headings)
    writing = Writing(teacher, given.rows)
    seen, tokens, begin = set(stories), 0, time.monotonic()
    with given.out.open("w", encoding="utf-8") as file:
        for ids in writing.stories(lambda: teacher.ids(headings.new()), given.seconds):
            tokens += len(ids)
            story = teacher.tokenizer.decode(ids).strip()
            if story not in seen and len(story.split()) >= 30:
                seen.add(story)
                file.write(f"{story}\n{END_OF_STORY}\n")
    new, took = len(seen) - len(stories), time.monotonic() - begin
    print(f"{new} new stories, {tokens} tokens in {took:.0f} s: {tokens / took:.0f} a second")


if __name__ == "__main__":
    main()
