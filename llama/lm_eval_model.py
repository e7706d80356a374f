"""Our model in lm-evaluation-harness: `lm_eval --model llama --model_args ckpt_dir=…`, and what `python -m llama eval`
runs.

Releases of lm_eval that know entry points find it where this package is installed. The others, 0.4.13 among them, take

    python -m llama.lm_eval_model --model llama --model_args ckpt_dir=… --tasks …

which is their own command after this file has been imported.
"""

from __future__ import annotations

import atexit
import inspect
import json
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import lm_eval
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, simple_parse_args_string

from .generation import Llama
from .harness import Answers, check_examples, side_by_side
from .layers.parallel import is_first_process, several_processes
from .loading import whole_length
from .system.files import user_path
from .system.printable import shortened
from .system.program import nearest

DEFAULT_DEVICE = "cuda:0"  # what the harness' command passes, whether there is a GPU or not


@register_model("llama")
class LlamaLM(LM):
    """A model of the harness.

    ckpt_dir, tokenizer_path and options: those of `Llama.build`; max_seq_len, which may be called max_length as well,
    is all that the model was trained on if not given. batch_size: requests that run side by side ("auto" is
    max_batch_size, or 8). add_bos_token: see `Answers`. llama: a model that is there already, in place of all these.

    Under torchrun the first process evaluates, and the others run its steps.
    """

    def __init__(
        self,
        ckpt_dir: Optional[str] = None,
        tokenizer_path: Optional[str] = None,
        *,
        batch_size: Any = 1,
        max_batch_size: Optional[int] = None,
        max_length: Optional[int] = None,
        add_bos_token: Optional[bool] = None,
        llama: Optional[Llama] = None,
        name: Optional[str] = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if llama is None:
            known = list(inspect.signature(Llama.build).parameters)
            if unknown := options.keys() - set(known):
                raise ValueError(
                    f"model_args has no {shortened(', '.join(sorted(unknown)))}; there are {', '.join(known)}"
                )
            if max_length is not None:
                options.setdefault("max_seq_len", max_length)
            if options.get("max_seq_len") is None:
                where = options.get("device"), options.get("model_parallel_size")
                options["max_seq_len"] = whole_length(ckpt_dir, *where)
            llama = Llama.build(
                ckpt_dir, tokenizer_path, max_batch_size=side_by_side(batch_size, max_batch_size), **options
            )
            _lead_to_the_end(llama)
        self.answers = Answers(llama, add_bos_token is not False)
        self._name = str(name or ckpt_dir or "demo")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: Optional[dict[str, Any]] = None
    ) -> LlamaLM:
        """As the harness' own, but the device in model_args counts more than --device, whose default means the usual
        one."""
        others = {
            name: value for name, value in (additional_config or {}).items() if value not in (None, DEFAULT_DEVICE)
        }
        return cls(**{**others, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Optional[dict[str, Any]] = None) -> LlamaLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = self.answers.loglikelihood([request.args for request in requests])
        self._remember("loglikelihood", requests, answers)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        answers = self.answers.loglikelihood_rolling([text for request in requests for text in request.args])
        self._remember("loglikelihood_rolling", requests, answers)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = self.answers.generate_until([request.args for request in requests])
        self._remember("generate_until", requests, answers)
        return answers

    def _remember(self, kind: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        """Fill the harness' cache of answers, if one was asked for."""
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial(kind, request.args, answer)

    def apply_chat_template(self, chat_history: list[Any], add_generation_prompt: bool = True) -> str:
        return self.answers.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: Any = False) -> Optional[str]:
        if chat_template is False or chat_template is None:
            return None
        return self.answers.template(None if chat_template is True else chat_template)

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")


def _lead_to_the_end(llama: Llama) -> None:
    """Let the first process lead until Python ends; the others follow it, and end."""
    if not several_processes():
        return
    if not is_first_process():
        llama.lead(lambda: None)
        raise SystemExit(0)
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        over.wait()

    def lead() -> None:
        try:
            llama.lead(work)
        finally:
            begun.set()

    thread = threading.Thread(target=lead, daemon=True)
    thread.start()
    begun.wait()

    @atexit.register
    def end() -> None:
        over.set()
        thread.join()


class Tasks(NamedTuple):
    """Tasks that were found, and who knows them."""

    names: list[str]
    manager: Any


def find_tasks(wanted: str, include_path: Optional[str] = None, num_fewshot: Optional[int] = None) -> Tasks:
    """The tasks of these names, which commas part. ValueError for one that there is not, or that has too few documents
    for `num_fewshot` examples."""
    folder = None if include_path is None else user_path(include_path)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"include_path={shortened(include_path)}: there is no such folder")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    names: list[str] = []
    for word in filter(None, map(str.strip, wanted.split(","))):
        found = manager.match_tasks([word])
        if not found:
            told = f"there is no task {shortened(word)}{nearest(word, manager.all_tasks)}"
            raise ValueError(f"{told}; `lm_eval ls tasks` lists the harness' own")
        names += [name for name in found if name not in names]
    if not names:
        raise ValueError("no tasks; name some, as --tasks hellaswag,arc_easy")
    if num_fewshot:
        check_examples(manager.load(names)["tasks"], num_fewshot)
    return Tasks(names, manager)


def evaluate(llama: Llama, tasks: Tasks, *, name: str, samples: bool, **how: Any) -> Any:
    """The harness' results. how: as in its `simple_evaluate`."""
    model = LlamaLM(llama=llama, name=name)
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks.names, task_manager=tasks.manager, log_samples=samples, **how
    )


def table(results: Any) -> str:
    """Results as the harness' own command shows them."""
    return "\n".join(
        make_table(results, *part).strip() for part in [(), ("groups",)][: 1 + bool(results.get("groups"))]
    )


def as_json(results: Any) -> str:
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
