"""The model and the tasks of lm-evaluation-harness, with a stand-in for the harness, which is large: `harness.py` has
the real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from forks import Forks
from helpers import command

from llama import Llama
from llama.harness import Answers

# What llama/lm_eval_model.py imports.
STAND_IN = """
import sys
from types import ModuleType


class LM:
    def __init__(self):
        self.remembered = []
        self.cache_hook = self

    def add_partial(self, *entry):
        self.remembered.append(entry)


class TaskManager:
    pass


def simple_parse_args_string(text):
    pairs = (part.split("=") for part in text.split(","))
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


modules = {
    name: ModuleType(name)
    for name in "lm_eval lm_eval.api lm_eval.api.model lm_eval.api.registry lm_eval.tasks lm_eval.utils".split()
}
sys.modules.update(modules)
modules["lm_eval.api.model"].LM = LM
modules["lm_eval.api.registry"].register_model = lambda name: lambda model: setattr(model, "known_as", name) or model
modules["lm_eval.tasks"].TaskManager = TaskManager
modules["lm_eval.utils"].handle_non_serializable = str
modules["lm_eval.utils"].make_table = lambda results, *part: f"table {results['results']} {part}\\n"
modules["lm_eval.utils"].simple_parse_args_string = simple_parse_args_string
"""


class Documents:
    def __init__(self, count: int) -> None:
        self.count = count

    def fewshot_docs(self) -> list[int]:
        return [0] * self.count

    def get_config(self, name: str) -> None:
        return None


class TaskManager:
    """Knows tasks of this many documents."""

    tasks = {"long_one": 9, "long_two": 9, "short": 2}  # noqa: RUF012

    def __init__(self, include_path: Any) -> None:
        self.include_path = include_path
        self.all_tasks = list(self.tasks)

    def match_tasks(self, words: list[str]) -> list[str]:
        return [name for name in self.tasks for word in words if fnmatch(name, word)]

    def load(self, names: list[str]) -> Any:
        return {"tasks": {name: Documents(self.tasks[name]) for name in names}}


@pytest.fixture
def harness() -> Iterator[Any]:
    before = dict(sys.modules)
    for name in list(sys.modules):
        if name.startswith("lm_eval") or name == "llama.lm_eval_model":
            del sys.modules[name]
    exec(STAND_IN, {})
    from llama import lm_eval_model

    lm_eval_model.TaskManager = TaskManager
    yield lm_eval_model
    for name in set(sys.modules) - set(before):
        if name.startswith("lm_eval") or name == "llama.lm_eval_model":
            del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name.startswith("lm_eval")})


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 64, 3, device="cpu")


def asked(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_answers(harness: ModuleType, llama: Llama) -> None:
    """Those of `Answers`, each with its request for the harness' cache, by the kind of request."""
    model, answers = harness.LlamaLM(llama=llama, name="a/b/c"), Answers(llama)
    assert (model.known_as, model.tokenizer_name) == ("llama", "a__b__c")
    pairs, texts = [("The little dog", " found"), ("", "Once")], ["They played.", "Once upon a time"]
    until = {"until": ["the"], "max_gen_toks": 9}
    told = answers.loglikelihood(pairs), answers.loglikelihood_rolling(texts), answers.generate_until([("The", until)])
    assert model.loglikelihood([asked(*pair) for pair in pairs]) == told[0]
    assert model.loglikelihood_rolling([asked(text) for text in texts]) == told[1]
    assert model.generate_until([asked("The", until)]) == told[2]
    assert model.remembered == [
        *(("loglikelihood", pair, answer) for pair, answer in zip(pairs, told[0])),
        *(("loglikelihood_rolling", (text,), answer) for text, answer in zip(texts, told[1])),
        ("generate_until", ("The", until), told[2][0]),
    ]


def test_chats(harness: ModuleType, llama: Llama) -> None:
    """False and None mean that the harness writes no chats, True the folder's own template, and a word one by name."""
    model, answers = harness.LlamaLM(llama=llama), Answers(llama)
    dialog = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(dialog) == answers.apply_chat_template(dialog)
    dialog.append({"role": "assistant", "content": "so"})
    assert model.apply_chat_template(dialog, False) == answers.apply_chat_template(dialog, False)
    assert model.chat_template() is model.chat_template(False) is model.chat_template(None) is None
    assert model.chat_template(True) == answers.template()
    assert model.chat_template("vicuna") == answers.template("vicuna") != answers.template()


def test_built_as_asked(harness: ModuleType, tiny: Path, tokenizer_path: str) -> None:
    """From the words of --model_args: the options of build, and the harness' own names for two of them."""
    model = harness.LlamaLM.create_from_arg_string(
        f"ckpt_dir={tiny},tokenizer_path={tokenizer_path},device=cpu,max_length=48",
        {"batch_size": "auto", "max_batch_size": 3, "device": "cuda:0"},
    )
    params = model.answers.llama.model.params
    assert (params.max_seq_len, params.max_batch_size, model.tokenizer_name) == (48, 3, str(tiny).replace("/", "__"))
    assert model.answers.add_bos is True

    model = harness.LlamaLM(str(tiny), tokenizer_path, max_seq_len=40, max_length=50, device="cpu", add_bos_token=False)
    params = model.answers.llama.model.params
    assert (params.max_seq_len, params.max_batch_size, model.answers.add_bos) == (40, 1, False)
    with pytest.raises(
        ValueError, match=r"model_args has no 'beams, dtyp'; there are ckpt_dir, tokenizer_path, max_seq"
    ):
        harness.LlamaLM(str(tiny), dtyp="float16", beams=3)


