"""Mutated checkpoints in bulk: what becomes of damaged files of tiny models in every format, loaded and run in a child
process.

    python tests/mutate.py --mutations 5000 --seed 1

None may answer otherwise in silence, raise anything but a ValueError that names the folder, end by a signal, or hang.
Some mutations are honest: they make a good file of another model (numbers of weights that no checksum covers, a piece
of a tokenizer, a parameter that fits), which nothing can tell.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 60  # that one mutation may take
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    64,
    2**31,
    2**63,
    10**400,
    0.5,
    1e-5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "64",
    [],
    {},
    [[1]],
]


class Mutation(NamedTuple):
    kind: str
    file: str
    data: bytes
    honest: bool = False


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(rng: random.Random, data: bytes, places: list[range]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.choice(rng.choices(places, [len(place) for place in places])[0])] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(rng: random.Random, data: bytes) -> bytes:
    """Some bytes of the file in another place of it, in place of what was there or beside it."""
    a, b, n = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice([1, 4, 16, 100, 4096])
    return data[:b] + data[a : a + n] + data[b + rng.choice([0, n]) :]


def deep(text: bytes) -> bytes:
    return b"[" * 10**5 + text


def change_json(rng: random.Random, data: bytes) -> bytes:
    """One value, key or nesting of a JSON object is another."""
    value = json.loads(data)
    inner = rng.choice([value, *(v for v in value.values() if isinstance(v, dict) and v)])
    key = rng.choice(list(inner))
    change = rng.randrange(7)
    if change <= 2:
        inner[key] = (
            rng.choice(VALUES)
            if rng.random() < 0.7 or not isinstance(inner[key], int)
            else inner[key] * rng.choice([-1, 2, 3])
        )
    elif change == 3:
        del inner[key]
    elif change == 4:
        inner[key + rng.choice("xA ")] = inner.pop(key)
    elif change == 5:
        other = rng.choice(list(inner))
        inner[key], inner[other] = inner[other], inner[key]
    text = json.dumps(value).encode()
    return text.replace(b"{", b'{"%s": 1, ' % key.encode(), 1) if change == 6 else text


def weight_bytes(data: bytes, name: str) -> tuple[list[range], list[range]]:
    """Of a file of weights: where its numbers are that no checksum covers, and all the rest."""
    from llama.weights.archive import CHECKED_BYTES

    if name.endswith(".safetensors"):
        header = 8 + int.from_bytes(data[:8], "little")
        return [range(header, len(data))], [range(header)]
    if name.endswith(".gguf"):
        infos, header = gguf_places(data)
        return [range(header, len(data))], [range(infos, header)]
    numbers = []
    for record in zipfile.ZipFile(io.BytesIO(data)).infolist():
        if "/data/" in record.filename and record.file_size > CHECKED_BYTES:
            start = record.header_offset + 30 + sum(struct.unpack("<HH", data[record.header_offset + 26 :][:4]))
            numbers.append(range(start, start + record.file_size))
    edges = [0, *(edge for r in numbers for edge in (r.start, r.stop)), len(data)]
    return numbers, [range(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]


def gguf_places(data: bytes) -> tuple[int, int]:
    """Of a GGUF file of `convert`: where its names and places of tensors begin, behind the metadata, and where they
    end."""
    from llama.weights.gguf_header import ALIGNMENT

    infos = data.index(b"token_embd.weight") - 8
    last = data.rindex(b"output.weight") + len("output.weight")
    return infos, -(-(last + 4 + 2 * 8 + 4 + 8) // ALIGNMENT) * ALIGNMENT


def change_metadata(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    """A length, count, kind, key or number of a GGUF file's metadata is another, or all of it is shifted by some
    bytes."""
    infos, _ = gguf_places(data)
    change = rng.randrange(4)
    if change == 0:  # the counts of tensors and of keys, and the version
        at, size = rng.choice([(4, 4), (8, 8), (16, 8)])
    elif change == 1:  # whatever lies in front of a name or a number
        key = rng.choice(re.findall(rb"(?:llama|general|tokenizer)\.[a-z0-9_.]+", data[:infos]))
        at, size = data.index(key) + rng.choice([-8, len(key), len(key) + 4, len(key) + 8]), 8
    elif change == 2:
        at, size = rng.randrange(24, infos), rng.choice([1, 4, 8])
    else:
        return splice(rng, data[:infos]) + data[infos:], True
    number = rng.choice([0, 1, 2, 3, 7, 64, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64)])
    return data[:at] + (number % 256**size).to_bytes(size, "little") + data[at + size :], True


def change_header(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    """The header of a safetensors file says something else, in as many bytes as it likes. Two names of one shape that
    change places are honest."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    a, b = rng.choices([name for name in header if name != "__metadata__"], k=2)
    honest, change = False, rng.randrange(5)
    if change == 0:
        header[a], header[b] = header[b], header[a]
        honest = header[a]["shape"] == header[b]["shape"]
    elif change == 1:
        header[a]["data_offsets"] = header[b]["data_offsets"]
    elif change == 2:
        header[a]["shape"] = rng.choice(
            [header[a]["shape"][::-1], [*header[a]["shape"], 1], [2**62, 4], [-1], [], "x", None]
        )
    elif change == 3:
        header[a]["dtype"] = rng.choice(["I32", "F64", "F8_E4M3", "BF16", "F16", "x", 3])
    else:
        del header[a][rng.choice(list(header[a]))]
    text = json.dumps(header).encode()
    length = rng.choice([len(text)] * 4 + [0, 2**63, len(text) + 1])
    return struct.pack("<Q", length) + text + data[8 + n :], honest


