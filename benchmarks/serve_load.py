"""A server under load, in a process of its own on this machine: many clients at once, of whom some leave and some send
rubbish.

    python benchmarks/serve_load.py --requests 10000 --clients 256 --processes 1
    python benchmarks/serve_load.py --only leaving --requests 1000
    python benchmarks/serve_load.py --only rate --ckpt_dir FOLDER --tokenizer_path tokenizer.model --clients 1,4,16

`load`: half of the clients stream, a tenth leaves early, a tenth sends what is refused; every good answer is compared
with what its prompt gives alone (greedy, float32). `leaving`: all leave early. `rate`: tokens a second of clients that
ask without a pause, beside `text_completion` with the same list (--clients 0), or of another server (--url). Prints one
JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Optional

import aiohttp
import fire

from llama import Llama
from llama.system.program import as_a_program

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the a little dog cat girl boy found red ball tree and was happy to play with her friend in park".split()
RUBBISH: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": [1, 10**9]}), ("/v1/nothing", {}),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "[INST] <<SYS>>"}]}),
    ("/v1/completions", "no JSON"),
    ("/v1/chat/completions", {"messages": [], "tools": []}), ("/v1/completions", {"prompt": ["a"] * 3000}),
]  # fmt: skip


@contextlib.contextmanager
def server(processes: int, slots: int, *options: str) -> Iterator[tuple[int, str]]:
    """Its first process and its address."""
    start = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    )
    words = [*start, "-m", "llama", "serve", "--port=0", f"--max_batch_size={slots}", "--max_waiting=100000", *options]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stderr is not None
    try:
        said = []
        for line in running.stderr:
            said.append(line)
            if " listens on " in line:
                break
        else:
            raise RuntimeError(f"the server ended before it listened:\n{''.join(said)}")
        url = said[-1].split()[-1]
        threading.Thread(
            target=lambda: [None for _ in running.stderr or ()], daemon=True
        ).start()  # nobody reads its log
        yield _first_process(running.pid, processes), url
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(60)


def _first_process(pid: int, processes: int) -> int:
    if processes == 1:
        return pid
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"\0RANK=0\0" in (folder / "environ").read_bytes():
                return int(folder.name)
    raise RuntimeError("torchrun has started no process")


def resources(pid: int) -> dict[str, int]:
    """Resident megabytes, threads and descriptors of a process."""
    folder = Path(f"/proc/{pid}")
    pages = int((folder / "statm").read_text().split()[1])
    return {
        "MB": pages * 4096 // 10**6,
        "threads": len(list((folder / "task").iterdir())),
        "fds": len(list((folder / "fd").iterdir())),
    }


async def events(reply: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """A stream's events."""
    async for line in reply.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


class Load:
    """The clients of one run, and what they saw."""

    def __init__(self, url: str, seed: int, rubbish: float = 0.1, leave: float = 0.1) -> None:
        """rubbish, leave: the shares of those that send what is refused, and of those that leave early."""
        self.url, self.rng, self.rubbish, self.leave = url, random.Random(seed), rubbish, leave
        self.seen: Counter[str] = Counter()
        self.answers: dict[str, set[str]] = {}
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.tokens = 0

    def body(self) -> dict[str, Any]:
        """A prompt, and how many ids are to follow: both decide the answer."""
        prompt = "Once upon a time " + " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randint(1, 12)))
        return {"prompt": prompt, "max_tokens": self.rng.randint(4, 40), "temperature": 0}

    async def ask(self, session: aiohttp.ClientSession) -> None:
        """One request."""
        kind = self.rng.random()
        if kind < self.rubbish:
            path, rubbish = self.rng.choice(RUBBISH)
            data = rubbish if isinstance(rubbish, str) else json.dumps(rubbish)
            async with session.post(self.url + path, data=data, headers={"content-type": "application/json"}) as reply:
                await reply.read()
                self.seen[f"rubbish {reply.status}"] += 1
            return
        body, leaves, streams = self.body(), kind < self.rubbish + self.leave, self.rng.random() < 0.5
        if leaves:
            with contextlib.suppress(asyncio.TimeoutError):
                timeout = aiohttp.ClientTimeout(total=self.rng.uniform(0.001, 0.5))
                async with session.post(
                    f"{self.url}/v1/completions", json={**body, "stream": streams}, timeout=timeout
                ) as reply:
                    await reply.content.readany()
            self.seen["left"] += 1
            return
        last = time.perf_counter()
        async with session.post(f"{self.url}/v1/completions", json={**body, "stream": streams}) as reply:
            if reply.status != 200:
                self.seen[f"failed {reply.status}"] += 1
                return
            if streams:
                text, first = "", True
                async for event in events(reply):
                    now = time.perf_counter()
                    (self.firsts if first else self.gaps).append(now - last)
                    first, last = False, now
                    text += event["choices"][0]["text"] if "choices" in event else f"ERROR {event}"
            else:
                told = await reply.json()
                text = told["choices"][0]["text"]
                self.tokens += told["usage"]["completion_tokens"]
        self.seen["streamed" if streams else "whole"] += 1
        self.answers.setdefault(json.dumps(body), set()).add(text)

    async def run(self, count: int, clients: int) -> float:
        """`count` requests of `clients` clients. -> seconds"""
        left = iter(range(count))
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        ) as session:

            async def client() -> None:
                for _ in left:
                    await self.ask(session)

            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            return time.perf_counter() - began


