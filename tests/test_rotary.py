"""Scaled rotary positions, of each kind and in both generations of config.json: against transformers on the same
files."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import events
import pytest
import torch
from conftest import PARAMS, random_weights, write_checkpoint
from emulated_cuda import emulated
from helpers import SHAPE, command, watch_prefill, write_twin
from workers import Pool

from llama import Llama, ModelArgs, Transformer
from llama.commands import cli
from llama.decoding import compiled, engine
from llama.decoding.calls import Call, Source
from llama.decoding.requests import Request
from llama.decoding.sampling import Sampling
from llama.model import check_args, precompute_freqs_cis
from llama.rotary import RotaryScaling, scaled_freqs_cis
from llama.weights.checkpoint import open_checkpoint
from llama.weights.huggingface import read_config
from llama.weights.meta import read_params

transformers = pytest.importorskip("transformers")

TRAINED, COLUMNS, BASE = 32, 128, 5000.0
# The settings, and max_position_embeddings.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"type": "linear", "factor": 4.0}, TRAINED),
    "dynamic": ({"type": "dynamic", "factor": 4.0}, TRAINED),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}, COLUMNS),
    "yarn with all": ({
        "rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 16, "beta_fast": 8, "beta_slow": 0.5,
        "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False,
    }, COLUMNS),
    "yarn's factor": ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8, "beta_fast": None}, TRAINED),
    "llama3": ({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    }, COLUMNS),
}  # fmt: skip


def stated(generation: int, settings: dict[str, Any], positions: int) -> dict[str, Any]:
    """What a config.json says of positions: before transformers 5 and since."""
    known = {"max_position_embeddings": positions}
    if generation == 4:
        return {**known, "rope_theta": BASE, "rope_scaling": settings}
    return {**known, "rope_parameters": {"rope_theta": BASE, **settings}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> Path:
    """A model with queries and keys large enough that their angles matter."""
    folder = write_twin(tmp_path_factory.mktemp("rotary") / "plain", {"initializer_range": 0.2})
    shutil.copy(tokenizer_path, folder)
    return folder


def scaled(plain: Path, name: str, generation: int = 5) -> Path:
    """The same weights with scaled positions."""
    folder = plain.parent / f"{name} {generation}"
    if not folder.exists():
        folder.mkdir()
        for file in ("model.safetensors", "tokenizer.model"):
            os.link(plain / file, folder / file)
        config = json.loads((plain / "config.json").read_text())
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps({**config, **stated(generation, *KINDS[name])}))
    return folder


def build(folder: Path, rows: int = 4, **options: Any) -> Llama:
    return endless(Llama.build(str(folder), None, COLUMNS, rows, device="cpu", **options))


def endless(llama: Llama) -> Llama:
    """It does not stop: random weights may choose any id."""
    llama.tokenizer.eos_id, llama.tokenizer.other_stops = -1, frozenset()
    return llama


def written(llama: Llama, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    """What it writes behind prompts that run beside each other, more than there are slots; greedily unless asked."""
    found: list[list[int]] = [[] for _ in prompts]
    for step in llama.steps(prompts, max_gen_len=new, temperature=0, **options):
        found[step.index] += [] if step.token is None else [step.token]
    return found


def of_length(length: int) -> list[int]:
    return [1, *torch.randint(3, 400, (length - 1,), generator=torch.Generator().manual_seed(length)).tolist()]


def forget(model: Any) -> None:
    """With "dynamic", a model of transformers remembers the longest text so far."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@torch.inference_mode()
