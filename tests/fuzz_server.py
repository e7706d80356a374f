"""Bodies that nobody has thought of: the server answers each with a status of 2xx or 4xx, in the shape of OpenAI's API.

python tests/fuzz_server.py --requests 20000 --seed 1
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from serving import served

from llama import Llama

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
NUMBER = st.floats(0, 1) | st.floats(0, 1) | st.integers(-3, 30) | st.floats(-1, 3) | JSON
TEXT = st.text(max_size=20) | st.sampled_from(["Once upon", "[INST]", "<s>", "\ud800", "</s><s>", "é😀", ""])
IDS = st.lists(st.integers(-1, 2100), max_size=5)
FORM = st.sampled_from(
    [
        {"type": "json_object"}, {"type": "text"}, {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
    ]
)  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool", ""]), "content": TEXT | JSON},
    optional={"name": TEXT, "tool_calls": JSON},
)
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "temperature": NUMBER, "top_p": NUMBER, "top_k": NUMBER, "min_p": NUMBER, "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER, "frequency_penalty": NUMBER, "stop": TEXT | st.lists(TEXT, max_size=3) | JSON,
    "seed": NUMBER,
    "n": st.integers(-1, 3) | JSON, "max_tokens": st.integers(-1, 6) | JSON, "stop_token_ids": IDS | JSON,
    "logit_bias": st.dictionaries(st.integers(-1, 2100).map(str), NUMBER, max_size=3) | JSON,
    "model": st.just("demo") | TEXT | JSON,
    "stream_options": st.just({"include_usage": True}) | JSON, "return_token_ids": st.booleans() | JSON, "user": JSON,
    "regex": st.sampled_from(["[ab]+", "("]) | JSON, "choice": st.lists(TEXT, max_size=2) | JSON,
    "response_format": FORM | JSON, "tools": JSON, "tool_choice": JSON,
}  # fmt: skip


def bodies(needed: dict[str, Any], more: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Objects of which most are nearly right, and any JSON."""
    optional = {**SHARED, **more} if "stream" in more else more
    some = st.lists(st.sampled_from(sorted(optional) or ["model"]), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({**needed, **{name: optional.get(name, JSON) for name in names}})
    )
    return some | some | some | st.fixed_dictionaries({}, optional={**needed, **optional}) | JSON


FLAGS = {"stream": st.booleans() | JSON}
REQUESTS = st.one_of(
    st.tuples(
        st.just("/v1/completions"),
        bodies(
            {"prompt": TEXT | st.lists(TEXT, max_size=2) | IDS | st.lists(IDS, max_size=2)},
            {**FLAGS, "echo": st.booleans(), "logprobs": st.integers(-1, 6) | JSON, "suffix": TEXT, "best_of": JSON},
        ),
    ),
    st.tuples(
        st.just("/v1/chat/completions"),
        bodies(
            {"messages": st.lists(MESSAGE, max_size=3) | st.just([{"role": "user", "content": "Hi"}]) | JSON},
            {
                **FLAGS, "logprobs": st.booleans(), "top_logprobs": st.integers(-1, 6) | JSON,
                "add_generation_prompt": st.booleans() | JSON, "continue_final_message": st.booleans(),
            },
        ),
    ),
    st.tuples(
        st.just("/v1/embeddings"), bodies({"input": TEXT | st.lists(TEXT, max_size=2) | JSON},
          {"encoding_format": TEXT})
    ),
    st.tuples(st.just("/tokenize"), bodies({"prompt": TEXT | JSON}, {"add_special_tokens": JSON, "messages": JSON})),
    st.tuples(st.just("/detokenize"), bodies({"tokens": IDS | JSON}, {})),
)  # fmt: skip


def check(reply: httpx.Response) -> str:
    """The answer's status; AssertionError if it is not one that a client understands."""
    assert reply.status_code < 500, reply.text
    assert "Traceback" not in reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [line for line in reply.text.split("\n") if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]" or '"server_error"' not in events[-1]
        return f"{reply.status_code} stream"
    told = reply.json()
    if reply.status_code != 200:
        assert told["error"].keys() == {"message", "type", "param", "code"}
        assert told["error"]["message"]
    return str(reply.status_code)


def fuzz(llama: Llama, count: int, start: int) -> Counter[str]:
    """What was answered to `count` bodies."""
    seen: Counter[str] = Counter()
    with served(llama) as server, httpx.Client(base_url=server.url, timeout=60) as http:

        @seed(start)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(request=REQUESTS)
        def ask(request: tuple[str, Any]) -> None:
            path, body = request
            data = json.dumps(body).encode()
            seen[f"{path} {check(http.post(path, content=data, headers={'content-type': 'application/json'}))}"] += 1

        ask()
        assert http.post("/v1/completions", json={"prompt": "The", "max_tokens": 2}).status_code == 200
        assert not server.stepper.rows
        assert not llama._scheduler.rows
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    llama = Llama.build(max_seq_len=48, max_batch_size=4, device="cpu", dtype="float32")
    print(json.dumps(dict(sorted(fuzz(llama, options.requests, options.seed).items()))))


if __name__ == "__main__":
    main()