def change_pickle(rng: random.Random, data: bytes) -> bytes:
    """The pickle of a .pth file is another, with the checksum that belongs to it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        for record in source.infolist():
            part = source.read(record)
            if record.filename.endswith("data.pkl"):
                part = rng.choice([flip(rng, part, [range(len(part))]), splice(rng, part), cut(rng, part)])
            elif rng.random() < 0.02:
                continue
            archive.writestr(record.filename, part)
    return target.getvalue()


def mutations(folder: Path, rng: random.Random) -> Iterator[Mutation]:
    """For ever: each of another file of the folder, damaged in another way."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    unread = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    names = [
        name
        for name in files
        if name not in unread and name.endswith((".json", ".pth", ".bin", ".safetensors", ".model", ".gguf"))
    ]
    names = [
        name for name in names if name.startswith("adapter_")
    ] or names  # an adapter's own files, and not its base's
    names += [name for name in names if name.endswith((".pth", ".bin", ".safetensors"))]  # which have the most in them
    while True:
        name = rng.choice(names)
        data = files[name]
        if rng.random() < 0.15:
            yield Mutation("cut", name, cut(rng, data))
        elif rng.random() < 0.05:
            other = rng.choice(
                [b"", bytes(len(data)), rng.randbytes(len(data)), deep(data), data + data, *files.values()]
            )
            yield Mutation("another file", name, other)
        elif name.endswith(".json"):
            honest = "index" not in name
            if rng.random() < 0.5:
                yield Mutation("JSON value", name, change_json(rng, data), honest)
            else:
                yield Mutation(
                    "JSON bytes", name, rng.choice([splice(rng, data), flip(rng, data, [range(len(data))])]), honest
                )
        elif name.endswith(".model"):
            yield Mutation(
                "tokenizer", name, rng.choice([splice(rng, data), flip(rng, data, [range(len(data))])]), True
            )
        else:
            numbers, rest = weight_bytes(data, name)
            kind = rng.randrange(4)
            if kind == 0 and numbers:
                yield Mutation("numbers", name, flip(rng, data, numbers), True)
            elif kind == 1 and name.endswith(".safetensors"):
                yield Mutation("header", name, *change_header(rng, data))
            elif kind == 1 and name.endswith(".gguf"):
                yield Mutation("metadata", name, *change_metadata(rng, data))
            elif kind == 1:
                yield Mutation("pickle", name, change_pickle(rng, data))
            elif kind == 2:
                spliced = splice(rng, data)
                metadata = slice(rest[0].start) if name.endswith(".gguf") else slice(0)
                honest = bool(numbers) and spliced[: rest[0].stop] == data[: rest[0].stop]
                yield Mutation("splice", name, spliced, honest or spliced[metadata] != data[metadata])
            else:
                yield Mutation("flip", name, flip(rng, data, rest))


def answer(folder: Path) -> Any:
    from llama import Llama

    with contextlib.redirect_stdout(io.StringIO()):
        adapter = str(folder) if (folder / "adapter_config.json").exists() else None
        llama = Llama.build(str(folder), max_seq_len=24, max_batch_size=2, device="cpu", adapter=adapter)
        return llama.text_completion(["the tree", "a"], max_gen_len=2, temperature=0, logprobs=True, echo=True)


def outcome(folder: Path, expected: str) -> str:
    try:
        return "same" if repr(answer(folder)) == expected else "other answer"
    except ValueError as error:
        names = str(folder) in str(error) or "are not finite" in str(error)
        is_clear = type(error) is ValueError and names and len(str(error)) < 4000
        return "refused" if is_clear else f"unclear: {type(error).__name__} {str(error)[:150]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:150]}"


