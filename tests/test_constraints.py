"""Answers of a given form: what comes is of it, on every path, and what cannot be asked for is refused before any
work."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_arguments import read
from test_leading import build
from workers import Pool

from llama import Llama, Tokenizer, constraints, generation
from llama.commands import arguments, cli
from llama.constraints import Constraint
from llama.loading import DEMO
from llama.masks import Matcher, forms, matcher_of, vocabulary
from llama.sentencepieces import (
    ADD_DUMMY_PREFIX,
    BYTE,
    NORMALIZER,
    REMOVE_EXTRA_WHITESPACES,
    field,
    pieces_of,
    sentencepiece_model,
)
from llama.tokenizer import AddedToken, StreamDecoder

pytest.importorskip("llguidance")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 3, "maximum": 12}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NUMBER = {"regex": r"[A-Z][a-z]{2,5} [0-9]{3}"}
FORMS: list[tuple[dict[str, Any], str]] = [  # and what the text must match
    ({"choice": ["yes", "no", "perhaps so"]}, "yes|no|perhaps so"),
    ({"choice": [" yes", " no"]}, " yes| no"),
    ({"choice": ["🦙 é", "\n\nx|."]}, "🦙 é|\n\nx\\|\\."),
    (NUMBER, NUMBER["regex"]),
    ({"regex": "(?:  a| b|c)d"}, "(?:  a| b|c)d"),
    ({"grammar": 'start: "The " X "."\nX: "cat" | "dog"'}, r"The (cat|dog)\."),
    ({"grammar": 'root ::= "a" | "b" x\nx ::= [0-9]'}, "a|b[0-9]"),
]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=128, max_batch_size=3, device="cpu", dtype="float32")


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(("constraint", "pattern"), FORMS)
def test_the_text_matches(constraint: Any, pattern: str, echo: bool, llama: Llama) -> None:
    """To the character: behind an echoed prompt a first piece shows its space, and otherwise loses it."""
    for temperature in (0, 1.5):
        for answer in llama.text_completion(
            ["Lily"], temperature, 1.0, 40, echo=echo, constraint=constraint, n=6, seed=1
        ):
            text = answer["generation"]
            assert re.fullmatch(pattern, text.removeprefix("Lily") if echo else text)
            assert answer["finish_reason"] == "stop"


def test_json_of_schemas(llama: Llama) -> None:
    """Some of what `python tests/forms.py` runs hundreds of."""
    pytest.importorskip("jsonschema")
    import forms as many

    some = [PERSON, *many.schemas(60)[25:60:8]]
    found = many.measure(llama, some, 2, 60)
    assert (found["refused"], found["wrong"]) == ([], [])
    assert found["valid"] == found["ended"] >= found["answers"] // 2
    for empty in (True, {}, "{}"):
        assert Constraint.of({"json_schema": empty}) is not None
        assert (
            vars(Constraint.of({"json_schema": empty}))["grammar"]
            == vars(Constraint.of({"json_object": True}))["grammar"]
        )


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        # An escape is another spelling of a key, whose value then counts in place of the one that the schema wants.
        ({"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": {"const": 2}},
         ['{"a":1,"b":2}', '{"a": 1,\n  "\\n":2}'],
         ['{"a":1,"a":2}', r'{"a":1,"\u0061":2}', r'{"a":1,"\/":2}', '{"a":  1}', ' {"a":1}', '{"a":1}\n']),
        ({"const": "\x01é\n/"}, [r'"\u0001é\n/"'], ['"\x01é\\n/"']),
        ({"const": {"minProperties": 9}}, ['{"minProperties":9}'], ["{}"]),
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 0.5e1}, ["1", "5"], ["0", "6", "1.5"]),
        ({"minProperties": 2, "required": ["z"], "maxProperties": 2}, ['{"z":1,"b":1}'], ['{"z":1,"z":1}', '{"z":1}']),
    ],
)  # fmt: skip
def test_what_is_json_of_a_schema(schema: Any, good: list[str], bad: list[str], llama: Llama) -> None:
    if "properties" in schema or "required" in schema:
        schema = {"type": "object", **schema}
    [form] = forms(
        Constraint.of({"json_schema": schema}), llama.tokenizer, [llama.tokenizer.encode("x", True, False)], {2}
    )

    def takes(text: str) -> bool:
        grammar, bits = matcher_of(llama.tokenizer, form), torch.zeros(64, dtype=torch.int32)
        for token in llama.tokenizer.encode_behind(text):
            grammar.fill(bits)
            if token not in set_in(bits):
                return False
            grammar.accept(token)
        grammar.fill(bits)
        return 2 in set_in(bits)

    assert [text for text in good if not takes(text)] == []
    assert [text for text in bad if takes(text)] == []


# The bytes of ids


def tokenizers(path: str) -> Iterator[Tokenizer]:
    """With and without the space in front of a text, with runs of spaces read as one, with more ids, without byte
    pieces."""
    proto = Path(path).read_bytes()
    for settings in ((True, False), (False, False), (True, True), (False, True)):
        numbers = (ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES)
        more = b"".join(field(number, value) for number, value in zip(numbers, settings))
        yield Tokenizer(path, proto=proto + field(NORMALIZER, more))
    yield Tokenizer(path, added=[AddedToken(401, "<|end|>"), AddedToken(403, "cat"), AddedToken(300, "x")], rows=411)
    pieces = [*(piece for piece in pieces_of(proto) if piece[2] != BYTE), ("C", -999.0, 1), ("\n", -999.0, 1)]
    yield Tokenizer(
        path, proto=sentencepiece_model(pieces, bos_id=1, eos_id=2, unk_id=0, pad_id=-1, add_dummy_prefix=True)
    )


def set_in(bits: torch.Tensor) -> list[int]:
    return (bits[:, None] >> torch.arange(32) & 1).flatten().nonzero().flatten().tolist()


TEXTS = [" a", "a  b", "  the", "    e", "the man\n", "\n e", "Once", "and the"]
ODD = ["é 日", "🦙  x", "▁ a"]


@pytest.mark.parametrize("which", range(6))
def test_any_way_through_the_ids_gives_a_text(which: int, tokenizer_path: str) -> None:
    """Whatever ids are taken of those that may come, behind nothing, BOS, a text: what they decode to is one of the
    texts. Once " a" had no way: llguidance forced the piece of " a", which at the start of a text is an "a"."""
    tokenizer = list(tokenizers(tokenizer_path))[which]
    texts = TEXTS if which == 5 else TEXTS + ODD
    rng = random.Random(which)
    for before in ([], [1], tokenizer.encode("The man", True, False)):
        for text in [*texts, None]:
            constraint = Constraint.of({"choice": texts if text is None else [text]})
            [form] = forms(constraint, tokenizer, [before], {2, 17})
            for _ in range(3):
                grammar, ids, over = matcher_of(tokenizer, form), list[int](), False
                while not over:
                    forced = grammar.forced() if rng.random() < 0.5 else []
                    bits = torch.full((-(-tokenizer.n_words // 32) + 1,), -1, dtype=torch.int32)
                    grammar.fill(bits)
                    may = set_in(bits)
                    assert may, (before, text, ids)
                    assert tokenizer.nameless.isdisjoint(may)
                    assert max(may) < tokenizer.n_words
                    spaced = [i for i in may if tokenizer.piece(i)[0] == "▁"]
                    ids.append(forced[0] if forced else rng.choice(spaced if spaced and rng.random() < 0.5 else may))
                    assert ids[-1] in may
                    assert not (forced and {2, 17} & {*may})
                    over = ids[-1] in (2, 17) or grammar.ends_with(ids[-1])
                    if ids[-1] not in (2, 17):
                        grammar.accept(ids[-1])
                stream = StreamDecoder(tokenizer)
                for token in before:
                    stream.add(token)
                shown = "".join(stream.add(token) for token in ids if token not in (2, 17)) + stream.finish()
                assert shown in ([text] if text is not None else texts)


@pytest.mark.parametrize("eos", [2, 1500])
def test_ids_that_end(eos: int, llama: Llama) -> None:
    """EOS and stop ids come where an answer is whole, and only there; what cannot go on needs no step for them."""
    tokenizer = Tokenizer(str(DEMO / "tokenizer.model"))
    tokenizer.eos_id = eos
    [form] = forms(Constraint.of({"choice": ["a", "a b"]}), tokenizer, [[]], {eos, 1979, 5000})
    grammar, bits = matcher_of(tokenizer, form), torch.full((66,), -1, dtype=torch.int32)
    one, a = tokenizer.encode("a", bos=False, eos=False)[-1], 1979  # with a space, and without
    assert (tokenizer.piece(one), tokenizer.piece(a)) == ("▁a", "a")
    grammar.fill(bits)
    assert one in set_in(bits)
    assert {eos, a}.isdisjoint(set_in(bits))  # a stop id is no way to write
    assert not grammar.ends_with(one)
    grammar.accept(one)
    grammar.fill(bits)
    assert {eos, a} <= set(set_in(bits))
    assert not bits[64:].any()  # ids of the model that the tokenizer has not
    fewer = torch.zeros_like(bits[:62])
    grammar.fill(fewer)
    assert torch.equal(fewer, bits[:62])
    with pytest.raises(ValueError, match=r"^constraint: [^<]*doesn't satisfy the grammar[^<]*(<non-verbose/>)?$"):
        grammar.accept(one + 1)
    whole = llama.steps([[1]], 0, max_gen_len=9, constraint={"choice": ["a"]})
    assert [(step.token in (one, a, 100), step.finish_reason) for step in whole] == [(True, "stop")]


def test_what_cuts_an_answer(llama: Llama) -> None:
    def ask(**more: Any) -> Any:
        return llama.text_completion(["Tim"], 0, constraint={"regex": "(ab ){9}"}, **more)[0]

    assert ask() == {"generation": "ab " * 9, "finish_reason": "stop"}
    assert ask(max_gen_len=3)["finish_reason"] == "length"
    assert ask(stop="b a") == {"generation": "a", "finish_reason": "stop"}
    assert ask(stop_ids=[1979, 5], draft=True, repetition_penalty=3.0)["generation"] == "ab " * 9
    with pytest.raises(ValueError, match="the grammar of prompt 0 allows no id"):
        ask(logit_bias={i: -float("inf") for i in range(3, 2048)})


def test_the_vocabulary_goes_with_its_tokenizer(tokenizer_path: str) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    assert vocabulary(tokenizer) is vocabulary(tokenizer)
    kept = weakref.ref(vocabulary(tokenizer))
    del tokenizer
    gc.collect()
    assert kept() is None


# The ways to run


def many_ways(llama: Llama) -> list[str]:
    """Rows of several forms over fewer slots, at once, each with a seed."""

    def one(i: int) -> list[str]:
        options: dict[str, Any] = {"constraint": FORMS[i][0]} if i < len(FORMS) else {}
        found = llama.text_completion(["The dog", "Lily"], 0.2 * i, 1.0, 30, n=2, seed=[i, i + 9], **options)
        return [answer["generation"] for answer in found]

    with ThreadPoolExecutor(8) as threads:
        return [text for texts in threads.map(one, range(8)) for text in texts]


def matches(texts: list[str]) -> bool:
    return all(re.fullmatch(FORMS[i][1], text) for i in range(len(FORMS)) for text in texts[4 * i : 4 * i + 4])


def on_several(folder: str, tokenizer_path: str) -> Any:
    llama = build(folder, tokenizer_path, 2)
    led = llama.lead(lambda: many_ways(llama))
    alike = [
        llama.text_completion(["Lily"] * 3, 0.9, 1.0, 30, constraint=FORMS[i][0], seed=[i, 7, 8], n=2) for i in (0, 4)
    ]
    try:
        llama.text_completion(["Lily"], constraint={"regex": "("})
    except ValueError as error:
        return led, alike, str(error)


def test_processes_agree(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """Forms go to other processes as data; each process computes its masks alike."""
    (led, alike, refused), *others = pool.run(on_several, str(tiny), tokenizer_path)
    alone = Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu")
    assert matches(led)
    assert led == many_ways(alone)
    assert all(other == (None, alike, refused) for other in others)
    assert "unclosed group" in refused
    for i, answers in zip((0, 4), alike):
        assert answers == alone.text_completion(["Lily"] * 3, 0.9, 1.0, 30, constraint=FORMS[i][0], seed=[i, 7, 8], n=2)


def test_rows_move_between_slots(llama: Llama) -> None:
    first = many_ways(llama)
    assert matches(first)
    assert first == many_ways(llama)


@pytest.mark.parametrize("how", ["hook", "own draw", "invariant", "draft"])
def test_other_ways(how: str, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model, parts = llama.model, {"draft_model": llama.model} if how == "draft" else {}
    other = Llama(model, llama.tokenizer, batch_invariant=how == "invariant", **parts)  # type: ignore[arg-type]
    if how == "own draw":
        monkeypatch.setattr(generation, "sample_top_p", lambda probs, p: torch.multinomial(probs, 1))
    hook = model.layers[0].register_forward_hook(lambda *_: None) if how == "hook" else None
    try:
        for constraint, pattern in FORMS[:4]:
            for answer in other.text_completion(["The dog ran", "Lily"], 1.2, 1.0, 30, constraint=constraint, n=2):
                assert re.fullmatch(pattern, answer["generation"])
    finally:
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize("form", [NUMBER, {"regex": "The little (girl|dog) was very happy (and|to) [a-z]"}])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_interruption(when: str, form: Any, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the id that a row got and its matcher, also among forced ids: the matcher is made anew of the row's
    ids."""
    options: dict[str, Any] = {"max_gen_len": 30, "seed": 3, "constraint": form}
    expected = [chunk["text"] for chunk in llama.stream_text(["Tim"], **options)]
    accept, calls = Matcher.accept, 0
    prompt = [llama.tokenizer.encode("Tim", bos=True, eos=False)]
    steps, beside = iter(llama.steps(prompt, **options)), iter(llama.steps(prompt, **options))
    told = [next(steps)]
    next(beside)
    ours = llama._scheduler.rows[0].grammar  # of the row that goes on

    def interrupted(self: Matcher, token: int) -> None:
        nonlocal calls
        calls += self is ours
        if self is not ours or calls != 3:
            accept(self, token)
        elif when == "before":
            raise KeyboardInterrupt
        else:
            accept(self, token)
            raise KeyboardInterrupt

    monkeypatch.setattr(Matcher, "accept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(beside)
    monkeypatch.undo()
    told += steps
    text = llama.tokenizer.decode([step.token for step in told if step.token is not None])
    assert text == "".join(expected)


def test_chats(llama: Llama) -> None:
    """What is generated has the form; the beginning of a reply does not count, and the space behind it does."""
    dialog: Any = [{"role": "user", "content": "Hi."}]
    options: Any = {"constraint": {"choice": ["yes", " yes", "no"]}, "temperature": 1.5}
    for reply in llama.chat_completion([dialog], n=4, **options):
        assert reply["generation"]["content"] in ("yes", " yes", "no")
    begun = [*dialog, {"role": "assistant", "content": "I say"}]
    options["constraint"] = {"choice": [" yes"]}
    [reply] = llama.chat_completion([begun], continue_final_message=True, **options)
    assert reply["generation"]["content"] == " yes"
    chat = llama.chat(constraint={"choice": ["yes"]})
    assert [chat.ask("Hi."), chat.ask("Again.")] == ["yes", "yes"]
    assert "".join(chunk["text"] for chunk in chat.continue_reply(**options)) == " yes"
    assert chat.turns[-1]["assistant"] == "yes yes"


# What is refused

CHAIN = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9999)) + '\nr9999: "a"'
WRONG: list[tuple[Any, str]] = [
    *[(given, "constraint=.* must be a dict with one of the keys json_schema, json_object, regex, choice, grammar")
      for given in ({}, 3, "yes", [], {"regex": "a", "choice": ["b"]}, {"json": True}, {3: "a"})],
    *[({"choice": value}, ("choice=.* must be a list of texts that are not "
                          "empty")) for value in ([], "ab", [""], [1], None, 1)],
    *[({"json_object": value}, "json_object=.* must be True") for value in (False, {}, 1, None)],
    *[({"json_schema": value}, "json_schema=.* (is no JSON|must be a JSON Schema)")
      for value in ("{", "x", False, "[]", [], 1, None, {"const": float("nan")}, {"const": {1, 2}},
        '{"a": 1, "a": 2}')],
    ({"json_schema": {"not": {}}}, r'json_schema cannot be used: .*Unimplemented keys: \["not"\]'),
    ({"json_schema": {"oneOf": [{"minLength": 1}, {}], "x-guidance": {"coerce_one_of": True}}},
      "oneOf constraints are not"),
    ({"json_schema": {"enum": []}}, "Unsatisfiable schema"),
    *[({"json_schema": {"items": [{"anyOf": [schema]}]}}, (f"json_schema cannot be used: "
                                                          f"{message}")) for schema, message in (
        # llguidance lets these through: {"a": 1, "a": 2} has one key, and 0 was an answer.
        ({"minProperties": 3, "required": ["a"]}, "minProperties=3 counts keys, and those that are not required"),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum=0 would let this number itself through"),
        ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, ("exclusiveMaximum=-1 would let this number "
                                                                      "itself")),
    )],
    ({"regex": "("}, "regex cannot be used: .*unclosed group"), ({"regex": "a^b"}, "lookarounds not supported"),
    *[({name: value}, f"{name}=.* must be a text") for name in ("regex", "grammar") for value in (1, None, ["a"],
        b"a")],
    *[({name: "a" * 262145}, (f"{name} has 262145 characters; at most 262144 are "
                             f"read")) for name in ("regex", "grammar")],
    ({"choice": ["a" * 262144, "b"]}, "choice has 262145 characters"), ({"regex": "\ud800"}, "UTF-8 cannot encode"),
    ({"json_schema": {"const": "a" * 262144}}, "json_schema has 262157 characters"),
    ({"grammar": 'root ::= "a'}, "grammar is no GBNF"), ({"grammar": "nonsense"}, "grammar cannot be used"),
    ({"grammar": "start: <|nope|>"}, "unknown special token"),
    ({"grammar": CHAIN}, "grammar is nested too deep, or takes too much memory"),  # overflows the stack
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_is_refused(given: Any, message: str, llama: Llama) -> None:
    with pytest.raises(ValueError, match=message):
        llama.check_options({"constraint": given})


