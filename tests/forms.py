"""JSON by schemas of many kinds: does every answer that ends by itself parse, and is it valid?

    python tests/forms.py --schemas 100 --answers 5

The demo model answers at temperature 1; jsonschema judges. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import jsonschema

from llama import Llama

LEAVES: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 10},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "pattern": "^(red|green)( apple)?$"},
    {"type": "string", "pattern": "^[α-ω]{1,4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "email", "maxLength": 24},
    {"type": "string", "format": "time"},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"type": "integer", "exclusiveMinimum": 0, "maximum": 9},
    {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": 5},
    {"type": "number", "minimum": 0.5, "maximum": 2.5},
    {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["boolean", "null"]},
    {"enum": ["cat", "dog", 3, None, [1], {"a": "b"}]},
    {"enum": ["né", "日本", "🦙", 'say "hi"\n', "a\\b", ""]},
    {"const": {"kind": "llama", "legs": [1, 2]}},
    {"const": "straße \t/"},
]
NAMES = ["name", "größe", "the key", 'a"b', "日", "x", "x-y", "$id2"]


def one_of_many(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema of a random kind, at most `depth` levels deep."""
    if depth == 0:
        return rng.choice(LEAVES)

    def inner() -> dict[str, Any]:
        return one_of_many(rng, rng.randrange(depth))

    def some(names: list[str]) -> dict[str, Any]:
        return {name: inner() for name in names}

    names = rng.sample(NAMES, rng.randint(1, 3))
    kinds: list[dict[str, Any]] = [
        {"type": "object", "properties": some(names), "required": names, "additionalProperties": False},
        {"type": "object", "properties": some(names), "required": names[:1], "additionalProperties": False},
        {"type": "object", "properties": some(names), "required": names, "additionalProperties": inner(),
         "maxProperties": len(names)},
        {"type": "object", "patternProperties": {"^[a-z]{1,3}$": inner()}, "additionalProperties": False,
          "minProperties": 1,
         "maxProperties": 2},
        {"type": "array", "items": inner(), "minItems": 1, "maxItems": 3},
        {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2},
        {"anyOf": [inner(), inner()]},
        {"oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, "value": inner()}, "required": ["kind", "value"],
             "additionalProperties": False}
            for kind in ("a", "b")
        ]},
        {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"},
                   {"type": "array", "items": inner(), "maxItems": 2}]},
        {"allOf": [
            {"type": "object", "properties": {"a": inner()}, "required": ["a"]},
            {"type": "object", "properties": {"b": inner()}, "required": ["b"], "maxProperties": 2},
        ]},
        {"$ref": "#/$defs/node"},
        {"type": "object", "properties": {"items": {"$ref": "#/$defs/item"}}, "required": ["items"],
         "additionalProperties": False},
    ]  # fmt: skip
    return rng.choice(kinds)


DEFS = {
    "node": {
        "type": "object",
        "properties": {"value": {"enum": [1, 2, 3]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    },
    "item": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
}


def schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of each leaf one, and random ones up to three levels deep."""
    rng = random.Random(seed)
    deep = [one_of_many(rng, rng.randint(1, 3)) for _ in range(count)]
    return [{**schema, "$defs": DEFS} for schema in [*LEAVES, *deep]][:count]


def measure(llama: Llama, asked: list[dict[str, Any]], answers: int, length: int) -> dict[str, Any]:
    """How many answers ended by themselves, were valid, or were cut; and what was wrong."""
    counts: dict[str, Any] = {"answers": 0, "ended": 0, "valid": 0, "cut": {}, "refused": [], "wrong": []}
    began, tokens = time.time(), 0
    for number, schema in enumerate(asked):
        judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        options: dict[str, Any] = {
            "n": answers,
            "seed": number,
            "max_gen_len": length,
            "constraint": {"json_schema": schema},
        }
        try:
            found = llama.text_completion(["Once upon a time"], 1.0, 1.0, logprobs=True, **options)
        except ValueError as error:
            counts["refused"].append([number, str(error)[:200]])
            continue
        for answer in found:
            counts["answers"] += 1
            tokens += len(answer["tokens"])
            if answer["finish_reason"] != "stop":
                counts["cut"][number] = counts["cut"].get(number, 0) + 1
                continue
            counts["ended"] += 1
            try:
                judge.validate(json.loads(answer["generation"]))
                counts["valid"] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                counts["wrong"].append([number, answer["generation"], str(error).splitlines()[0][:200]])
    return {
        **counts,
        "schemas": len(asked),
        "max_gen_len": length,
        "tokens": tokens,
        "seconds": round(time.time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=100)
    parser.add_argument("--answers", type=int, default=5)
    parser.add_argument("--max_gen_len", type=int, default=490)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    llama = Llama.build(max_seq_len=args.max_gen_len + 16, max_batch_size=args.answers, device="cpu")
    print(
        json.dumps(measure(llama, schemas(args.schemas, args.seed), args.answers, args.max_gen_len), ensure_ascii=False)
    )


if __name__ == "__main__":
    main()
