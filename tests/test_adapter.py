"""LoRA adapters: the sum against PEFT's own, on any processes, bases and dtypes; and what becomes of damaged ones."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from emulated_cuda import emulated
from helpers import command, write_twin
from safetensors.torch import load_file, save_file
from workers import Pool

from llama import Llama
from llama.commands.convert import convert
from llama.system import patterns
from llama.weights.adapter import add_adapter, tokenizer_folder
from llama.weights.checkpoint import Checkpoint, open_checkpoint
from llama.weights.huggingface import NAMES, ROTATED, other_name, to_hf_rows

CUT = {"tok_embeddings": 1, "wo": 1, "w2": 1}  # other matrices are cut along 0, as Meta cuts them
# PEFT matches ranks and alphas with regular expressions, targets with one or by a name's end, modules to save by any
# end.
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    "regex": {"target_modules": r".*\.(0|1)\.self_attn\.(q|k)_proj|.*down_proj", "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "k_proj": 6, r"^model\.layers\.1\..*q_proj": 3},
        "alpha_pattern": {"down_proj": 3, "self_attn.*_proj": 9, "q_proj": 1},
    },
    "layers": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "0.self_attn.v_proj"]},
    "excluded by a regex": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*1\.self.*q_proj"},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "gate_proj"]},
    "saved": {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "saved in part": {"target_modules": "all-linear", "modules_to_save": ["mlp", "1.self_attn.q_proj"]},
    "no effect": {"target_modules": ["q_proj"], "fan_in_fan_out": True, "bias": "all",
      "init_lora_weights": "orthogonal"},
}  # fmt: skip
IN_SEVERAL_WAYS = ["patterns", "embedding", "saved"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> dict[str, Path]:
    """The same model in both formats, and one whose embedding is its output matrix too."""
    root = tmp_path_factory.mktemp("bases")
    bases = {"hf": write_twin(root / "hf", {}), "tied": write_twin(root / "tied", {"tie_word_embeddings": True})}
    convert(bases["hf"], root / "meta", "meta", 2)
    shutil.copy(tokenizer_path, root)
    return {**bases, "meta": root / "meta"}


class Made:
    """Adapters that PEFT made and saved, with random numbers in place of trained ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.peft, self.transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def base(self, base: Path, dtype: torch.dtype = torch.float32) -> Any:
        return self.transformers.LlamaForCausalLM.from_pretrained(base, dtype=dtype)

    def folder(self, base: Path, name: str) -> Path:
        folder = self.root / f"{base.name} {name}"
        if not folder.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = self.peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **CONFIGS[name]})
                model = self.peft.get_peft_model(self.base(base), config)
                generator = torch.Generator().manual_seed(3)
                for key, weight in model.named_parameters():
                    if "lora_" in key or "modules_to_save" in key:
                        weight.data = torch.randn(weight.shape, generator=generator) * 0.1 + (weight.ndim == 1)
                model.save_pretrained(folder)
        return folder

    def model(self, base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.peft.PeftModel.from_pretrained(self.base(base, dtype), adapter).eval()

    def merged(self, base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        model = self.model(base, adapter, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def dimension(name: str) -> Optional[int]:
    """The one that Meta cuts a matrix along; None for norms."""
    return None if name.endswith("norm.weight") else CUT.get(name.split(".")[-2], 0)


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The full matrices, under Meta's names."""
    full = {}
    for name in checkpoint.dtypes:
        dim = dimension(name)
        full[name] = checkpoint.read(name, dim, 0, 0 if dim is None else checkpoint.shape(name, dim)[dim])
    return full


def in_theirs(weights: dict[str, torch.Tensor], head: int = 8) -> dict[str, torch.Tensor]:
    """Under Hugging Face's names, in its order of rows."""
    named = {}
    for name, weight in weights.items():
        named[str(other_name(name, NAMES))] = to_hf_rows(weight, head) if name.endswith(ROTATED) else weight
    return named


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], error: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].to(weight.dtype), weight, atol=1e-6, rtol=error)