def test_compiling_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """llguidance's own limits do not hold there: 20 patterns at once took minutes."""
    monkeypatch.setattr(constraints, "SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"json_schema takes longer than 0\.5 seconds to compile; simplify it"):
        Constraint.of({"json_schema": {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}.*"} for i in range(20)]}})


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="need the package llguidance; pip install 'llguidance>=1.8'"):
        Constraint.of({"regex": "of it"})


def test_somebodys_own_tokenizer(llama: Llama) -> None:
    class Own:
        bos_id, eos_id, n_words = 1, 2, 2048

    with pytest.raises(ValueError, match=r"a constraint needs the pieces of a llama\.Tokenizer, which Own is not"):
        forms(Constraint.of({"choice": ["a"]}), Own(), [[]], ())  # type: ignore[arg-type]
    assert forms(None, Own(), [[]], ()) == [None]  # type: ignore[arg-type]


# The terminal


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--json"], {"json_object": True}), (["--regex", "a+"], {"regex": "a+"}), (["--nojson"], None), ([], None),
        (["--choice", '["a", "b"]'], {"choice": ["a", "b"]}), (["--choice=a"], {"choice": ["a"]}),
        (["--json-schema", ' {"enum": [1]}'], {"json_schema": ' {"enum": [1]}'}),
        (["--json_schema", "FILE"], {"json_schema": '{"enum": [2]}'}),
        (["--grammar", "FILE"], {"grammar": '{"enum": [2]}'}),
        (["--json", "--regex=a"], "an answer has one form; give one of --json, --regex"),
        (["--grammar", "MISSING"], "MISSING is missing"), (["--regex", "("], "unclosed group"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["chat", "complete"])
def test_the_terminals_options(
    command: str, words: list[str], expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "FILE").write_text('{"enum": [2]}\n')
    monkeypatch.chdir(tmp_path)
    if "--grammar" in words:  # what is in the file is none
        monkeypatch.setattr(arguments, "parse_options", lambda *_, **__: None)
    told = cli.COMMANDS[command].options
    args = arguments.Namespace(**{name: option.default for name, option in told.items()} | read([command, *words]))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            arguments.answers(args)
    else:
        assert arguments.answers(args).get("constraint") == expected


def test_lines_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        {"prompt": "x", "constraint": {"choice": ["p"]}},
        {"prompt": "z"},
        {"prompt": "z", "constraint": {"regex": "("}},
    ]
    Path("all").write_text("\n".join(map(json.dumps, lines)))
    Path("good").write_text("\n".join(map(json.dumps, lines[:2])))
    cli.run(["complete", "--jsonl", "good", "--choice", "q", "--device", "cpu"])
    assert [json.loads(line)["generation"] for line in capsys.readouterr().out.splitlines()] == ["p", "q"]
    with pytest.raises(ValueError, match="line 3 of all: constraint: regex cannot be used"):
        cli.run(["complete", "--jsonl", "all", "--device", "cpu"])
