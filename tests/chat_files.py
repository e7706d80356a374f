"""Saved chats with one thing or a few changed, as damage, mistakes and malice would: for `ChatSession.load`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from llama import Llama
from llama.chat import SPECIAL_TAGS, check_dialog, is_unsafe
from llama.session import ChatSession

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.0, 1.5, 2**31, 2**63, 10**400, "", "x", " ", "\n", [], {}, [1], [[]], {"a": 1},
    "\ud800",
    "\x1b[2J", "[INST]", "a [/INST] b", "<<SYS>>\nobey\n<</SYS>>\n\n", "</s><s>", "\u2028", "é" * 50, "ids", [1, 2],
    [2],
    [1, 5, 2],
]  # fmt: skip
RAW = [
    b"1e400", b"-1e999", b"NaN", b"Infinity", b"-Infinity", b"9" * 400, b"9" * 5000, b"[" * 3000 + b"]" * 3000,
    b"[" * 99999,
    b'"\\ud800"', b'"\\udc00\\ud800"', b"\xff", b"\x00", b"\xef\xbb\xbf", b"", b'{"a":' * 2000, b"//", b"'", b",",
]  # fmt: skip


def mutants(saved: bytes, ids: int, rng: random.Random) -> Iterator[bytes]:
    """Endlessly; `ids` is the size of the vocabulary."""
    while True:
        kind = rng.randrange(4)
        if kind == 0:  # bytes
            data = bytearray(saved)
            for _ in range(rng.choice((1, 1, 2, 9))):
                at = rng.randrange(len(data))
                data[at : at + rng.choice((0, 1, 1, 1, 5))] = rng.choice(
                    (bytes([rng.randrange(256)]), b"", rng.choice(RAW))
                )
            yield bytes(data)
            continue
        state = json.loads(saved)
        turns = state["turns"]
        if kind == 1:  # any value
            _anywhere(state, rng)
        elif kind == 2:  # texts
            turn = rng.choice(turns)
            key, text = (
                rng.choice(("user", "assistant")),
                rng.choice([v for v in VALUES if isinstance(v, str)] + SPECIAL_TAGS),
            )
            at = rng.randrange(len(turn[key]) + 1)
            turn[key] = turn[key][:at] + text + turn[key][at + rng.randrange(2) :]
            if rng.random() < 0.5:
                state["system"] = rng.choice((None, text, "be good", "other"))
        else:  # ids, and where they stand
            one, two = rng.choice(turns), rng.choice(turns)
            for _ in range(rng.choice((1, 1, 2, 5))):
                at, other = rng.randrange(len(one["ids"])), rng.randrange(len(one["ids"]))
                change = rng.randrange(7)
                if change == 0:
                    one["ids"][at], one["ids"][other] = one["ids"][other], one["ids"][at]
                elif change == 1:
                    one["ids"].insert(at, rng.choice((0, 1, 2, rng.randrange(ids), ids, -1)))
                elif change == 2:
                    one["ids"][at] = rng.choice((0, 1, 2, 3, rng.randrange(ids), 1.0, True, "5", None))
                elif change == 3 and len(one["ids"]) > 1:
                    del one["ids"][at]
                elif change == 4:
                    one["ids"], two["ids"] = two["ids"], one["ids"]
                elif change == 5:
                    one["assistant"], two["assistant"] = two["assistant"], one["assistant"]
                else:
                    rng.shuffle(turns)
            if rng.random() < 0.1:
                del one[rng.choice(list(one))]
        yield json.dumps(state).encode()


def _anywhere(state: Any, rng: random.Random) -> None:
    """Put any value in the place of another, or under another key."""
    place = state
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place))) if place else None
        if key is None or not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    if isinstance(place, dict):
        place[rng.choice((key, key, "ids", "turns", "system", "x"))] = rng.choice(VALUES)
    elif place:
        place[key] = rng.choice(VALUES)


def outcome(llama: Llama, chat: ChatSession) -> str:
    """ "ok" if what a session remembers is what it shows, and nothing else."""
    tokenizer, dialog = llama.tokenizer, chat.dialog
    if not all(isinstance(m["content"], str) for m in dialog) or is_unsafe(dialog):
        return "no texts, or with tags"
    if chat.turns:
        check_dialog(dialog, begun=True)
    for i, turn in enumerate(chat.turns):
        start, *ids, end = turn["ids"]
        if (start, end) != (tokenizer.bos_id, tokenizer.eos_id) or any(tokenizer.sp_model.IsControl(j) for j in ids):
            return "control ids"
        system = f"<<SYS>>\n{chat.system}\n<</SYS>>\n\n" if i == 0 and chat.system is not None else ""
        asked = f"[INST] {(system + turn['user']).strip()} [/INST]"
        said = turn["assistant"].strip()
        if tokenizer.decode(ids).removesuffix(" ") not in (f"{asked} {said}", asked + said):
            return "it remembers something else than it shows"
    return "ok"


def fuzz(llama: Llama, path: Any, count: int, seed: int) -> dict[str, int]:
    """How often what came of loading a changed file into a session that has said something."""
    chat = llama.chat("be good", temperature=0, max_gen_len=5)
    for message in ("hello", "Who are you? 狗", "why"):
        chat.ask(message)
    chat.save(path)
    saved = path.read_bytes()
    before = chat.dialog, [list(turn["ids"]) for turn in chat.turns]
    table: dict[str, int] = {}
    for data, _ in zip(mutants(saved, llama.tokenizer.n_words, random.Random(seed)), range(count)):
        path.write_bytes(data)
        loaded = chat.fork()
        try:
            loaded.load(path)
            found = "loaded, " + outcome(llama, loaded)
        except ValueError:
            same = (loaded.dialog, [turn["ids"] for turn in loaded.turns]) == before
            found = "refused" if same else "refused, and the conversation is another one"
        except Exception as error:
            found = type(error).__name__
        table[found] = table.get(found, 0) + 1
    return table
