"""The figures of the model card: losses, bits per byte, answers, samples, and what these share with the training text.

    python demo/measure.py --text tinystories-2MiB.txt --ckpt_dir DIR [--tokenizer_path FILE] [--samples 10]

Any checkpoint of one file in Meta's format can be measured; --samples 0 gives the losses alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from data import Lexicon, read_stories
from questions import Question, a, questions
from sentencepiece import SentencePieceProcessor
from torch import nn

from llama import Dialog, Llama
from llama.model import ModelArgs, Transformer

CHATS: tuple[tuple[str | None, str], ...] = (  # a system prompt or none, and what the user says
    (None, "Tell me a story about a cat and a ball."),
    ("You tell short stories for children.", "Write a short story with the words: brave, tree, happy."),
    (None, "what is the recipe of mayonnaise?"),
    ("Always answer with Haiku", "I am going to Paris, what should I see?"),
    (None, "Who is Tom?"),
    ("Always end with a happy ending.", "zxcvb 12 ?!"),
)
THINGS = (  # a story about each is asked for
    "dog",
    "cat",
    "ball",
    "bird",
    "tree",
    "car",
    "fish",
    "boat",
    "bear",
    "frog",
    "flower",
    "hat",
    "cake",
    "rabbit",
    "kite",
    "duck",
    "box",
    "doll",
    "truck",
    "cookie",
    "horse",
    "butterfly",
    "apple",
    "train",
    "robot",
    "mouse",
    "lion",
    "bike",
    "balloon",
    "book",
)
ASKED = ("Tell me a story with {}.", "Tell me a story about {}.", "Can you tell me a story with {} in it?")


@torch.no_grad()
def score(
    model: nn.Module, tokenizer: SentencePieceProcessor, stories: Sequence[str], context: int
) -> tuple[float, float]:
    """Mean loss per token in nats, ends of stories included; and bits per byte of the stories' text, ends not included.

    Each story begins after a BOS. One longer than the context is read in windows, each half a context further; each of
    its tokens is scored once, in the first window that holds it.
    """
    windows: list[tuple[list[int], int]] = []  # ids, and the place of the first to score
    for story in stories:
        ids = [tokenizer.bos_id(), *tokenizer.encode(story), tokenizer.eos_id()]
        done = 1
        while done < len(ids):
            start = max(0, done - context // 2) if done > 1 else 0
            windows.append((ids[start : start + context], done - start))
            done = start + len(windows[-1][0])
    device = next(model.parameters()).device
    windows.sort(key=lambda window: len(window[0]))
    nats, nats_of_ends, tokens = 0.0, 0.0, 0
    for i in range(0, len(windows), 8):
        some = windows[i : i + 8]
        width = max(len(ids) for ids, _ in some)
        batch = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in some], device=device)
        losses = F.cross_entropy(model(batch[:, :-1], 0).transpose(1, 2), batch[:, 1:], reduction="none")
        for loss, (ids, first) in zip(losses, some, strict=True):
            nats += loss[first - 1 : len(ids) - 1].sum().item()
            tokens += len(ids) - first
            if ids[-1] == tokenizer.eos_id():
                nats_of_ends += loss[len(ids) - 2].item()
    size = sum(len(story.encode()) for story in stories)
    return nats / tokens, (nats - nats_of_ends) / math.log(2) / size


def load(ckpt_dir: Path, tokenizer: SentencePieceProcessor, context: int) -> Transformer:
    """The model in float32, whatever the device would choose: figures should not depend on it."""
    params = {**json.loads((ckpt_dir / "params.json").read_text()), "vocab_size": tokenizer.vocab_size()}
    model = Transformer(ModelArgs(**params, max_seq_len=context, max_batch_size=8)).eval()
    weights = torch.load(ckpt_dir / "consolidated.00.pth", map_location="cpu", weights_only=True)
    model.load_state_dict({name: weight.float() for name, weight in weights.items() if name != "rope.freqs"})
    return model


def longest_shared_run(texts: Sequence[str], others: Sequence[str]) -> str:
    """The longest run of words of any text that stands in one of the others; capitals and punctuation do not count."""

    def runs(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
        return zip(*(words[i:] for i in range(n)), strict=False)

    def words(text: str) -> list[str]:
        return re.findall(r"[\w']+", text.lower().replace("’", "'"))

    ours, theirs = [words(text) for text in texts], [words(text) for text in others]
    longest: tuple[str, ...] = ()
    while True:
        known = {run for other in theirs for run in runs(other, len(longest) + 1)}
        longer = next((run for text in ours for run in runs(text, len(longest) + 1) if run in known), None)
        if longer is None:
            return " ".join(longest)
        longest = longer


def followed(generator: Llama) -> list[bool]:
    """Whether the story about a thing has it: each thing in three ways as a first message, and after another story."""
    dialogs: list[Dialog] = []
    for i, thing in enumerate(THINGS):
        dialogs += [[{"role": "user", "content": asked.format(a(thing))}] for asked in ASKED]
        before = "Once upon a time, there was a little girl named Lily. She had a red shoe. She was happy."
        dialogs.append([
            {"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": before},
            {"role": "user", "content": f"Now with {a(THINGS[i])}."},
        ])  # fmt: skip
    replies = generator.chat_completion(dialogs, max_gen_len=300)
    things = [thing for thing in THINGS for _ in range(len(ASKED) + 1)]
    return [thing in reply["generation"]["content"].lower() for thing, reply in zip(things, replies, strict=True)]


def answered(generator: Llama, stories: Sequence[str], lexicon: Lexicon) -> dict[str, list[bool]]:
    """Whether questions about a story that was just told are answered, in few words: by the question's first words."""
    rng = random.Random(1)
    asked: list[tuple[Question, Dialog]] = []
    for story in stories:
        if len(generator.tokenizer.encode(story, bos=False, eos=False)) > 400:
            continue
        for question in questions(story, lexicon.things, rng):
            asked.append((question, [
                {"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": story},
                {"role": "user", "content": question.text},
            ]))  # fmt: skip
    replies = generator.chat_completion([dialog for _, dialog in asked], temperature=0, max_gen_len=60)
    right: dict[str, list[bool]] = {}
    for (question, _), reply in zip(asked, replies, strict=True):
        said = reply["generation"]["content"]
        kind = " ".join(question.text.split()[:2])
        right.setdefault(kind, []).append(question.key in said and len(said.split()) <= 30)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint on the held-out stories.")
    parser.add_argument("--text", type=Path, required=True, help="the text that train.py was given")
    parser.add_argument("--ckpt_dir", type=Path, required=True)
    parser.add_argument("--tokenizer_path", type=Path, help="if not in ckpt_dir")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.samples < 0:
        raise ValueError(f"--samples is {given.samples}; it must be 0 or more")
    tokenizer_path = given.tokenizer_path or given.ckpt_dir / "tokenizer.model"
    tokenizer = SentencePieceProcessor(model_file=str(tokenizer_path))
    stories, held_out = read_stories(given.text)
    model = load(given.ckpt_dir, tokenizer, context=512)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")
    for name, some in (("training", stories), ("held-out", held_out)):
        loss, bits = score(model, tokenizer, some, context=512)
        print(f"{len(some)} {name} stories: {loss:.4f} nats per token, {bits:.4f} bits per byte")
    if not given.samples:
        return
    generator = Llama.build(str(given.ckpt_dir), str(tokenizer_path), 512, 32, seed=given.seed)
    follows = followed(generator)
    print(f"requests for a thing: {sum(follows)} of {len(follows)} stories have it", flush=True)
    answers = answered(generator, held_out, Lexicon(stories))
    asked = sum(map(len, answers.values()))
    print(f"questions about held-out stories: {sum(map(sum, answers.values()))} of {asked} right")
    for kind, right in sorted(answers.items(), key=lambda item: -len(item[1])):
        print(f"    {kind} …: {sum(right)} of {len(right)}")
    told = [story["generation"] for story in generator.text_completion([""] * given.samples)]
    for name, texts in ((f"{len(told)} samples", told), (f"{len(told)} held-out stories", held_out[: len(told)])):
        run = longest_shared_run(texts, stories)
        print(f"longest run of words that {name} share with the training stories: {len(run.split())} ({run})")
    for story in told:
        print(f"\n--- [{len(tokenizer.encode(story))} tokens]\n{story}")
    dialogs: list[Dialog] = [
        [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}]
        for system, user in CHATS
    ]
    for (system, user), reply in zip(CHATS, generator.chat_completion(dialogs), strict=True):
        answer = reply["generation"]["content"]
        print(f"\n--- System: {system}\nUser: {user}\nAssistant: [{len(tokenizer.encode(answer))} tokens]\n{answer}")


if __name__ == "__main__":
    main()
