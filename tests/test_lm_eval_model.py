"""The model that lm-evaluation-harness knows as "llama", and `llama eval`, beside a stand-in for what the harness
calls and is called by. harness.py, which is run by hand, compares with the harness itself."""

from __future__ import annotations

import inspect
import json
import sys
import threading
import time
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import command

import llama as package
from llama import Llama

TASKS = {"arc_easy": 9, "arc_challenge": 3, "hellaswag": 9}  # and how many documents each has for examples


class TaskManager:
    """Knows tasks by their names."""

    all_tasks = tuple(TASKS)

    def __init__(self, include_path: Any = None) -> None:
        self.include_path = include_path

    def match_tasks(self, words: list[str]) -> list[str]:
        return [name for name in TASKS if any(fnmatch(name, word) for word in words)]

    def load(self, names: list[str]) -> Any:
        def task(name: str) -> Any:
            return SimpleNamespace(fewshot_docs=lambda: range(TASKS[name]), get_config={}.get)

        return {"tasks": {name: task(name) for name in names}}


class LM:
    """What the harness' models are. kept: its cache of answers."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *told: self.kept.append(told))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """llama/lm_eval_model.py beside the stand-in. asked: the arguments of `simple_evaluate`."""
    asked: dict[str, Any] = {}
    results = {"results": {"arc_easy": 1.0}, "at": Path("here")}
    utils = {
        "handle_non_serializable": str,
        "make_table": lambda results, *part: f" {'|'.join((*results['results'], *part))}\n",
        "simple_parse_args_string": lambda text: dict(word.split("=") for word in text.split(",")),
    }
    names: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": lambda **how: asked.update(how) or results},
        "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": lambda *names: lambda kind: asked.update(names=names) or kind},
        "lm_eval.tasks": {"TaskManager": TaskManager}, "lm_eval.utils": utils,
    }  # fmt: skip
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for names_of, name in ((sys.modules, "llama.lm_eval_model"), (vars(package), "lm_eval_model")):
        monkeypatch.setitem(names_of, name, None)  # what is imported now is forgotten afterwards
        del names_of[name]
    module = import_module("llama.lm_eval_model")
    assert asked.pop("names") == ("llama",)
    module.asked, module.results = asked, results  # type: ignore[attr-defined]
    return module


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `Llama.build` is asked for; it gives a model that is there."""
    found: list[Any] = []
    model = SimpleNamespace(tokenizer=None, model=SimpleNamespace(params=SimpleNamespace(max_seq_len=32)))

    def build(ckpt_dir: Any, tokenizer_path: Any = None, *, max_seq_len: int, max_batch_size: int, **more: Any) -> Any:
        found.append((ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, more))
        return model

    build.__signature__ = inspect.signature(Llama.build)  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "build", build)
    return found