def at(values: list[float], share: float) -> float:
    return round(sorted(values)[min(int(share * len(values)), len(values) - 1)], 4) if values else 0.0


def load(requests: int, clients: int, processes: int, slots: int, seed: int, *shares: float) -> dict[str, Any]:
    """Many clients of all kinds over the demo model. shares: see `Load`."""
    options = ("--device=cpu", "--dtype=float32")
    with server(processes, slots, *options) as (pid, url):
        asyncio.run(Load(url, seed).run(200, 8))
        before = resources(pid)
        run = Load(url, seed + 1, *shares)
        seconds = asyncio.run(run.run(requests // 2, clients))
        middle = resources(pid)
        seconds += asyncio.run(run.run(requests - requests // 2, clients))
        time.sleep(3)
        after = resources(pid)
        numbers = urllib.request.urlopen(f"{url}/metrics").read().decode()
    running = [line for line in numbers.splitlines() if line.startswith("llama_answers_")]
    return {
        "requests": requests, "clients": clients, "processes": processes, "slots": slots, "seconds": round(seconds, 1),
        "seen": dict(sorted(run.seen.items())), "different_prompts": len(run.answers), "wrong": compare(run.answers),
        **{f"first_{name}_s": at(run.firsts, share) for name, share in (("median", 0.5), ("99", 0.99))},
        **{f"gap_{name}_s": at(run.gaps, share) for name, share in (("median", 0.5), ("99", 0.99))},
        "before": before, "middle": middle, "after": after, "left": running,
    }  # fmt: skip


def compare(answers: dict[str, set[str]]) -> list[dict[str, Any]]:
    """The prompts that had an answer which is not the one that Python gives."""
    llama = Llama.build(device="cpu", dtype="float32")
    groups: dict[int, list[str]] = {}
    for body in map(json.loads, answers):
        groups.setdefault(body["max_tokens"], []).append(body["prompt"])
    wrong = []
    for length, prompts in groups.items():
        for prompt, whole in zip(prompts, llama.text_completion(prompts, 0, max_gen_len=length, echo=True)):
            told = answers[json.dumps({"prompt": prompt, "max_tokens": length, "temperature": 0})]
            expected = whole["generation"][len(prompt) :]
            if told != {expected}:
                wrong.append({"prompt": prompt, "expected": expected, "told": sorted(told)})
    return wrong


def rate(
    clients: list[int], requests: int, new_tokens: int, slots: int, url: Optional[str], options: dict[str, Any]
) -> dict[str, Any]:
    """Tokens a second, for each number of clients that ask without a pause. 0: of `text_completion`, in this
    process."""
    rng = random.Random(5)
    prompts = ["Once upon a time " + " ".join(rng.choice(WORDS) for _ in range(24)) for _ in range(requests)]
    bias = {"2": -100}  # no answer ends by itself
    bodies = [{"prompt": p, "max_tokens": new_tokens, "temperature": 0, "logit_bias": bias} for p in prompts]

    async def ask(address: str, number: int, bodies: list[dict[str, Any]] = bodies) -> float:
        left = iter(bodies)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def client() -> int:
                written = 0
                for body in left:
                    async with session.post(f"{address}/v1/completions", json=body) as reply:
                        written += (await reply.json())["usage"]["completion_tokens"]
                return written

            began = time.perf_counter()
            written = sum(await asyncio.gather(*(client() for _ in range(number))))
            return written / (time.perf_counter() - began)

    told: dict[str, Any] = {"requests": requests, "new_tokens": new_tokens, "slots": slots}
    if 0 in clients:
        llama = Llama.build(**options, max_batch_size=slots, max_seq_len=512)
        for _ in range(2):  # the second time all is warm
            began = time.perf_counter()
            llama.text_completion(prompts, 0, max_gen_len=new_tokens, logit_bias={2: -100})
            told["text_completion"] = round(requests * new_tokens / (time.perf_counter() - began), 1)
        clients = [number for number in clients if number]
    if clients:
        own = [f"--{name}={value}" for name, value in options.items()]
        place = contextlib.nullcontext((0, url)) if url else server(1, slots, "--max_seq_len=512", *own)
        with place as (_, address):
            asyncio.run(ask(address, 4, bodies[:16]))
            told |= {f"{number}_clients": round(asyncio.run(ask(address, number)), 1) for number in clients}
    return told


def main(
    only: str = "load",
    requests: int = 10_000,
    clients: Any = 256,
    processes: int = 1,
    slots: int = 32,
    seed: int = 1,
    new_tokens: int = 64,
    url: Optional[str] = None,
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    dtype: Optional[str] = None,
    compile: Optional[bool] = None,
) -> None:
    if only in ("load", "leaving"):
        shares = (0.0, 1.0) if only == "leaving" else ()
        print(json.dumps({"part": only, **load(requests, clients, processes, slots, seed, *shares)}))
        return
    given = {"ckpt_dir": ckpt_dir, "tokenizer_path": tokenizer_path, "dtype": dtype, "compile": compile}
    options = {name: value for name, value in given.items() if value is not None}
    several = list(clients) if isinstance(clients, (list, tuple)) else [clients]
    print(json.dumps({"part": only, **rate(several, requests, new_tokens, slots, url, options)}))


if __name__ == "__main__":
    with as_a_program(main):  # a misspelt flag is refused before hours of work
        fire.Fire(main)
