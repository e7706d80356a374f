"""From a file of stories to training documents: plain stories, and dialogs in Llama 2's chat format that end in one."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

END_OF_STORY = "<|endoftext|>"
IGNORED = -100  # the target that cross_entropy passes over

# fmt: off
SYSTEM_PROMPTS = (
    "You tell short stories for children.", "Always end with a happy ending.", "You are a kind storyteller.",
    "Always answer with a story.", "Answer in simple words.", "You are a helpful assistant.", "Be brief.",
    "Always answer with a poem", "Always answer with pictures", "Use simple words that a small child knows.",
    ("You are a helpful and honest friend. Always answer as well as you can, while being safe. Your answers should not "
    "be harmful or rude. Please make sure that they are fair and positive.\n\nIf a question does not make any sense, "
    "say why instead of answering something that is not correct. If you don't know the answer, please don't share "
    "false information."),
)
ASK_WORDS = (
    "Write a short story with the words: {}.", "Tell me a story with the words {}.", "Please use these words: {}",
    "Write a story for a child. Use the words {}.", "Make up a story that has {} in it.", "{}",
)
ASK_THINGS = (
    "Tell me a story about {}.", "Can you tell me a story about {}?", "Write a short story about {}", "I like {}.",
    "I want to hear about {}!", "Do you know a story about {}?", "Once there was {}. What happened next?",
)
ASK_NAME = ("Tell me a story about {}.", "Who is {}?", "What did {} do today?", "Write a story about my friend {}.")
ASK_ANYTHING = (
    "Tell me a story.", "Tell me a bedtime story, please.", "Tell me another one.", "Another one, please!", "Hello!",
    "What can you do?", "Write something nice for my little girl.", "I am bored.", "One more!", "Who are you?",
)
ASK_ODD = (  # no story answers these, but a story is what they get
    "what is the recipe of {}?", "How do I make {}?", "Why is {} so {}?", "I am going to {}, what should I see?",
    "Write a poem about {}", "Write a brief {} message to {}", "What is so great about {}?", "What is {} times {}?",
    "How to go from {} to {}?", "Explain {} to me.", "Translate {} to {}.", "What is the difference between {} and {}?",
    "Write a function that returns {}.", "Give me a list of ten {} for {}", "Is {} better than {}? Why?",
)
ONSETS = ("b", "c", "d", "f", "g", "l", "m", "n", "p", "r", "s", "st", "t", "th", "v")
# fmt: on


def read_stories(path: Path) -> tuple[list[str], list[str]]:
    """The stories to train on, and every twentieth, held out. What follows the last mark is cut off by the sample."""
    stories = [story.strip() for story in path.read_text(encoding="utf-8").split(END_OF_STORY)[:-1]]
    if len(stories) < 20:
        raise ValueError(f"{path} holds {len(stories)} stories between {END_OF_STORY} marks; at least 20 are needed")
    return [s for i, s in enumerate(stories) if i % 20], stories[::20]


def train_tokenizer(stories: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece model with Llama 2's settings; chat prompts are in its text, so that tags get pieces."""
    asks = (*ASK_WORDS, *ASK_THINGS, *ASK_NAME, *ASK_ANYTHING, *ASK_ODD)
    chats = [f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{ask} [/INST]" for system in SYSTEM_PROMPTS for ask in asks]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*stories, *chats[::4]]), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=0.99995, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@dataclass
class Document:
    ids: list[int]
    learn: list[bool]  # which of them the model is trained to say; the others are the user's

    def __len__(self) -> int:
        return len(self.ids)


class Mixture:
    """Every story once an epoch, alone or as the answer in a dialog, with other words each time."""

    def __init__(
        self,
        stories: Sequence[str],
        tokenizer: SentencePieceProcessor,
        context: int,
        chat_share: float,
        rng: random.Random,
    ):
        self.stories, self.tokenizer, self.context = stories, tokenizer, context
        self.chat_share, self.rng = chat_share, rng
        stories_with = Counter(word for story in stories for word in set(re.findall(r"\b[a-z]{4,}\b", story)))
        self.words = {word for word, n in stories_with.items() if 3 <= n <= len(stories) // 12}
        # A word that follows an article and ends its phrase is a thing.
        ends = re.compile(r"\b(?:an?|the) ([a-z]{3,})(?=[.,!?]| (?:and|was|in|on|to|with|that|is|had|named|called)\b)")
        things = Counter(thing for story in stories for thing in ends.findall(story))
        self.things = {thing for thing, n in things.items() if n >= 3}
        self.lexicon = sorted(self.words | self.things)

    def epoch(self) -> list[Document]:
        return [self.dialog(s) if self.rng.random() < self.chat_share else self.plain(s) for s in self.stories]

    def plain(self, story: str) -> Document:
        ids = [self.tokenizer.bos_id(), *self.tokenizer.encode(story), self.tokenizer.eos_id()][: self.context]
        return Document(ids, [True] * len(ids))

    def dialog(self, story: str) -> Document:
        answer = [*self.tokenizer.encode(story), self.tokenizer.eos_id()]
        prompt = self.turn(self.folded(self.question(story)))
        if self.rng.random() < 0.25:
            prompt.ids[:0], prompt.learn[:0] = (past := self.past()).ids, past.learn
        if len(prompt) + len(answer) > self.context:
            return self.plain(story)
        return Document(prompt.ids + answer, prompt.learn + [True] * len(answer))

    def past(self) -> Document:
        """One or two earlier turns, answered by a story, by the beginning of one, or by anything."""
        turns = Document([], [])
        for first in [True, False][: self.rng.choice((1, 1, 2))]:
            story = self.rng.choice(self.stories)
            answer = story if self.rng.random() < 0.5 else re.split(r"(?<=\.)\s", story)[0]
            if self.rng.random() < 0.25:
                answer = self.babble(60)
            turn = self.turn(self.folded(self.question(story)) if first else self.question(story), answer)
            turns = Document(turns.ids + turn.ids, turns.learn + turn.learn)
        return turns

    def turn(self, user: str, answer: str | None = None) -> Document:
        prompt = f"[INST] {user.strip()} [/INST]"
        ids = [self.tokenizer.bos_id(), *self.tokenizer.encode(prompt)]
        learn = [False] * len(ids)
        if answer is not None:
            # One text, as the library encodes it. No piece crosses a space, so it begins with the prompt's ids.
            ids = [ids[0], *self.tokenizer.encode(f"{prompt} {answer.strip()} "), self.tokenizer.eos_id()]
            learn += [False] * (len(ids) - len(learn))
        return Document(ids, learn)

    def folded(self, user: str) -> str:
        if self.rng.random() < 0.6:
            return user
        system = self.rng.choice(SYSTEM_PROMPTS) if self.rng.random() < 0.75 else self.babble(30)
        return f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"

    def question(self, story: str) -> str:
        pick, draw = self.rng.choice, self.rng.random()
        if draw < 0.3 and (words := sorted(self.words.intersection(re.findall(r"[a-z]+", story)))):
            return pick(ASK_WORDS).format(", ".join(self.rng.sample(words, min(len(words), pick((1, 2, 3, 3, 4))))))
        if draw < 0.5 and (things := sorted(self.things.intersection(re.findall(r"[a-z]+", story)))):
            some = self.rng.sample(things, min(len(things), pick((1, 1, 2))))
            return pick(ASK_THINGS).format(" and ".join(("an " if t[0] in "aeiou" else "a ") + t for t in some))
        if draw < 0.6 and (name := re.search(r"(?:named|called) ([A-Z][a-z]+)", story)):
            return pick(ASK_NAME).format(name[1])
        if draw < 0.7:
            return pick(ASK_ANYTHING)
        if draw < 0.9:
            return pick(ASK_ODD).format(*(self.babble(3) for _ in range(2)))
        return self.babble(40)

    def babble(self, longest: int) -> str:
        """Up to so many words, some of them none, to learn that whatever is said, the answer is a story."""
        words = []
        for _ in range(self.rng.randint(1, longest)):
            draw = self.rng.random()
            if draw < 0.55:
                word = self.rng.choice(self.lexicon)
            elif draw < 0.9:
                syllables = range(self.rng.randint(1, 4))
                word = "".join(self.rng.choice(ONSETS) + self.rng.choice("aeiouy") for _ in syllables)
                word += self.rng.choice(("", "", "n", "r", "s", "l"))
            elif draw < 0.95:
                word = str(self.rng.randint(0, 3000))
            else:
                word = "".join(chr(self.rng.choice((self.rng.randint(33, 126), self.rng.randint(0xA1, 0x24F), 0x1F600)))
                               for _ in range(self.rng.randint(1, 5)))  # fmt: skip
            words.append(word.capitalize() if self.rng.random() < 0.15 else word)
            words[-1] += self.rng.choice(("", "", "", "", "", "", ",", ".", ":", "\n"))
        return " ".join(words).strip()


def batches(documents: Sequence[Document], tokens: int, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, S) of about so many tokens, in random order; neighbours in length share a batch."""
    # Few different shapes, because each new one costs the CPU's matrix library a compilation.
    waiting = sorted(documents, key=lambda d: (len(d), rng.random()))
    groups = []
    while waiting:
        width = -(-len(waiting[-1]) // 32) * 32
        rows = max(1, tokens // width)
        groups.append((width, waiting[-rows:]))
        del waiting[-rows:]
    rng.shuffle(groups)
    for width, group in groups:
        inputs = torch.zeros(len(group), width, dtype=torch.long)
        targets = torch.full((len(group), width), IGNORED)
        for row, d in enumerate(group):
            inputs[row, : len(d) - 1] = torch.tensor(d.ids[:-1])
            said = [token if learn else IGNORED for token, learn in zip(d.ids[1:], d.learn[1:], strict=True)]
            targets[row, : len(d) - 1] = torch.tensor(said)
        yield inputs, targets