def test_which_model_is_built(harness: Any, built: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For all positions that it was trained on, unless a number says another; the harness' usual device is none that
    was asked for."""
    monkeypatch.setattr(harness, "whole_length", lambda folder, device, parallel: (folder, device, parallel))
    LM = harness.LlamaLM
    model = LM("a", "t")
    assert built.pop() == ("a", "t", ("a", None, None), 1, {})
    assert (model.tokenizer_name, model.answers.add_bos, model.answers.max_length) == ("a", True, 32)
    LM("a", device="cpu", model_parallel_size=2, batch_size="auto", max_batch_size=5, max_seq_len=None)
    assert built.pop() == ("a", None, ("a", "cpu", 2), 5, {"device": "cpu", "model_parallel_size": 2})
    for options, length in (({"max_length": 7}, 7), ({"max_seq_len": 8, "max_length": 7}, 8)):
        assert LM(**options, add_bos_token=False, name="b/c").tokenizer_name == "b__c"
        assert built.pop() == (None, None, length, 1, {})
    assert [LM(add_bos_token=add).answers.add_bos for add in (None, True, False)] == [True, True, False]
    assert LM(None).tokenizer_name == "demo"
    built.clear()
    usual = {"batch_size": 3, "max_batch_size": None, "device": "cuda:0"}
    given = {"ckpt_dir": "a", "max_seq_len": 9}
    for told, more in ((given, usual), ({**given, "device": "mps"}, {**usual, "device": "cpu"}), (given, None)):
        LM.create_from_arg_obj(told, more)
    LM.create_from_arg_string("ckpt_dir=a,max_seq_len=9", {"device": "cpu"})
    assert built == [
        ("a", None, 9, 3, {}), ("a", None, 9, 3, {"device": "mps"}), ("a", None, 9, 1, {}),
        ("a", None, "9", 1, {"device": "cpu"}),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"model_args has no 'colour, size'; there are ckpt_dir, tokenizer_path, max_"):
        LM("a", size=1, colour=2)


def test_requests_are_answered_and_kept(harness: Any, tiny: Path, tokenizer_path: str) -> None:
    llama = Llama.build(str(tiny), tokenizer_path, 64, 3, device="cpu")
    model = harness.LlamaLM(llama=llama)
    asked = {
        "loglikelihood": [("A dog", " ran"), ("", "Once")],
        "loglikelihood_rolling": [("A dog ran.",), ("Once",)],
        "generate_until": [("A dog", {"max_gen_toks": 3}), ("Once", {"max_gen_toks": 3})],
    }
    for kind, given in asked.items():
        answers = getattr(model, kind)([SimpleNamespace(args=each) for each in given])
        if kind == "loglikelihood_rolling":
            assert answers == model.answers.loglikelihood_rolling([text for (text,) in given])
        else:
            assert answers == getattr(model.answers, kind)(given)
        assert model.kept == [(kind, each, answer) for each, answer in zip(given, answers)]
        model.kept.clear()
    dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]
    assert model.apply_chat_template(dialog[:1]) == "<s>[INST] Hi [/INST]"
    assert model.apply_chat_template(dialog, False) == "<s>[INST] Hi [/INST] A"
    assert (model.chat_template(), model.chat_template(None)) == (None, None)
    assert model.chat_template(True) == llama.chat_format.template == model.chat_template("llama2")


def test_tasks_that_are_found(harness: Any, tmp_path: Path) -> None:
    found = harness.find_tasks(" hellaswag, arc*,,arc_easy ")
    assert (found.names, found.manager.include_path) == (["hellaswag", "arc_easy", "arc_challenge"], None)
    assert harness.find_tasks("arc_easy", str(tmp_path), 9).manager.include_path == str(tmp_path)
    assert harness.find_tasks("arc_challenge", num_fewshot=0).names == ["arc_challenge"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("arc_eazy",), r"there is no task 'arc_eazy' \(did you mean arc_easy\?\); `lm_eval ls tasks` lists"),
        (("zzz",), "there is no task 'zzz'; `lm_eval ls tasks` lists the harness' own"),
        ((" , ",), "no tasks; name some, as --tasks hellaswag,arc_easy"),
        (("arc_easy", "no/such"), "include_path='no/such': there is no such folder"),
        (("arc_*", None, 4), "num_fewshot=4, but arc_challenge has 3 documents to take examples from"),
    ],
)
def test_tasks_that_are_not(asked: Any, told: str, harness: Any) -> None:
    with pytest.raises(ValueError, match=told):
        harness.find_tasks(*asked)


def test_the_first_of_several_processes_leads_until_python_ends(
    harness: Any, built: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others follow it in the making of their model, and end there. Without others nobody leads."""
    led: list[Any] = []
    at_exit: list[Any] = []
    model = Llama.build("a", max_seq_len=9, max_batch_size=1)

    def lead(work: Any) -> None:
        time.sleep(0.05)  # a model begins to lead when it can
        led.append("begun")
        led.append(work())

    model.lead = lead  # type: ignore[method-assign]
    monkeypatch.setattr(harness.atexit, "register", at_exit.append)
    harness.LlamaLM("a", max_seq_len=9)
    assert (led, at_exit) == ([], [])
    monkeypatch.setattr(harness, "several_processes", lambda: True)
    monkeypatch.setattr(harness, "is_first_process", lambda: False)
    with pytest.raises(SystemExit) as ended:
        harness.LlamaLM("a", max_seq_len=9)
    assert (ended.value.code, led, at_exit) == (0, ["begun", None], [])
    monkeypatch.setattr(harness, "is_first_process", lambda: True)
    harness.LlamaLM("a", max_seq_len=9)
    assert led[2:] == ["begun"]
    assert [thread.daemon for thread in threading.enumerate() if "lead" in thread.name] == [True]
    at_exit[0]()
    assert led[2:] == ["begun", None]
    harness.LlamaLM(llama=model)
    assert len(led) == 4

    def fail(_: Any) -> None:
        raise ValueError("the model is not as it was built")

    model.lead = fail  # type: ignore[method-assign]
    monkeypatch.setattr(threading, "excepthook", led.append)
    harness.LlamaLM("a", max_seq_len=9)  # it does not wait for ever
    at_exit[1]()
    assert "as it was built" in str(led[-1].exc_value)


def test_eval(
    harness: Any, tiny: Path, tokenizer_path: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the command asks the harness for, and what it makes of the results."""
    flags = [str(tiny), tokenizer_path]
    command("eval", *flags, tasks="arc_easy", max_seq_len=64, device="cpu")
    usual = {"limit": None, "num_fewshot": None, "apply_chat_template": False, "system_instruction": None,
             "fewshot_as_multiturn": True, "gen_kwargs": None, "bootstrap_iters": 100000}  # fmt: skip
    manager, model = harness.asked.pop("task_manager"), harness.asked.pop("model")
    assert harness.asked == {"tasks": ["arc_easy"], "log_samples": False, **usual}
    assert (manager.include_path, model.tokenizer_name) == (None, flags[0].replace("/", "__"))
    assert model.answers.llama.model.params.max_batch_size == 4
    assert capsys.readouterr().out == "arc_easy\n"
    harness.results["groups"] = {"arc": 1}
    out = tmp_path / "out.json"
    command("eval", *flags, "--samples", tasks="arc_easy", max_seq_len=64, device="cpu", limit=0.5, num_fewshot=2,
            gen_kwargs="temperature=1, top_p=0.5", bootstrap_iters=0, out=out, include_path=tmp_path)  # fmt: skip
    assert capsys.readouterr().out == "arc_easy\narc_easy|groups\n"
    assert json.loads(out.read_text()) == {"results": {"arc_easy": 1.0}, "at": "here", "groups": {"arc": 1}}
    assert out.read_text().startswith('{\n  "results": ')
    found = {name: harness.asked[name] for name in ("limit", "num_fewshot", "log_samples", "bootstrap_iters")}
    assert found == {"limit": 0.5, "num_fewshot": 2, "log_samples": True, "bootstrap_iters": 0}