def theirs(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What transformers writes, greedily, behind each prompt alone."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    found = []
    for prompt in prompts:
        forget(model)
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found.append(ids[0, len(prompt) :].tolist())
    return found


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
@pytest.mark.parametrize("generation", [4, 5])
@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_logits_are_those_of_transformers(name: str, generation: int, plain: Path) -> None:
    """Before and behind the trained length, read at once and in two passes. Plain positions are far off."""
    folder = scaled(plain, name, generation)
    llama = build(folder)
    for length in (20, TRAINED, TRAINED + 1, 70, COLUMNS):
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        ids = torch.tensor([of_length(length), of_length(length)[::-1]])
        expected = model(ids).logits
        torch.testing.assert_close(llama.model(ids, 0), expected, atol=1e-4, rtol=0)
        first = length // 2
        forget(model)
        cache = model(ids[:, :first]).past_key_values
        rest = model(ids[:, first:], past_key_values=cache).logits
        llama.model(ids[:, :first], 0)
        torch.testing.assert_close(llama.model(ids[:, first:], first), rest, atol=1e-4, rtol=0)
        llama.model(ids[:, :first], 0)
        apart = llama.model(ids[:, first:], torch.tensor([first, first]))
        torch.testing.assert_close(apart, rest, atol=1e-4, rtol=0)
    llama.model.freqs_cis = precompute_freqs_cis(8, 2 * COLUMNS, BASE)
    assert (llama.model(ids, 0) - expected).abs().max() > 0.1


LENGTHS = (8, TRAINED - 2, 50, TRAINED, TRAINED + 1, 70, 5)


@pytest.mark.parametrize("name", KINDS)
def test_greedy_ids_are_those_of_transformers(name: str, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts that run beside each other, more than there are slots; read in pieces; in Meta's way; with guesses;
    and in shapes that do not depend on neighbours."""
    folder, prompts = scaled(plain, name, 4), [of_length(length) for length in LENGTHS]
    expected, llama = theirs(folder, prompts, 12), build(folder)
    assert written(llama, prompts, 12) == expected
    if name not in ("dynamic", "yarn with all"):
        return  # all others are tables as well
    assert written(llama, prompts, 12) == expected  # now some prefixes are held
    monkeypatch.setattr(engine, "CHUNK", 16)
    monkeypatch.setattr(engine, "PASS", 16)
    llama.forget()
    assert written(llama, prompts[::-1], 12) == expected[::-1]
    handle = llama.model.layers[0].register_forward_hook(lambda *_: None)
    assert written(llama, prompts, 12) == expected
    handle.remove()
    assert written(llama, prompts, 12, draft=True) == expected
    assert written(build(folder, batch_invariant=True), prompts, 12) == expected


def test_what_runs_beside_a_request_changes_nothing(plain: Path) -> None:
    """Prompts on both sides of the trained length come, are read in pieces, cancelled and left. With "dynamic" the keys
    of a long prompt are turned by its own length, so no other row may begin with them."""
    folder = scaled(plain, "dynamic")
    found = events.run(build(folder), events.Alone(build(folder, rows=1)), 150, 1)
    assert found["texts"] > 25


def test_who_shares_under_dynamic_scaling(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of a prompt within the trained length is shared; of a longer one nothing, on either side."""
    llama = build(scaled(plain, "dynamic"))
    read = watch_prefill(llama._engine, monkeypatch, lambda prompts, start: ([len(ids) for ids in prompts], start))
    long, short = of_length(60), of_length(60)[:TRAINED]
    for prompt in (short, long, long, [*short[:-1], 7], [*long, 8]):
        llama.generate([prompt], 3, temperature=0)
    # 31 ids are fewer than are worth sharing for a request that goes on with nothing.
    assert read == [([TRAINED], 0), ([60], 0), ([60], 0), ([TRAINED], 0), ([61], 0)]
    read.clear()
    llama.generate([long, [*long, 9], short, [*long, 9, 10]], 3, temperature=0)
    assert sorted(read) == [([TRAINED], 0), ([60], 0), ([61], 0), ([62], 0)]
    # A request that goes on with a chat shares whatever there is; the ids of the long prompts stand in the slots no
    # more.
    read.clear()
    llama.forget()
    for prompt in (long, short[:20], [*short[:15], 9], long):
        list(Call(llama._scheduler, [Request(prompt, 3, Sampling(0), least_shared=1)], Source(1)))
    assert read == [([60], 0), ([20], 0), ([16], 15), ([60], 0)]
    read.clear()
    beside = [Request(prompt, 3, Sampling(0), least_shared=1) for prompt in (long, [*long[:10], 9])]
    llama.forget()
    list(Call(llama._scheduler, beside, Source(2)))
    assert sorted(read) == [([11], 0), ([60], 0)]


@torch.inference_mode()
def test_guesses_turn_as_tokens_that_come_alone(plain: Path) -> None:
    """Transformers turns the tokens of one pass by the length that it reaches, but guesses stand for steps of one
    token."""
    step, ids = build(scaled(plain, "dynamic"), rows=1)._engine, of_length(50)
    list(step.prefill([ids[:40]], [0], pass_length=40))
    alone = [step.decode(torch.tensor(ids[at : at + 1]), [at]).clone() for at in range(40, 50)]
    torch.testing.assert_close(step.verify([ids[40:]], [40])[0], torch.cat(alone), atol=1e-4, rtol=0)


def answers(folder: str, prompts: list[list[int]], processes: int) -> tuple[torch.Tensor, list[list[int]]]:
    llama = endless(Llama.build(folder, None, COLUMNS, 4, processes, device="cpu"))
    with torch.inference_mode():
        return llama.model(torch.tensor([of_length(100)]), 0), written(llama, prompts, 8)


def test_several_processes(plain: Path, pool: Pool) -> None:
    prompts, folder = [of_length(length) for length in (TRAINED - 2, 70, 50)], str(scaled(plain, "dynamic"))
    logits, ids = answers(folder, prompts, 1)
    for others, theirs in pool.run(answers, folder, prompts, 2):
        torch.testing.assert_close(others, logits, atol=1e-4, rtol=0)
        assert theirs == ids


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_recorded_steps(kind: str, tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the emulated GPU, from Meta's format: steps that are recorded and queued ahead, among prompts that come."""
    settings = {"type": kind, "factor": 4.0, "original_max_position_embeddings": TRAINED}
    folder = write_checkpoint(tmp_path, random_weights(), params={**PARAMS, "rope_scaling": settings})
    shutil.copy(tokenizer_path, folder)
    prompts = [of_length(length) for length in LENGTHS]
    expected = written(build(folder, compile=False), prompts, 30)
    monkeypatch.setattr(compiled, "LEAST_COLUMNS", 32)
    with emulated() as machine:
        llama = endless(Llama.build(str(folder), None, COLUMNS, 4, device="emulated"))
        assert written(llama, prompts, 30) == expected
        assert machine.replays > 50
    assert not machine.violations


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_convert_there_and_back(name: str, plain: Path, tmp_path: Path) -> None:
    """Through Meta's format, whose params.json has a key of ours: the same scaling, and the same logits by
    transformers."""
    folder = scaled(plain, name, 4)
    command("convert", str(folder), str(tmp_path / "meta"), to="meta")
    command("convert", str(tmp_path / "meta"), str(tmp_path / "hf"), to="hf")
    first = read_config(folder)[0]
    for args in (read_params(tmp_path / "meta"), read_config(tmp_path / "hf")[0]):
        assert args.rope_scaling == first.rope_scaling
        assert args.rope_theta == first.rope_theta == BASE
    models = [transformers.LlamaForCausalLM.from_pretrained(place) for place in (folder, tmp_path / "hf")]
    for length in (TRAINED, 100):
        expected, found = (model(torch.tensor([of_length(length)])).logits for model in models)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_gguf_tells_it_too(name: str, plain: Path, tmp_path: Path) -> None:
    """What llama.cpp computes is written there, and read as it is in the folder; the rest is refused."""
    folder, path = scaled(plain, name, 4), tmp_path / "a.gguf"
    arguments = ["convert", str(folder), str(path), "--to=gguf", "--dtype=float32"]
    if name in ("dynamic", "yarn with all"):
        with pytest.raises(
            ValueError, match=rf"scaled \({name.split()[0]}.*which llama.cpp does not compute; use to='hf'"
        ):
            cli.run(arguments)
        assert not list(tmp_path.iterdir())
        return
    cli.run(arguments)
    ids = torch.tensor([of_length(100)])
    first, again = (build(place, rows=1).model for place in (folder, path))
    torch.testing.assert_close(again(ids, 0), first(ids, 0), atol=1e-5, rtol=0)
    command("convert", str(path), str(tmp_path / "hf"), to="hf")
    torch.testing.assert_close(build(tmp_path / "hf", rows=1).model(ids, 0), first(ids, 0), atol=1e-5, rtol=0)
    before, after = (open_checkpoint(place).args.rope_scaling for place in (folder, path))
    assert before is not None
    assert after is not None
    assert (after.kind, after.factor, after.positions) == (before.kind, before.factor, before.positions)


@pytest.mark.parametrize(
    ("settings", "positions", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, 4096, 16384),  # vicuna-7b-v1.5-16k, chinese-alpaca-2-7b-16k
        ({"type": "linear", "factor": 8.0}, 4096, 32768),  # longchat-7b-v1.5-32k, LongLoRA
        ({"type": "linear", "factor": 8.0}, 32768, 32768),  # LLaMA-2-7B-32K states those after
        ({"type": "linear", "factor": 3.0}, 100000, 100000),
        ({"type": "linear", "factor": 3.0}, 10000, 10000),
        ({"type": "linear", "factor": 1e4}, 4097, 4097),
        ({"type": "dynamic", "factor": 2.0}, 4096, 8192),
        ({"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "finetuned": True}, 131072, 131072),
        ({"type": "yarn", "factor": 4.0}, 4096, 16384),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 8192, 16384),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
          "original_max_position_embeddings": 8192}, 131072, 131072),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}, 8192, 65536),
        ({"type": "default"}, 2048, 2048),
        ({"type": "linear", "factor": 1.0}, 2048, 2048),
    ],
)  # fmt: skip
def test_positions_by_the_folders_own_figures(
    settings: dict[str, Any],
    positions: int,
    expected: int,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llama.commands.convert import meta_params
    from llama.loading import trained_positions
    from llama.weights.rope import rope_settings, stated_positions

    config = {**json.loads((plain / "config.json").read_text()), "rope_theta": 10000.0}
    del config["rope_parameters"]
    config |= {"rope_scaling": settings, "max_position_embeddings": positions}
    checkpoint = open_checkpoint(write_config(shutil.copytree(plain, tmp_path / "hf"), config))
    assert trained_positions(checkpoint) == expected
    scaling = checkpoint.args.rope_scaling
    assert (scaling is None) == (settings["type"] == "default" or settings["factor"] == 1)
    if scaling is not None:  # what convert writes says the same
        again = {
            **config,
            "rope_scaling": rope_settings(scaling),
            "max_position_embeddings": stated_positions(scaling, 1e4),
        }
        assert read_config(write_config(tmp_path, again))[0].rope_scaling == scaling
        (tmp_path / "params.json").write_text(json.dumps(meta_params(checkpoint.args)))
        assert read_params(tmp_path).rope_scaling == scaling


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_warning_beyond_what_a_folder_was_made_for(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = scaled(plain, "linear")
    with pytest.warns(UserWarning, match="max_seq_len=129 goes beyond the 128 positions that the model was trained on"):
        Llama.build(str(folder), None, 129, 1, device="cpu")
    assert Llama.build(str(folder), None, max_batch_size=1, device="cpu").model.params.max_seq_len == 128
    with pytest.warns(UserWarning, match="max_seq_len=65 goes beyond the 64"):
        Llama.build(str(plain), None, 65, 1, device="cpu")
    command("info", str(folder))
    assert "rotary base 5000, positions scaled (linear, factor 4) from 32 to 128" in capsys.readouterr().out


def test_a_draft_model_has_its_scaled_positions(plain: Path, tmp_path: Path) -> None:
    """It was refused for max_seq_len above the positions that it was first trained for. Greedy ids stay what they
    are."""
    for name in ("linear", "dynamic"):
        folder = scaled(plain, name)
        guessing = build(folder, draft=str(folder))
        right = events.insist(guessing)
        prompts = [of_length(length) for length in LENGTHS]
        assert written(guessing, prompts, 25) == written(build(folder), prompts, 25)
        assert sum(right) > 0.5 * len(right)
    with pytest.raises(ValueError, match="was made for 64 positions, but max_seq_len is 128"):
        Llama.build(str(scaled(plain, "yarn")), None, COLUMNS, 1, device="cpu", draft=str(plain))


@torch.inference_mode()
def test_a_table_of_somebodys_own(plain: Path) -> None:
    """It runs, also where dynamic scaling would have rotations of its own."""
    model = build(scaled(plain, "dynamic"), rows=1).model
    ids = torch.tensor([of_length(100)])
    table = model.freqs_cis
    model.freqs_cis = precompute_freqs_cis(8, len(table), 30.0)
    other = model(ids, 0)
    model.params = replace(model.params, rope_scaling=None)
    assert torch.equal(model(ids, 0), other)
    model.params = replace(model.params, rope_scaling=RotaryScaling("dynamic", 4.0, TRAINED))
    model.freqs_cis = table
    assert (model(ids, 0) - other).abs().max() > 0.1


# Damaged settings

JUNK = [None, 0, -1, 0.5, 1, 1.0, 2, 7, 1e9, float("nan"), float("inf"), True, False, "4", "linear", "yarn", "longrope",
        "proportional", "default", [], [4], {}, {"a": 1}, 10**30]  # fmt: skip
KEYS = [
    "type", "rope_type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale",
    "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "rope_theta", "partial_rotary_factor", "x",
]  # fmt: skip
OUTSIDE = ["max_position_embeddings", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor"]


def test_damaged_settings(tmp_path: Path) -> None:
    """Each is one ValueError, or turns as transformers does. Where that fails, so do we."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def turned() -> torch.Tensor:
        config, tables = transformers.AutoConfig.from_pretrained(tmp_path), []
        for length in (20, 100):
            cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
            tables.append(torch.complex(cos[0, :, :4], sin[0, :, :4]))
        return torch.cat(tables)

    def ours() -> torch.Tensor:
        args = read_config(tmp_path)[0]
        check_args(args, 1, tmp_path)
        theta, scaling = args.rope_theta, args.rope_scaling
        if scaling is None:
            return torch.cat([precompute_freqs_cis(8, length, theta) for length in (20, 100)])
        return torch.cat([scaled_freqs_cis(8, 0, length, theta, scaling, length) for length in (20, 100)])

    transformers.logging.set_verbosity_error()
    refused = ran = 0
    for seed in range(150):
        rng = random.Random(seed)
        settings, positions = rng.choice(list(KINDS.values()))
        settings, outside = dict(settings), dict[str, Any]()
        for _ in range(rng.choice([1, 1, 2])):
            key, kind = rng.choice([*KEYS, "factor", "factor", *settings]), rng.random()
            if kind < 0.2:
                settings.pop(key, None)
            elif kind < 0.3:
                outside[rng.choice(OUTSIDE)] = rng.choice(JUNK)
            else:
                settings[key] = rng.choice(JUNK)
        config = {**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                  **stated(rng.choice([4, 5]), settings, positions), **outside}  # fmt: skip
        write_config(tmp_path, config)
        try:
            found = ours()
        except ValueError:
            refused += 1
            continue
        torch.testing.assert_close(found, turned(), atol=1e-4, rtol=0)
        ran += 1
    transformers.logging.set_verbosity_warning()
    assert min(refused, ran) > 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "longrope", "factor": 2.0}, r"scaled \('longrope'\), which is not computed; only linear, dynamic"),
        ({"rope_type": "proportional"}, "'proportional'.*which is not computed"),
        ({"rope_type": None, "type": "linear"}, "scaled .None., which"),
        ({"rope_type": ["linear"]}, "which is not computed"),
        ([4], "which is not computed"),
        ({"type": "linear"}, "factor=None is not a number from 1 to 10000"),
        ({"type": "yarn", "factor": 0.5, "beta_slow": "1"}, "factor=0.5 is not .*, beta_slow='1' is not a number"),
        ({"type": "yarn", "factor": 2, "truncate": None}, "truncate=None is neither true nor false"),
        ({"type": "llama3", "factor": 8}, "low_freq_factor=None is not .*, high_freq_factor=None is not a number"),
        ({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}, ("high_freq_factor=4 is not "
                                                                                       "above")),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "rotary positions of several kinds"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "only a part .0.5. of each head"),
    ],
)  # fmt: skip
def test_settings_that_are_not_computed(settings: Any, message: str, tmp_path: Path) -> None:
    for key, positions in product(("rope_scaling", "rope_parameters"), (64, 2**15)):
        config = {
            **SHAPE,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": positions,
            key: settings,
            "hidden_act": "relu",
        }
        with pytest.raises(ValueError, match=message + ".*hidden_act"):  # all reasons come at once
            read_config(write_config(tmp_path, config).resolve())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"rope_scaling=\[\] has no type of linear, dynamic, yarn, llama3"),
        ({"type": "longrope"}, "has no type of"),
        (
            {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 3},
            "or other keys than",
        ),
        ({"type": "linear", "factor": 2.0}, "original_max_position_embeddings=None is not a whole number"),
        (
            {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 32, "positions": 0},
            "positions=0 is not",
        ),
        (
            {"type": "yarn", "original_max_position_embeddings": 32, "beta_fast": None},
            "factor=None .*, beta_fast=None is not",
        ),
    ],
)
def test_damaged_params(settings: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, "rope_scaling": settings, "use_scaled_rope": True}))
    with pytest.raises(ValueError, match=f"use_scaled_rope.*{message}.*Llama 3"):
        read_params(tmp_path)


def test_shapes_that_no_scaling_fits() -> None:
    scaling = RotaryScaling("dynamic", 2.0, 32)
    for change in ({"dim": 16}, {"rope_theta": 1.0}):
        args = ModelArgs(**{**PARAMS, "vocab_size": 400, "rope_scaling": scaling, **change})
        with pytest.raises(ValueError, match="scaled rotary positions need heads of 4 or more, not .* above 1"):
            Transformer(args)
    Transformer(ModelArgs(**{**PARAMS, "vocab_size": 400, "rope_scaling": scaling, "dim": 32, "rope_theta": 1.5}))


def test_yarns_bounds_lie_within_a_head() -> None:
    """With base 10, a number turns once within 4096 positions at 11.3 of 8; the last one, 7, bounds it."""
    scaling = RotaryScaling("yarn", 4.0, 4096, beta_fast=652.0, beta_slow=1.0)
    plain = 10.0 ** -(torch.arange(4) / 4)
    kept = 1 - torch.arange(4) / 7
    found = scaling.frequencies(8, 10.0, torch.arange(3))
    torch.testing.assert_close(found, plain / 4 * (1 - kept) + plain * kept)


def test_numbers_that_every_rule_needs() -> None:
    numbers = {"factor": None, "original_max_position_embeddings": None, "beta_fast": None, "beta_slow": None}
    with pytest.raises(ValueError, match=".*".join(f"{key}=None is not a" for key in numbers)):
        RotaryScaling("linear", **numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numbers", "kept"),
    [
        ({"beta_fast": 100.0, "beta_slow": 100.0, "truncate": False}, 7),  # turns so often at 6.5 of 16
        ({"beta_fast": 1000.0, "beta_slow": 655.0}, 1),  # both before the first: rounded, one is the first itself
    ],
)
def test_yarns_bounds_may_be_one(numbers: dict[str, Any], kept: int) -> None:
    """The numbers before it are kept, and those behind it are not."""
    scaling = RotaryScaling("yarn", 4.0, 4096, **numbers)
    expected = 10.0 ** -(torch.arange(8) / 8) / torch.tensor([1.0] * kept + [4.0] * (8 - kept))
    torch.testing.assert_close(scaling.frequencies(16, 10.0, torch.arange(3)), expected)
