"""Questions about a story, with answers in its own words: what the demo model learns to answer, and is measured by."""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from dataclasses import dataclass

# fmt: off
PAST = {  # what somebody did -> how it is asked for
    "saw": "see", "found": "find", "got": "get", "made": "make", "lost": "lose", "took": "take", "bought": "buy",
    "heard": "hear", "had": "have", "met": "meet", "caught": "catch", "ate": "eat", "picked up": "pick up",
    "brought": "bring", "built": "build", "broke": "break", "drew": "draw", "opened": "open", "noticed": "notice",
    "wanted": "want", "loved": "love", "liked": "like", "needed": "need", "tried": "try",
}
NO_NAMES = {
    "She", "He", "They", "It", "The", "One", "But", "So", "And", "When", "Then", "We", "You", "This", "That", "There",
    "Her", "His", "As", "At", "In", "On", "Once", "After", "Every", "Suddenly", "Everyone", "Who", "What", "Let", "No",
}
# fmt: on
NAMED = re.compile(r"\b(an?) ((?:[a-z]+ ){0,2})([a-z]+) (?:named|called) ([A-Z][a-z]+)\b")
PHRASE = r"((?:an?|the|her|his|some) (?:[a-z]+,? ){0,3}?[a-z]+)(?=[.!]| (?:and|in|on|with|that|to|but)\b|, )"
DID = re.compile(rf"\b([A-Z][a-z]+) ({'|'.join(PAST)}) {PHRASE}")
WISHED = re.compile(
    r"\b([A-Z][a-z]+) (wanted|loved|liked|tried) (to [a-z][^.,!?\"]{3,40}?)(?=[.,!?]| (?:and|but|because)\b)"
)
WENT = re.compile(r"\b([A-Z][a-z]+) went ((?:back )?(?:to (?:the|her|his|a) [a-z]+|outside|inside|home))(?=[ .,!])")
FELT = re.compile(
    r"\b([A-Z][a-z]+) (was|felt) (?:very |so )?"
    r"(sad|happy|scared|angry|tired|hungry|excited|surprised|proud|lonely|curious)\b"
)


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    key: str  # the word or words that a right answer has


def questions(story: str, things: Collection[str], rng: random.Random) -> list[Question]:
    """All that the patterns find; of several places that answer the same question, the first."""
    found: dict[str, Question] = {}

    def ask(texts: tuple[str, ...], answer: str, key: str) -> None:
        question = Question(rng.choice(texts), answer, key)
        found.setdefault(texts[0], question)

    for article, kind, noun, name in NAMED.findall(story):
        called = ("What is the {}'s name?", "What was the {}'s name?", "What is the name of the {}?",
                  "What is the {} called?", "What was the name of the {}?")  # fmt: skip
        ask(tuple(text.format(noun) for text in called), f"The {noun}'s name is {name}.", name)
        ask((f"Who is {name}?", f"Who was {name}?"), f"{name} is {article} {kind}{noun}.", noun)
        about = ("Who is the story about?", "Who is in the story?", "What is the story about?")
        ask(about, f"The story is about {article} {kind}{noun} named {name}.", name)
    for name, did, what in DID.findall(story):
        if name not in NO_NAMES:
            ask((f"What did {name} {PAST[did]}?",), f"{name} {did} {what}.", what.split()[-1])
    for name, wished, what in WISHED.findall(story):
        if name not in NO_NAMES:
            ask((f"What did {name} {PAST[wished]} to do?",), f"{name} {wished} {what}.", what)
    for name, where in WENT.findall(story):
        if name not in NO_NAMES:
            ask((f"Where did {name} go?",), f"{name} went {where}.", where.split()[-1])
    for name, was, mood in FELT.findall(story):
        if name not in NO_NAMES:
            ask((f"How did {name} feel?", f"How was {name}?"), f"{name} {was} {mood}.", mood)
    words = set(re.findall(r"[a-z]+", story.lower()))
    for thing in rng.sample(here, min(2, len(here))) if (here := sorted(words.intersection(things))) else ():
        ask((f"Is there {a(thing)} in the story?", f"Was there {a(thing)}?"), f"Yes, there is {a(thing)}.", "Yes")
    for thing in rng.sample(sorted(things), min(2, len(things))):
        if thing not in words and thing + "s" not in words:
            ask((f"Is there {a(thing)} in the story?", f"Was there {a(thing)}?"), f"No, there is no {thing}.", "No")
    end = re.split(r"(?<=[.!?\"])\s+", story.strip())[-1]
    if 3 <= len(end.split()) <= 25 and end.count('"') % 2 == 0:
        ask(("How does the story end?", "How did it end?", "What happens at the end?"), end, end)
    return list(found.values())


def a(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