def work(source: str, todo: Any, done: Any) -> None:
    """One child: takes mutations of a folder, and says what became of each."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        shutil.copytree(source, folder)
        expected = repr(answer(folder))
        while (mutation := todo.recv()) is not None:
            path = folder / mutation.file
            path.unlink()  # not written over: what is loaded may still be mapped
            path.write_bytes(mutation.data)
            done.send(outcome(folder, expected))
            path.unlink()
            shutil.copyfile(Path(source) / mutation.file, path)


class Child:
    """A process that is started anew after it has died or hung."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None
        self._start()

    def _start(self) -> None:
        context = get_context("fork")
        (theirs, self.to), (self.come, back) = context.Pipe(False), context.Pipe(False)
        self.process = context.Process(target=work, args=(str(self.folder), theirs, back), daemon=True)
        self.process.start()
        back.close()

    def run(self, mutation: Mutation) -> str:
        self.to.send(mutation)
        try:
            if self.come.poll(SECONDS):
                return str(self.come.recv())
            self.process.kill()
            result = "hang"
        except EOFError:
            self.process.join()
            result = f"signal {signal.Signals(-self.process.exitcode).name}" if self.process.exitcode < 0 else "ended"
        self._start()
        return result

    def close(self) -> None:
        self.to.send(None)
        self.process.join(20)


def write_adapter(folder: Path, pickled: bool) -> None:
    """An adapter beside its base."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    shapes = {"model.embed_tokens.lora_embedding_A": (2, 400), "model.embed_tokens.lora_embedding_B": (64, 2)}
    for i in (0, 1):
        shapes |= {f"model.layers.{i}.self_attn.q_proj.lora_{x}.weight": (2, 64) if x == "A" else (64, 2) for x in "AB"}
    tensors = {f"base_model.model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"],
              "alpha_pattern": {"1.self_attn.q_proj": 3}, "rank_pattern": {}, "use_rslora": True}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_folders(root: Path) -> list[Path]:
    """A tiny model in each format: one and two shards, int8, int4, safetensors in one file and in parts; with adapters;
    GGUF in two kinds."""
    from conftest import random_weights, train_tokenizer, write_checkpoint

    from llama.commands import convert

    tokenizer = root / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer())
    weights = random_weights()
    folders = [write_checkpoint(root / "meta", weights), write_checkpoint(root / "shards", weights, 2)]
    usual = convert.PART_BYTES
    for name, options in {"int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}, "hf": {}, "parts": {}}.items():
        convert.PART_BYTES = 2**17 if name == "parts" else usual
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                convert.convert(
                    folders[0], root / name, "meta" if options else "hf", tokenizer_path=tokenizer, **options
                )
        finally:
            convert.PART_BYTES = usual
        folders.append(root / name)
    for name in ("adapter", "pickled adapter"):
        folders.append(shutil.copytree(root / "hf", root / name))
        write_adapter(folders[-1], name.startswith("pickled"))
    for folder in folders:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    for name, kind in {"gguf": None, "q8_0": "q8_0"}.items():  # the tokenizer is in the file
        convert.convert(folders[0], root / name / "model.gguf", "gguf", tokenizer_path=tokenizer, quantize=kind)
        folders.append(root / name)
    return folders


def run(
    folders: list[Path], count: int, seed: int, report: Callable[[str], None] = lambda _: None
) -> Counter[tuple[str, str, str]]:
    """(format, kind, outcome) -> how often. What is not as it should be is reported with the seed that makes it
    again."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for i, folder in enumerate(folders):
        child = Child(folder)
        source = mutations(folder, random.Random(f"{seed} {folder.name}"))
        for number in range(count * i // len(folders), count * (i + 1) // len(folders)):
            mutation = next(source)
            result = child.run(mutation)
            if result == "other answer":
                result = "another model" if mutation.honest else "SILENT"
            counts[folder.name, mutation.kind, result.split(":")[0]] += 1
            if result not in ("same", "refused", "another model"):
                report(f"{number} {folder.name}/{mutation.file} {mutation.kind}: {result}")
        child.close()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        counts = run(make_folders(Path(root)), args.mutations, args.seed, lambda line: print(line, flush=True))
    outcomes = sorted({outcome for *_, outcome in counts})
    print(f"{'':24s}" + "".join(f"{outcome:>16s}" for outcome in outcomes))
    for kind in sorted({kind for _, kind, _ in counts}):
        row = [sum(n for (_, k, o), n in counts.items() if (k, o) == (kind, outcome)) for outcome in outcomes]
        print(f"{kind:24s}" + "".join(f"{n:16d}" for n in row))
    totals = {outcome: sum(n for key, n in counts.items() if key[2] == outcome) for outcome in outcomes}
    print(
        json.dumps(
            {"mutations": args.mutations, "seed": args.seed, "seconds": round(time.perf_counter() - began), **totals}
        )
    )
    sys.exit(bool(set(outcomes) - {"same", "refused", "another model"}))


if __name__ == "__main__":
    os.environ.setdefault("LLAMA_CACHE", tempfile.mkdtemp())
    main()
