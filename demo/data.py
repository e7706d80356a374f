"""From stories to training documents: plain, or in dialogs in Llama 2's chat format that tell one or ask about it."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from questions import a, questions
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

END_OF_STORY = "<|endoftext|>"
IGNORED = -100  # the target that cross_entropy passes over
NAME = re.compile(r"(?:named|called) ([A-Z][a-z]+)")

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
    "Tell me a story with {}.", "A story with {}, please.", "Write a story with {} in it.", "with {}", "{}, please!",
)
ASK_AGAIN = (  # after another story
    "Now with {}.", "Another one, with {}.", "And now one about {}, please.", "Tell it again, but with {}.", "with {}",
    "Can you tell one with {} in it?", "Now I want {} in the story.", "The next one should have {}.",
)
ASK_NAME = ("Tell me a story about {}.", "Who is {}?", "What did {} do today?", "Write a story about my friend {}.")
ASK_ANYTHING = (
    "Tell me a story.", "Tell me a bedtime story, please.", "Tell me another one.", "Another one, please!",
    "Write something nice for my little girl.", "I am bored.", "One more!",
)
ASK_ODD = (  # no story answers these, but a story is what they get
    "what is the recipe of {}?", "How do I make {}?", "Why is {} so {}?", "I am going to {}, what should I see?",
    "Write a poem about {}", "Write a brief {} message to {}", "What is so great about {}?", "What is {} times {}?",
    "How to go from {} to {}?", "Explain {} to me.", "Translate {} to {}.", "What is the difference between {} and {}?",
    "Write a function that returns {}.", "Give me a list of ten {} for {}", "Is {} better than {}? Why?",
)
GREETINGS = ("Hello!", "Hi", "Hello", "Hi there!", "Who are you?", "What can you do?", "What is your name?", "Help!",
             "How are you?", "Good morning!", "What are you?", "Can you help me?")
GREETED = (
    "Hello! I tell little stories. What should one be about?", "Hi! I know little stories. Do you want one?",
    "I am a very small model that tells stories. Ask me for one about a dog, or a ball.",
)
NOT_KNOWN = (  # what an odd request is answered, before a story
    "I do not know that, but I know a story.", "I only know little stories. Here is one.", "Let me tell you a story.",
    "That is too hard for me. I can tell you a story.",
)
NOT_TOLD = ("I do not know. The story does not say.", "The story does not tell.", "I do not know that.")
NO_THINGS = {
    "lot", "while", "bit", "day", "way", "time", "little", "few", "big", "new", "good", "great", "minute", "best",
}
NAMES = (
    "Adam", "Ava", "Bea", "Boris", "Carla", "Cleo", "Dan", "Dora", "Eddie", "Eli", "Eva", "Felix", "Finn", "Gus",
    "Gwen", "Hugo", "Ida", "Ivan", "Ivy", "Jade", "Jonas", "Kai", "Kim", "Lars", "Lena", "Liam", "Lina", "Lulu",
    "Marco", "Maya", "Milo", "Nina", "Noah", "Nora", "Olga", "Oscar", "Otto", "Paul", "Penny", "Pia", "Pip", "Rex",
    "Rob", "Rosa", "Ruth", "Sara", "Sofia", "Tara", "Ted", "Theo", "Tina", "Toby", "Uma", "Vera", "Vic", "Wanda",
    "Yara", "Zack", "Zoe",
)
ONSETS = ("b", "c", "d", "f", "g", "l", "m", "n", "p", "r", "s", "st", "t", "th", "v")
# fmt: on


def stories_of(path: Path) -> list[str]:
    """The stories of a file. What follows the last mark is cut off by the sample."""
    return [story.strip() for story in path.read_text(encoding="utf-8").split(END_OF_STORY)[:-1]]


def read_stories(path: Path) -> tuple[list[str], list[str]]:
    """The stories to train on, and every twentieth, held out."""
    stories = stories_of(path)
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


class Lexicon:
    """The words of the stories that requests are made of."""

    def __init__(self, stories: Sequence[str]):
        stories_with = Counter(word for story in stories for word in set(re.findall(r"\b[a-z]{4,}\b", story)))
        self.words = {word for word, n in stories_with.items() if 3 <= n <= len(stories) // 12}
        # A word that follows "a", and perhaps an adjective, and ends its phrase is a thing.
        ends = re.compile(
            r"\ban? (?:[a-z]+ )?([a-z]{3,})(?=[.,!?]| (?:and|was|in|on|to|with|that|is|had|named|called)\b)"
        )
        things = Counter(thing for story in stories for thing in ends.findall(story))
        self.things = {thing for thing, n in things.items() if n >= 3 and not thing.endswith("s")} - NO_THINGS
        self.sorted_words, self.sorted_things = sorted(self.words | self.things), sorted(self.things)
        names = {name for story in stories for name in NAME.findall(story) if len(name) > 2}
        self.names = sorted(names.union(NAMES))


class Mixture:
    """Every story once an epoch, alone or in a dialog, with other words each time."""

    def __init__(
        self,
        stories: Sequence[str],
        lexicon: Lexicon,
        tokenizer: SentencePieceProcessor,
        context: int,
        chat_share: float,
        rng: random.Random,
    ):
        self.stories, self.lexicon, self.tokenizer, self.context = stories, lexicon, tokenizer, context
        self.chat_share, self.rng = chat_share, rng

    def epoch(self) -> list[Document]:
        return [self.dialog(s) if self.rng.random() < self.chat_share else self.plain(s) for s in self.stories]

    def plain(self, story: str) -> Document:
        ids = [self.tokenizer.bos_id(), *self.tokenizer.encode(story), self.tokenizer.eos_id()][: self.context]
        return Document(ids, [True] * len(ids))

    def dialog(self, story: str) -> Document:
        draw = self.rng.random()
        if draw < 0.05:
            return self.turn(self.folded(self.rng.choice(GREETINGS)), self.rng.choice(GREETED), last=True)
        turns = self.asking(story) if draw < 0.5 else self.telling(story)
        while len(turns) > 1 and sum(map(len, turns)) > self.context:
            turns = turns[1:] if draw >= 0.5 else turns[:-1]
        whole = Document([i for turn in turns for i in turn.ids], [i for turn in turns for i in turn.learn])
        return whole if len(whole) <= self.context else self.plain(story)

    def telling(self, story: str) -> list[Document]:
        """One request for this story, perhaps after others."""
        past = self.past() if self.rng.random() < 0.3 else []
        if past and self.rng.random() < 0.5 and (some := self.some_things(story)):
            return [*past, self.turn(self.rng.choice(ASK_AGAIN).format(some), story, last=True)]
        ask, before = self.question(story)
        return [*past, self.turn(ask if past else self.folded(ask), f"{before} {story}".strip(), last=True)]

    def asking(self, story: str) -> list[Document]:
        """A story that is told by either side, and questions about it."""
        found = questions(story, self.lexicon.things, self.rng)
        asked = self.rng.sample([(q.text, q.answer) for q in found], min(len(found), self.rng.choice((1, 2, 3, 4))))
        if self.rng.random() < 0.08:
            odd = self.rng.choice(ASK_ODD).format(*(self.babble(2) for _ in range(2)))
            asked.append((odd, self.rng.choice(NOT_TOLD)))
        if not asked:
            return self.telling(story)
        ask, before = self.question(story)
        turns = [(ask, f"{before} {story}".strip()), *asked]
        if self.rng.random() < 0.2:
            text = self.rng.choice(("{0}\n\n{1}", "{0}\n{1}", "{0} {1}", "{1}\n\n{0}")).format(story, asked[0][0])
            turns = [(text, asked[0][1]), *asked[1:]]
        turns[0] = (self.folded(turns[0][0]), turns[0][1])
        return [self.turn(user, answer, last=i + 1 == len(turns)) for i, (user, answer) in enumerate(turns)]

    def past(self) -> list[Document]:
        """One or two earlier turns, not learned; they are answered by a story, by its beginning, or by anything."""
        turns = []
        for first in [True, False][: self.rng.choice((1, 1, 2))]:
            story = self.rng.choice(self.stories)
            answer = story if self.rng.random() < 0.5 else re.split(r"(?<=\.)\s", story)[0]
            if self.rng.random() < 0.25:
                answer = self.babble(60)
            ask = self.question(story)[0]
            turn = self.turn(self.folded(ask) if first else ask, answer)
            turns.append(Document(turn.ids, [False] * len(turn)))
        return turns

    def turn(self, user: str, answer: str, last: bool = False) -> Document:
        """The library encodes a turn as one text. No piece crosses a space, so it begins with the prompt's ids."""
        prompt = f"[INST] {user.strip()} [/INST]"
        begin = 1 + len(self.tokenizer.encode(prompt))
        ids = [self.tokenizer.bos_id(), *self.tokenizer.encode(f"{prompt} {answer.strip()}")]
        learn = [False] * begin + [True] * (len(ids) - begin)
        # A past answer ends in a blank and EOS, as the format has it; that the newest one has no blank is learned.
        end = [] if last else self.tokenizer.encode(f"{prompt} {answer.strip()} ")[len(ids) - 1 :]
        return Document([*ids, *end, self.tokenizer.eos_id()], [*learn, *[False] * len(end), last])

    def folded(self, user: str) -> str:
        if self.rng.random() < 0.6:
            return user
        system = self.rng.choice(SYSTEM_PROMPTS) if self.rng.random() < 0.75 else self.babble(30)
        return f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"

    def question(self, story: str) -> tuple[str, str]:
        """What this story may be the answer to; and what is said before it."""
        pick, draw = self.rng.choice, self.rng.random()
        if draw < 0.2 and (words := sorted(self.lexicon.words.intersection(re.findall(r"[a-z]+", story)))):
            some = self.rng.sample(words, min(len(words), pick((1, 2, 3, 3, 4))))
            return pick(ASK_WORDS).format(", ".join(some)), ""
        if draw < 0.6 and (things := self.some_things(story)):
            return pick(ASK_THINGS).format(things), ""
        if draw < 0.7 and (name := NAME.search(story)):
            return pick(ASK_NAME).format(name[1]), ""
        if draw < 0.8:
            return pick(ASK_ANYTHING), ""
        before = pick(NOT_KNOWN) if self.rng.random() < 0.8 else ""
        if draw < 0.95:
            return pick(ASK_ODD).format(*(self.babble(3) for _ in range(2))), before
        return self.babble(40), before

    def some_things(self, story: str) -> str:
        """One or two things of a story, those that it often names more often."""
        things = [word for word in re.findall(r"[a-z]+", story) if word in self.lexicon.things]
        some = dict.fromkeys(self.rng.choices(things, k=self.rng.choice((1, 1, 2)))) if things else ()
        return " and ".join(map(a, some))

    def babble(self, longest: int) -> str:
        """Up to so many words, some of them none, to learn that whatever is said, the answer is a story."""
        words = []
        for _ in range(self.rng.randint(1, longest)):
            draw = self.rng.random()
            if draw < 0.55:
                word = self.rng.choice(self.lexicon.sorted_words)
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


def documents(
    stories: Sequence[str], lexicon: Lexicon, proto: bytes, context: int, chat_share: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An epoch of these stories, one document behind the other: ids, which of them are learned, and their lengths."""
    tokenizer = SentencePieceProcessor(model_proto=proto)
    made = Mixture(stories, lexicon, tokenizer, context, chat_share, random.Random(seed)).epoch()
    ids = np.concatenate([np.asarray(d.ids, np.int16) for d in made])
    learn = np.concatenate([np.asarray(d.learn, np.bool_) for d in made])
    return ids, learn, np.asarray([len(d) for d in made])