def logits(
    base: str, adapter: Optional[str], tokens: list[list[int]], processes: int, quantize: Optional[str] = None
) -> torch.Tensor:
    llama = Llama.build(base, None, 32, 4, processes, device="cpu", adapter=adapter, quantize=quantize)
    with torch.inference_mode():
        return llama.model(torch.tensor(tokens), 0)


TOKENS = [[1, 5, 9, 300, 44, 7], [1, 399, 2, 8, 8, 20]]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sum_is_pefts(name: str, made: Made, bases: dict[str, Path]) -> None:
    """In float32 and in 16 bits, where one rounding may differ, from either format to the bit."""
    folder = made.folder(bases["hf"], name)
    expected = made.merged(bases["hf"], folder)
    ours = read_all(add_adapter(open_checkpoint(bases["hf"]), folder))
    assert_near(in_theirs(ours), expected, 1e-6)
    before = read_all(open_checkpoint(bases["hf"]))
    assert any(not torch.equal(ours[key], before[key]) for key in ours)
    of_meta = read_all(add_adapter(open_checkpoint(bases["meta"]), folder))
    assert all(torch.equal(ours[key], of_meta[key]) for key in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype, made: Made, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = made.folder(bases["hf"], "linear")
    convert(bases["hf"], tmp_path / "base", "hf", dtype=dtype)
    ours = in_theirs(read_all(add_adapter(open_checkpoint(tmp_path / "base"), folder)))
    assert_near(ours, made.merged(tmp_path / "base", folder, dtype), 2**-7 if dtype == torch.bfloat16 else 2**-10)
    convert(tmp_path / "base", tmp_path / "sum", "hf", adapter=folder)
    written = load_file(tmp_path / "sum" / "model.safetensors")
    assert all(torch.equal(written[key], ours[key].to(dtype)) for key in ours)  # rounded once, to the base's dtype


@pytest.mark.parametrize("base", ["tied", "hf", "meta"])
@pytest.mark.parametrize("name", IN_SEVERAL_WAYS)
def test_on_any_processes(base: str, name: str, made: Made, bases: dict[str, Path], pool: Pool) -> None:
    """Against PEFT's own forward pass: its merge of a tied embedding changes the output matrix too, which was trained
    apart."""
    source = bases["hf" if base == "meta" else base]
    folder, tokens = made.folder(source, name), torch.tensor(TOKENS)
    with torch.inference_mode():
        expected = made.model(source, folder)(tokens).logits
    for processes in (2, 4):  # one is what the other tests have
        for ours in pool.run(logits, str(bases[base]), str(folder), TOKENS, processes):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def local(base: str, adapter: str, processes: int) -> dict[str, torch.Tensor]:
    llama = Llama.build(base, None, 32, 1, processes, device="cpu", adapter=adapter)
    return {name: weight.clone() for name, weight in llama.model.state_dict().items()}


def test_the_sum_does_not_depend_on_the_processes(
    made: Made, bases: dict[str, Path], pool: Pool, tmp_path: Path
) -> None:
    """To the bit; so it becomes the same int8 numbers everywhere, and those of the folder that `convert` writes."""
    folder = made.folder(bases["hf"], "linear")
    full = read_all(add_adapter(open_checkpoint(bases["meta"]), folder))
    command("convert", str(bases["hf"]), str(tmp_path / "sum"), to="meta", shards=2, adapter=str(folder))
    shutil.copy(bases["hf"].parent / "tokenizer.model", tmp_path)
    for processes in (1, 2, 4):
        for rank, part in enumerate(pool.run(local, str(bases["meta"]), str(folder), processes)):
            for name, weight in full.items():
                dim = dimension(name)
                assert torch.equal(
                    part[name], weight if dim is None else weight.chunk(processes, dim)[rank % processes]
                ), name
        ways = ((bases["hf"], str(folder)), (tmp_path / "sum", None))
        one, other = (pool.run(logits, str(base), adapter, TOKENS, processes, "int8")[0] for base, adapter in ways)
        assert torch.equal(one, other)


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_convert_writes_the_sum(to: str, made: Made, bases: dict[str, Path], tmp_path: Path) -> None:
    """A tied embedding that the adapter changes on one side only is tied no more."""
    folder, tokens = made.folder(bases["tied"], "embedding"), torch.tensor(TOKENS)
    command("convert", str(bases["tied"]), str(tmp_path / "sum"), to=to, adapter=str(folder))
    adapted = add_adapter(open_checkpoint(bases["tied"]), folder)
    ours, written = read_all(adapted), read_all(open_checkpoint(tmp_path / "sum"))
    assert ours.keys() == written.keys()
    assert all(torch.equal(ours[name], written[name]) for name in ours)
    assert not adapted.tied
    if to == "hf":
        with torch.inference_mode():
            expected = made.model(bases["tied"], folder)(tokens).logits
            torch.testing.assert_close(made.base(tmp_path / "sum")(tokens).logits, expected, atol=1e-5, rtol=0)


# By hand from here: adapters that PEFT did not make, or that were damaged since.

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["k_proj", "down_proj", "embed_tokens"],
    "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "use_rslora": False, "use_dora": False, "rank_pattern": {},
    "alpha_pattern": {"1.self_attn.k_proj": 4}, "modules_to_save": ["model.norm"], "bias": "none",
    "init_lora_weights": True,
}  # fmt: skip
K, DOWN, EMBEDDING = "model.layers.{}.self_attn.k_proj", "model.layers.{}.mlp.down_proj", "model.embed_tokens"