def test_as_long_as_it_was_trained(
    harness: ModuleType, tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(harness, "whole_length", lambda *where: told.append(where) or 56)
    model = harness.LlamaLM(str(tiny), tokenizer_path, device="cpu", model_parallel_size=1, max_seq_len=None)
    assert model.answers.llama.model.params.max_seq_len == 56
    assert told == [(str(tiny), "cpu", 1)]


def test_the_device_that_the_harness_passes(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default says nothing; another one does, but not more than --model_args."""
    monkeypatch.setattr(harness.LlamaLM, "__init__", lambda self, **how: setattr(self, "how", how))
    create = harness.LlamaLM.create_from_arg_obj
    assert create({"ckpt_dir": "x"}).how == {"ckpt_dir": "x"}
    assert create({"ckpt_dir": "x"}, {"device": "cuda:0", "batch_size": None}).how == {"ckpt_dir": "x"}
    assert create({}, {"device": "cuda:1", "batch_size": 0}).how == {"device": "cuda:1", "batch_size": 0}
    assert create({"device": "cpu"}, {"device": "cuda:1"}).how == {"device": "cpu"}
    assert harness.LlamaLM.create_from_arg_string("device=cpu", {"device": "mps"}).how == {"device": "cpu"}


def test_tasks(harness: ModuleType, tmp_path: Path) -> None:
    assert harness.find_tasks(" short, ,long_*,short,")[0] == ["short", "long_one", "long_two"]
    assert harness.find_tasks("short").manager.include_path is None
    assert harness.find_tasks("short", str(tmp_path)).manager.include_path == str(tmp_path)
    assert harness.find_tasks("short", None, 2).names == ["short"]
    for wanted, more, message in (
        ("long_one,shor", (), r"there is no task 'shor' \(did you mean short\?\); `lm_eval ls tasks` lists"),
        ("xyz", (), r"there is no task 'xyz'; `lm_eval"),
        (" ,", (), "no tasks; name some, as --tasks hellaswag,arc_easy"),
        ("short", (str(tmp_path / "none"),), "none.: there is no such folder"),
        ("long_one,short", (None, 3), "num_fewshot=3, but short has 2 documents"),
    ):
        with pytest.raises(ValueError, match=message):
            harness.find_tasks(wanted, *more)


@pytest.mark.parametrize("groups", [None, {"all": 1}])
def test_the_command(
    groups: Any,
    harness: ModuleType,
    tiny: Path,
    tokenizer_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table on stdout, and all results in a file; each option goes to the harness under its own name."""
    told: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, **how: Any) -> Any:
        told.append(how)
        score, greedy = model.loglikelihood([asked("The little dog", " found")])[0]
        return {"results": {"é": score}, "greedy": greedy, "path": Path("x"), "groups": groups}

    harness.lm_eval.simple_evaluate = simple_evaluate
    out = tmp_path / "out.json"
    command(
        "eval", str(tiny), tokenizer_path, tasks="short", out=out, samples=True, limit=7, num_fewshot=1, device="cpu",
        max_seq_len=50, max_batch_size=2, bootstrap_iters=0, system_instruction="be kind", include_path=tmp_path,
    )  # fmt: skip
    shown = capsys.readouterr().out
    expected = Llama.build(str(tiny), tokenizer_path, 50, 2, device="cpu")
    ((score, greedy),) = Answers(expected).loglikelihood([("The little dog", " found")])
    assert shown == f"table {{'é': {score}}} ()\n" + f"table {{'é': {score}}} ('groups',)\n" * bool(groups)
    text = out.read_text(encoding="utf-8")
    assert json.loads(text) == {"results": {"é": score}, "greedy": greedy, "path": "x", "groups": groups}
    assert text.startswith('{\n  "results": {\n    "é": ')
    manager = told[0].pop("task_manager")
    assert manager.include_path == str(tmp_path)
    assert told == [{
        "tasks": ["short"], "log_samples": True, "limit": 7, "num_fewshot": 1, "apply_chat_template": False,
        "system_instruction": "be kind", "fewshot_as_multiturn": True, "gen_kwargs": None, "bootstrap_iters": 0,
    }]  # fmt: skip


SCRIPT = (
    STAND_IN
    + """
from types import SimpleNamespace
from llama.lm_eval_model import LlamaLM
model = LlamaLM(sys.argv[1], sys.argv[2], max_length=40, device="cpu")
print(model.loglikelihood([SimpleNamespace(args=("The little dog", " found"))]))
"""
)


def test_two_processes(harness: ModuleType, tiny: Path, tokenizer_path: str, llama: Llama, forks: Forks) -> None:
    """The first evaluates, as the harness' command does it; the other one runs its steps, and ends with it."""
    first, second = forks.ranks(SCRIPT, str(tiny), tokenizer_path)
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, "")
    ((score, greedy),) = json.loads(first.stdout.splitlines()[-1].translate(str.maketrans("()FT", "[]ft")))
    ((alone, its),) = Answers(llama).loglikelihood([("The little dog", " found")])
    assert score == pytest.approx(alone, abs=1e-5)
    assert greedy == its