def right_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {
        f"{EMBEDDING}.lora_embedding_A": (2, 400),
        f"{EMBEDDING}.lora_embedding_B": (64, 2),
        "model.norm.weight": (64,),
    }
    for i in (0, 1):
        shapes |= {f"{K.format(i)}.lora_A.weight": (2, 64), f"{K.format(i)}.lora_B.weight": (32, 2)}
        shapes |= {f"{DOWN.format(i)}.lora_A.weight": (2, 168), f"{DOWN.format(i)}.lora_B.weight": (64, 2)}
    return {f"base_model.model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_adapter(folder: Path, config: Any = None, tensors: Any = None, pickled: bool = False) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG if config is None else config))
    held = right_tensors() if tensors is None else tensors
    if pickled:
        torch.save(held, folder / "adapter_model.bin")
    else:
        save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def changed(**change: Any) -> dict[str, Any]:
    return {key: value for key, value in {**CONFIG, **change}.items() if value != "absent"}


def by_hand(base: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the adapter of `right_tensors` makes of a base, in Hugging Face's names: the sum, written down once more."""
    weights, tensors = load_file(base / "model.safetensors"), right_tensors()
    for module in (EMBEDDING, K.format(0), K.format(1), DOWN.format(0), DOWN.format(1)):
        ends = ("lora_embedding_A", "lora_embedding_B") if module == EMBEDDING else ("lora_A.weight", "lora_B.weight")
        a, b = (tensors[f"base_model.model.{module}.{end}"] for end in ends)
        alpha = config["lora_alpha"]
        for end, value in (config.get("alpha_pattern") or {}).items():
            alpha = value if module.endswith(end) else alpha
        product = b @ a * (alpha / (2**0.5 if config.get("use_rslora") else 2))
        weights[f"{module}.weight"] += product.T if module == EMBEDDING else product
    weights["model.norm.weight"] = tensors["base_model.model.model.norm.weight"]
    return weights


@pytest.mark.parametrize("pickled", [False, True])
def test_by_hand(pickled: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", pickled=pickled)
    assert_near(
        in_theirs(read_all(add_adapter(open_checkpoint(bases["hf"]), folder))), by_hand(bases["hf"], CONFIG), 1e-6
    )


def test_slices_of_the_sum(bases: dict[str, Path], tmp_path: Path) -> None:
    """Any rows and columns may be asked for, also a part of a head."""
    folder = write_adapter(tmp_path / "adapter")
    for base in ("hf", "meta"):
        checkpoint = add_adapter(open_checkpoint(bases[base]), folder)
        for name, dim in (("layers.0.attention.wk.weight", 0), ("layers.1.feed_forward.w2.weight", 1),
                          ("tok_embeddings.weight", 1)):  # fmt: skip
            full = checkpoint.read(name, dim, 0, checkpoint.shape(name, dim)[dim])
            for start, stop in ((0, 8), (3, 5), (5, 30), (31, 32)):
                assert torch.equal(checkpoint.read(name, dim, start, stop), full.narrow(dim, start, stop - start))
                assert torch.equal(checkpoint.parts(name, dim, start, stop)[0], full.narrow(dim, start, stop - start))


@pytest.mark.parametrize(("dtype", "kind"), [("float32", None), ("bfloat16", None), ("float32", "int8")])
def test_on_a_gpu(dtype: str, kind: Optional[str], bases: dict[str, Path], tmp_path: Path) -> None:
    """One made of CPU memory: threads add, and send the sums in pieces."""
    folder = write_adapter(tmp_path / "adapter")
    build = partial(Llama.build, str(bases["meta"]), None, 16, 1, dtype=dtype, quantize=kind, adapter=str(folder))
    expected = build(device="cpu").model.state_dict()
    with emulated():
        ours = {name: tensor.cpu() for name, tensor in build(device="emulated").model.state_dict().items()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not 'LORA'"),
        ({"peft_type": "absent"}, "peft_type=None is not 'LORA'"),
        ({"r": "absent"}, "missing key 'r'"),
        ({"r": 0}, "r=0 is not a whole number from 1"),
        ({"r": 2.0}, "r=2.0 is not a whole number"),
        ({"r": 3}, r"has \[2, 64\] and \[32, 2\], which are not of rank 3"),
        ({"lora_alpha": "absent"}, "missing key 'lora_alpha'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is not a number"),
        ({"lora_alpha": "6"}, "lora_alpha='6' is not a number"),
        ({"rank_pattern": {"k_proj": 0}}, "rank_pattern: k_proj=0 is not"),
        ({"rank_pattern": {"k_proj": 4}}, "which are not of rank 4"),
        ({"rank_pattern": {"(k_proj": 2}}, "is no regular expression"),
        ({"alpha_pattern": {"k_proj": None}}, "alpha_pattern: k_proj=None is not"),
        ({"alpha_pattern": [4]}, r"alpha_pattern=\[4\] is no table of numbers"),
        ({"target_modules": ["q_proj", 3]}, r"target_modules=\['q_proj', 3\] is no list of names"),
        ({"target_modules": ["k_proj"]}, "down_proj.lora_A.weight is unexpected"),
        ({"target_modules": None}, "q_proj has no lora_A"),  # PEFT's own choice for a Llama: q_proj and v_proj
        ({"target_modules": "all-linear"}, "gate_proj has no lora_A"),
        ({"target_modules": "*"}, "is no regular expression"),
        ({"exclude_modules": ["down_proj"]}, "down_proj.lora_A.weight is unexpected"),
        ({"modules_to_save": "norm"}, "modules_to_save='norm' is no list of names"),
        ({"modules_to_save": None}, "model.norm.weight is unexpected, as modules_to_save does not name it"),
        ({"modules_to_save": ["model.norm", "lm_head"]}, "lm_head has no weight"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is neither true nor false"),
        ({"use_dora": True}, "use_dora=True is not computed here.*merge it into its base with PEFT"),
        ({"lora_bias": True}, "lora_bias=True is not computed"),
        ({"bias": "some"}, "bias='some' is not"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base too"),
        ({"layers_to_transform": [0]}, "layers.1.*unexpected"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform=.*is no list of layers"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, "layers_pattern='h' does not name 'layers'"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] is not computed"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not computed"),
        ({"target_parameters": ["weight"]}, "target_parameters=.* is not computed"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=.* is not computed"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True is not computed"),
        ({"of_next_year": 0.5}, "of_next_year=0.5 is not computed"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(change: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", changed(**change))
    with pytest.raises(ValueError, match=message) as told:
        add_adapter(open_checkpoint(bases["hf"]), folder)
    assert str(folder) in str(told.value)


def test_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only odd ones need a process. What is wrong with it is told of one, or of all."""
    names = ["model.layers.0.q_proj", "model.layers.1.q_proj", "lm_head"]
    plain = ["lm_head", r"(.*\.)?(q_proj)$", "head"]
    found = [["lm_head"], names[:2], []]
    assert patterns.matches([*plain, r".*\.[1]\..*", "(lm|x)_head"], names) == [*found, [names[1]], ["lm_head"]]
    with pytest.raises(ValueError, match=r"^'\(a' is no regular expression: missing \), unterminated subpattern"):
        patterns.matches(["lm_head", "(a"], names)
    monkeypatch.setattr(patterns, "CHILD", "raise SystemExit(3)")
    with pytest.raises(
        ValueError, match=r"^\['a\+', 'b\+'\] is no regular expression: the process that matched it fai"
    ):
        patterns.matches(["a+", "b+"], names)
    monkeypatch.setattr(patterns, "_in_a_process", None)
    assert patterns.matches(plain, names) == found


def test_a_pattern_that_takes_for_ever(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    folder = write_adapter(tmp_path / "adapter", changed(target_modules="([a-z_.0-9]+)+!"))
    with pytest.raises(
        ValueError, match="adapter_config.json: .*takes longer than 0.5 seconds to match; write plain names"
    ):
        add_adapter(open_checkpoint(bases["hf"]), folder)


A0, B0, NORM = (f"base_model.model.{name}" for name in (f"{K.format(0)}.lora_A.weight", f"{K.format(0)}.lora_B.weight",
                                                       "model.norm.weight"))  # fmt: skip
TENSORS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (lambda t: t.pop(A0), "layers.0.self_attn.k_proj has no lora_A"),
    (lambda t: t.pop(NORM), "model.norm has no weight"),
    (lambda t: t.clear(), "does not hold what its adapter_config.json describes"),
    (lambda t: t.update({A0: t[A0].T.contiguous()}), r"has \[64, 2\] and \[32, 2\], which are not of rank 2"),
    (lambda t: t.update({A0: t[A0][0]}), "which are not of rank 2"),
    (lambda t: t.update({B0: torch.ones(64, 2)}), (r"another base than .* 'meta-llama/Llama-2-7b-hf'\): "
      r"it changes layers.0.attention.wk.weight of shape \[64, 64\], which is \[32, 64\] h")),
    (lambda t: t.update({NORM: torch.ones(65)}), r"it changes norm.weight of shape \[65\], which is \[64\] here"),
    (lambda t: t.update({NORM: torch.ones(64, 1)}), r"model.norm has shape \[64, 1\]"),
    (lambda t: t[A0].view(-1)[3:4].fill_(float("nan")), ("numbers that are not finite: "
                                                        ".*layers.0.self_attn.k_proj.lora_A")),
    (lambda t: t[NORM][3:4].fill_(float("inf")), "numbers that are not finite: .*model.norm.weight"),
    (lambda t: t.update({A0: t[A0].to(torch.int8)}), "k_proj.lora_A.weight (is stored as I8|is torch.int8)"),
    (lambda t: t.update({A0: t[A0].double()}), "k_proj.lora_A.weight (is stored as F64|is torch.float64)"),
    (lambda t: t.update({A0.replace(".0.", ".7."): t.pop(A0)}), ("layers.7.self_attn.k_proj.lora_A.weight is "
                                                                "unexpected")),
    (lambda t: t.update({A0.replace("lora_A", "lora_A.default"): t.pop(A0)}), "lora_A.default.weight is unexpected"),
    (lambda t: t.update({A0.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}),
      "magnitude_vector is unexp"),
    (lambda t: t.update({A0.replace("A.weight", "B.bias"): torch.ones(32)}), "lora_B.bias is unexpected"),
    (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 64)}), "score.weight is unexpected"),
    (lambda t: t.update({"stray": torch.ones(1)}), "stray is unexpected"),
    (lambda t: t.update({NORM.replace("norm", "norm.base_layer"): torch.ones(64)}), "is there under two names"),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(403, 64)}),
     "400 rows of tok_embeddings.weight and 403 rows of output.weight; both have to be saved"),
]  # fmt: skip


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_tensors_that_are_refused(
    change: Any, message: str, pickled: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Before any weight is read."""
    tensors = right_tensors()
    change(tensors)
    folder = write_adapter(tmp_path / "adapter", tensors=tensors, pickled=pickled)
    with pytest.raises(ValueError, match=message) as told:
        Llama.build(str(bases["hf"]), None, 16, 1, device="cpu", adapter=str(folder))
    assert str(folder) in str(told.value)


class Code:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_pickled_code_is_not_run(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_adapter(tmp_path / "adapter", tensors={**right_tensors(), "code": Code()}, pickled=True)
    for data in (None, pickle.dumps(Code()), b"", b"PK\x03\x04"):
        if data is not None:
            (folder / "adapter_model.bin").write_bytes(data)
        with pytest.raises(ValueError, match="adapter_model.bin (holds something other than tensors|cannot be read)"):
            add_adapter(open_checkpoint(bases["hf"]), folder)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_base(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["hf"], tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter")
    for name in ("lm_head", "model.norm", K.format(0)):
        weights = load_file(bases["hf"] / "model.safetensors")
        save_file({**weights, f"{name}.weight": torch.tensor(1.0)}, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"lm_head.weight has|has shape \[\] instead of|which is \[\] here"):
            Llama.build(
                str(base), str(bases["hf"].parent / "tokenizer.model"), 16, 1, device="cpu", adapter=str(adapter)
            )


def test_more_ids_than_the_base(bases: dict[str, Path], pool: Pool, tmp_path: Path) -> None:
    """Embedding and output that were saved whole, with rows for pieces that were added: the model has as many ids."""
    config = changed(modules_to_save=["embed_tokens", "lm_head"], target_modules=["down_proj"])
    whole = {f"base_model.model.{name}.weight": torch.randn(403, 64) for name in (EMBEDDING, "lm_head")}
    folder = write_adapter(
        tmp_path / "adapter", config, {k: v for k, v in right_tensors().items() if "down" in k} | whole
    )
    for base in ("hf", "meta", "tied"):
        checkpoint = add_adapter(open_checkpoint(bases[base]), folder)
        assert checkpoint.args.vocab_size == 403
        assert checkpoint.shape("tok_embeddings.weight", 1) == checkpoint.shape("output.weight", 0) == [403, 64]
        assert torch.equal(
            checkpoint.read("output.weight", 0, 400, 403), whole["base_model.model.lm_head.weight"][400:]
        )
        assert checkpoint.leave_out_ids(401)
        assert checkpoint.shape("output.weight", 0) == [401, 64]
        assert len(checkpoint.read("tok_embeddings.weight", 1, 3, 9)) == 401
    with pytest.warns(UserWarning, match="403 ids, and 3 ids without a name .400 to 402.: they are never drawn"):
        Llama.build(str(bases["hf"]), None, 16, 1, device="cpu", adapter=str(folder))
    # The adapter's own tokenizer, which training saved beside it, names them.
    shutil.copy(bases["hf"].parent / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400, "<|im_end|>": 401, "[PAD]": 402}))
    llama = Llama.build(str(bases["hf"]), None, 32, 4, device="cpu", adapter=str(folder))
    assert llama.tokenizer.named["<|im_end|>"] == 401
    tokens = [[1, 402, 401, 7]]
    expected = llama.model(torch.tensor(tokens), 0)
    assert expected.shape[-1] == 403
    for ours in pool.run(logits, str(bases["meta"]), str(folder), tokens, 2):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    command("convert", str(bases["hf"]), str(tmp_path / "sum"), to="hf", adapter=str(folder))
    written = Llama.build(str(tmp_path / "sum"), None, 32, 4, device="cpu")
    assert written.tokenizer.named["<|im_end|>"] == 401
    assert torch.equal(written.model(torch.tensor(tokens), 0), expected)


def test_the_tokenizer_that_was_saved_with_an_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    """It tells the chat template and the ids that end an answer, also where training added no rows; convert took the
    base's."""
    folder, home = write_adapter(tmp_path / "adapter"), bases["hf"].parent
    assert tokenizer_folder(bases["hf"], folder) == bases["hf"]
    command("convert", str(bases["hf"]), str(tmp_path / "plain"), to="hf", adapter=str(folder))
    shutil.copy(home / "tokenizer.model", folder)
    added = {"400": {"content": "[PAD]"}}  # of which there is no row
    told = {"chat_template": "{{ messages[0]['content'] }}", "eos_token": "<s>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    for to in ("hf", "gguf"):
        command("convert", str(bases["hf"]), str(tmp_path / f"sum.{to}"), to=to, adapter=str(folder))
    built = [
        Llama.build(str(bases["hf"]), None, 16, 1, device="cpu", adapter=str(folder)),
        *(Llama.build(str(tmp_path / f"sum.{to}"), None, 16, 1, device="cpu") for to in ("hf", "gguf")),
    ]
    assert [llama.tokenizer.chat_template for llama in built] == [told["chat_template"]] * 3
    assert {llama.tokenizer.n_words for llama in built} == {400}
    plain = Llama.build(str(tmp_path / "plain"), None, 16, 1, device="cpu").tokenizer.chat_template
    assert plain != told["chat_template"]
    # A file that the caller names goes before it.
    path = str(home / "tokenizer.model")
    assert Llama.build(str(bases["hf"]), path, 16, 1, device="cpu", adapter=str(folder)).tokenizer.chat_template is None


def test_a_tied_embedding_that_was_saved_as_the_bases_own(made: Made, bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT loads it into the base, where it is the output matrix too, unlike one that modules_to_save names."""
    tensors = {key: tensor for key, tensor in right_tensors().items() if "down" in key}
    tensors[f"base_model.model.{EMBEDDING}.weight"] = torch.randn(400, 64)
    for config in (changed(modules_to_save=None, target_modules=["down_proj"]),
                   changed(modules_to_save=["embed_tokens"], target_modules=["down_proj"])):  # fmt: skip
        folder = write_adapter(tmp_path / "adapter", config, tensors)
        checkpoint = add_adapter(open_checkpoint(bases["tied"]), folder)
        assert_near(in_theirs(read_all(checkpoint)), made.merged(bases["tied"], folder), 1e-6)
        assert checkpoint.tied == (config["modules_to_save"] is None)


def test_folders_that_are_mixed_up(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    base, tokenizer = str(bases["hf"]), str(bases["hf"].parent / "tokenizer.model")
    # An adapter in the place of a base.
    with pytest.raises(ValueError, match=r"added to its base \('meta-llama/Llama-2-7b-hf'\) by build\(ckpt_dir=BASE, "
                                         r"adapter='.*adapter'\), or --ckpt_dir and"):  # fmt: skip
        Llama.build(str(adapter), tokenizer)
    # A base in the place of an adapter; nothing; a file.
    for other, held in ((base, "it holds config.json"), (tmp_path / "none", "it is no folder"),
                        (adapter / "adapter_config.json", "it is no folder")):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"is no adapter: {held}.*pass the folder that holds adapter_config.json and"
        ):
            Llama.build(base, tokenizer, adapter=str(other))
    # An adapter beside a base: the base alone, and a warning that says how to add it.
    both = shutil.copytree(bases["hf"], tmp_path / "both")
    write_adapter(both)
    with pytest.warns(
        UserWarning, match="both also holds an adapter .*not added.* adapter='.*both' .--adapter. adds it"
    ) as told:
        alone = Llama.build(str(both), tokenizer, 16, 1, device="cpu").model
    assert [warning.filename for warning in told] == [__file__]
    assert torch.equal(alone.norm.weight, load_file(both / "model.safetensors")["model.norm.weight"])
    with pytest.warns(UserWarning, match="both also holds an adapter"):
        add_adapter(open_checkpoint(both), adapter)
    added = Llama.build(str(both), tokenizer, 16, 1, device="cpu", adapter=str(both)).model
    assert torch.equal(added.norm.weight, right_tensors()[NORM])
    # A base that is rounded already.
    command("convert", base, str(tmp_path / "int8"), to="meta", quantize="int8")
    with pytest.raises(
        ValueError, match="is stored as int8, which no adapter can be added to; pass the folder with the original"
    ):
        Llama.build(str(tmp_path / "int8"), tokenizer, adapter=str(adapter))
    capsys.readouterr()
    command("info", base, adapter=str(adapter))
    assert f"adapter     {adapter}: LoRA for 5 weights, 1 replaced whole" in capsys.readouterr().out
    command("score", "The dog", ckpt_dir=base, adapter=str(adapter), max_seq_len=64)


def test_a_new_adapter_in_the_place_of_one_that_was_added(bases: dict[str, Path], tmp_path: Path) -> None:
    """A training run saves over its last one while the model runs: no harm, unless the model still reads a tensor
    there."""
    for name, config, tensors in (
        ("sum", changed(modules_to_save=None), {key: t for key, t in right_tensors().items() if key != NORM}),
        ("whole", None, None),
    ):
        folder = write_adapter(tmp_path / name, config, tensors)
        llama = Llama.build(str(bases["hf"]), None, 16, 1, device="cpu", adapter=str(folder))
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes())
        path.touch()
        if name == "sum":
            llama.generate([[1, 2]], 1)
        else:
            with pytest.raises(ValueError, match="adapter_model.safetensors was written to after it was loaded"):
                llama.generate([[1, 2]], 1)


def differ(base: str, one: str, other: str) -> str:
    from llama import runtime

    rank = runtime.Launch.read().rank
    try:
        Llama.build(base, None, 16, 1, device="cpu", adapter=one if rank == 0 else other or None)
    except ValueError as error:
        return str(error)
    return "built"


def test_processes_with_different_adapters(bases: dict[str, Path], pool: Pool, tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", changed(lora_alpha=7))
    for told in pool.run(differ, str(bases["hf"]), str(one), str(two)):
        assert "adapter_config.json" in told
    for told in pool.run(differ, str(bases["hf"]), str(one), ""):
        assert "adapter=True" in told or "adapter" in told
    assert pool.run(differ, str(bases["hf"]), str(one), str(one)) == ["built"] * 4


def damage(path: Path, chance: random.Random) -> None:
    """Flip a bit, cut the file, take a run of bytes away or double it: in safetensors within the header, as nothing
    could tell a number from another."""
    data = bytearray(path.read_bytes())
    end = len(data) if path.suffix == ".json" else 8 + struct.unpack("<Q", data[:8])[0]
    at, size = chance.randrange(end), chance.randint(1, 12)
    kind = chance.choice(["flip", "flip", "cut", "take", "double"])
    if kind == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[chance.randrange(len(data)) :]
    elif kind == "take":
        del data[at : at + size]
    else:
        data[at:at] = data[at : at + size]
    path.write_bytes(data)


def test_damaged_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    """200 of them: each is one ValueError that names the folder, or the sum that its config then describes."""
    chance, outcomes = random.Random(17), {"refused": 0, "right": 0}
    base = open_checkpoint(bases["hf"])
    for _ in range(200):
        folder = write_adapter(tmp_path / "adapter")
        damage(folder / chance.choice(["adapter_config.json", "adapter_model.safetensors"]), chance)
        try:
            adapted = add_adapter(base, folder)
            for name in adapted.dtypes:
                adapted.shape(name, 0)
        except ValueError as error:
            outcomes["refused"] += str(folder) in str(error)
        else:
            config = json.loads((folder / "adapter_config.json").read_text())
            assert_near(in_theirs(read_all(adapted)), by_hand(bases["hf"], config), 1e-6)
            outcomes["right"] += 1
    assert sum(outcomes.values()) == 200
    assert outcomes["refused"] > 100
    assert outcomes["right"] > 5
