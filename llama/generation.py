"""`Llama`: build a model, and generate ids, completions and chat replies with it. Text lives at this edge only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Literal, NamedTuple, Optional, TypeVar, Union, overload

import torch
from typing_extensions import Unpack

from . import memory, runtime
from .chat import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    Dialog,
    DialogError,
    Message,
    Role,
    check_dialog,
    is_unsafe,
)
from .chat_formats import ChatFormat, check_format, choose_format, ending, in_common
from .completion import (
    ChatPrediction,
    Chunk,
    CompletionPrediction,
    Completions,
    Score,
    chat_chunks,
    chat_prediction,
    perplexity,
    predictions,
    progress,
    shown,
    window_starts,
)
from .decoding.calls import Call, Source
from .decoding.engine import Engine
from .decoding.invariant import INVARIANT_AS_BUILT, InvariantEngine, check_invariant
from .decoding.leading import Leader, follow
from .decoding.requests import LEAST_SHARED, FinishReason, Request, check_prompts
from .decoding.sampling import sample_top_p
from .decoding.scheduler import Scheduler
from .followers import Followers, check, started
from .infilling import infilling_ids, infilling_prompts
from .layers.agreement import keep_pace, together
from .layers.parallel import (
    all_agree,
    broadcast_random_state,
    from_first_process,
    gather_from_replicas,
    is_first_process,
    model_parallel_group,
    replica,
    several_processes,
    share_memory,
)
from .layers.quantized import Quantized
from .loading import DEMO, DEMO_TOLD, Wanted, check_shares, checkpoint_folders, open_folders
from .masks import forms, matcher_of
from .model import Transformer
from .options import METAS_OPTIONS, Asked, Choice, Options, Prompts, TurnOptions, parse_options, with_stops
from .scoring import ContinuationScore, Pair, encode_pairs, id_pairs, pair_prompts, pair_score
from .session import ChatSession
from .system import openmp
from .system.checks import list_of_texts, whole, whole_number
from .system.printable import shortened
from .system.progress import quietly, say
from .tokenizer import Tokenizer, split

T = TypeVar("T")
SAMPLE_TOP_P = sample_top_p  # if somebody puts another one in its place, that one draws
NOT_AS_BUILT = "needs a model that is as it was built, without hooks, patches or parts of somebody's own"

__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR",
    "ChatPrediction", "CompletionPrediction", "Dialog", "DialogError", "Llama", "Message", "Role", "sample_top_p",
]  # fmt: skip


class Llama:
    """A model and its tokenizer. `build` makes one.

    >>> llama = Llama.build("llama-2-7b/", "tokenizer.model")
    >>> llama.text_completion(["Simply put, the theory of relativity states that "])[0]["generation"]
    """

    @staticmethod
    def build(
        ckpt_dir: Optional[str] = None,
        tokenizer_path: Optional[str] = None,
        max_seq_len: Optional[int] = None,
        max_batch_size: int = 4,
        model_parallel_size: Optional[int] = None,
        seed: int = 1,
        *,
        device: Union[str, torch.device, None] = None,
        dtype: Union[str, torch.dtype, None] = None,
        quantize: Optional[str] = None,
        adapter: Optional[str] = None,
        compile: Optional[bool] = None,
        draft: Optional[str] = None,
        batch_invariant: bool = False,
        chat_format: Optional[str] = None,
        processes: Optional[int] = None,
        bind: bool = False,
        quiet: bool = False,
    ) -> Llama:
        """Load a checkpoint onto this process, or onto all processes that torchrun started. Without arguments: the demo
        model.

        Args:
            ckpt_dir: a folder in Meta's or Hugging Face's format, a GGUF file, or a model on the Hugging Face Hub
                (org/name, org/name@revision, or org/name:Q4_K_M for one of its GGUF files), which is fetched into the
                hub's cache if it is not there. Default: the demo model that comes with this package.
            tokenizer_path: Default: the file tokenizer.model in ckpt_dir or in the folder above it.
            max_seq_len: tokens of a prompt and its answer together. Default: 2048, or fewer if the folder says so.
            max_batch_size: prompts that run side by side. Default: 4.
            model_parallel_size: how many processes share one copy of the model. It need not be the number of shards.
                Default: all processes.
            seed: of torch's generators, the same on every process. Default: 1.
            device: "cuda", "mps" or "cpu". Default: the first of these that is there.
            dtype: "float32", "bfloat16" or "float16" (or "fp32", "bf16", "fp16"). Default, or "auto": the checkpoint's
                own; but float16 for a bfloat16 checkpoint if the device cannot compute in bfloat16, and bfloat16 for a
                float16 one on an x86 processor, which is slow in float16; a line says so.
            quantize: "int8" or "int4" (or 8, 4), "w8a8" or "w4a8" rounds the matrices while they are loaded; the last
                two also round activations to 8 bits, on CPUs only. Default: as stored.
            adapter: a folder that PEFT saved a LoRA adapter of this checkpoint in, or its name on the hub. It is added
                before anything is rounded. Default: none.
            compile: True lets torch compile the decode step, once, in a minute or two on a CPU, if it does not run in
                C++ anyway (docs/SPEED.md). False runs it operator by operator. Default: torch compiles nothing, but a
                step that an earlier run compiled is used.
            draft: a folder, or a name on the hub, with a smaller model of the same tokenizer. It guesses what the model
                will write, and the model verifies several guesses in one pass, as many as pay. Greedy ids stay the
                same, and so does the distribution of drawn ones. Default: no draft model.
            batch_invariant: True lets no prompt's ids and log-probabilities depend, to the bit, on what runs beside it
                or ran before, also in 16 bits and with quantized weights. It costs speed (docs/SPEED.md), and does not
                go with compile=True. Default: False.
            chat_format: a name in `chat_formats.FORMATS`, "template" (the folder's own chat template, of whatever
                format), or a template in Jinja. Default: the format that the folder's template is recognised as, and
                Llama 2's for a folder without one.
            processes: this process, and others that it starts for this `Llama`, share the model: one on each GPU, or
                dividing the cores. They end with the object, with `close()`, or with this process; a new build with
                processes= closes the one before (docs/NOTEBOOKS.md). Default: this process alone, or all that torchrun
                started.
            bind: True binds each of several processes on a CPU to its own share of the cores that they may use, node of
                memory by node of memory, until they end; a line says which. Default: False.
            quiet: True prints nothing. Default: False, which tells how long it took, and shows a bar at a terminal.

        Raises:
            ValueError: an argument or a file is not right; on every process, before any weight is copied.
        """
        given = {name: value for name, value in locals().items() if name not in ("processes", "quiet")}
        if quiet:
            with quietly():
                return Llama.build(**given, processes=processes)
        if processes is not None:
            return _build_over(processes, given)
        began = time.time()
        place = runtime.start(device, model_parallel_size, bind)
        with together(everyone=True) as agreement:
            max_seq_len, max_batch_size, seed = _checked(given, place)
            agreement.values = {"the call": "build"}
        folder, draft_folder, adapter_folder = checkpoint_folders(
            DEMO if ckpt_dir is None else ckpt_dir, draft, adapter
        )
        assert folder is not None
        # Tensors made in inference mode could not be used outside it.
        with together(everyone=True) as agreement, torch.inference_mode(False):
            sizes = max_seq_len, max_batch_size
            wanted = Wanted(folder, draft_folder, adapter_folder, tokenizer_path, *sizes, dtype, quantize)
            opened = open_folders(wanted, place)
            if chat_format is not None:
                choose_format(chat_format, opened.tokenizer)  # the folder's own may be none
            agreement.values = {
                **opened.compared(), "compile": compile, "batch_invariant": bool(batch_invariant),
                "chat_format": chat_format,
                "seed": seed if replica()[1] == 1 else None,  # each copy of the model may draw its own
            }  # fmt: skip
        share_memory(model_parallel_group(), place)
        with together(everyone=True), torch.inference_mode(False), memory.explained(opened.placement):
            draft_model = None if opened.draft is None else opened.draft.load()
            model = opened.main.load()
        opened.warn_beyond_training()
        openmp.rest()  # other threads may be the ones that generate
        torch.manual_seed(seed)
        say(f"Loaded in {time.time() - began:.2f} seconds")
        if dtype in (None, "auto") and (told := opened.other_dtype()):
            say(told)
        if ckpt_dir is None:
            say(DEMO_TOLD)
        how = {"compile": compile, "batch_invariant": batch_invariant, "chat_format": chat_format}
        return Llama(model, opened.tokenizer, draft_model=draft_model, **how)  # type: ignore[arg-type]

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        compile: Optional[bool] = False,
        draft_model: Optional[Transformer] = None,
        batch_invariant: bool = False,
        chat_format: Optional[str] = None,
    ) -> None:
        check_format(chat_format)
        if isinstance(model, (str, PathLike)):
            raise ValueError(
                f"model={shortened(model)} is no Transformer; Llama.build({shortened(model)}) loads a folder"
            )
        self.model = model
        self.draft_model = draft_model
        self.tokenizer = tokenizer
        self._compile, self._batch_invariant, self._chat_format = compile, batch_invariant, chat_format
        output = getattr(model, "output", None)
        self._group = getattr(output, "group", None)  # the processes that share this model
        self._scheduler_of_model = self._new_scheduler()
        self._leader: Optional[Leader] = None  # while this process takes requests for all
        self._followers: Optional[Followers] = None  # the processes that were started for it, if any were

    def _new_scheduler(self) -> Scheduler:
        engine = (InvariantEngine if self._batch_invariant else Engine)(self.model, self._compile)
        draft = None if self.draft_model is None else Engine(self.draft_model, self._compile)
        never = self.tokenizer.nameless if isinstance(self.tokenizer, Tokenizer) else ()
        return Scheduler(engine, self._group, draft, never, partial(matcher_of, self.tokenizer))

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """While a thread holds it, no other thread steps: other threads' requests run on in this one's steps only."""
        return self._engine.lock

    def __getstate__(self) -> dict[str, Any]:
        if self._followers is not None:
            raise ValueError("a Llama that was built with processes= cannot be copied; build another one")
        own = ("_scheduler_of_model", "_leader")  # a copy makes its own
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._scheduler_of_model, self._leader = self._new_scheduler(), None

    def close(self) -> None:
        """End the processes that `build` started for it; it cannot run afterwards. Without any this does nothing."""
        if self._followers is not None:
            self._followers.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _scheduler(self) -> Scheduler:
        """The scheduler of the model that is now in `model`: somebody may have put another one there."""
        if self._scheduler_of_model.engine.model is not self.model:
            self._scheduler_of_model = self._new_scheduler()
        return self._scheduler_of_model

    @property
    def _engine(self) -> Engine:
        return self._scheduler.engine

    @property
    def chat_format(self) -> ChatFormat:
        """How dialogs are written for this model. ValueError if its folder has a chat template of no known format."""
        return choose_format(self._chat_format, self.tokenizer)

    def forget(self) -> None:
        """Forget what the cache holds of earlier prompts: the next ones are read from their first id on."""
        with self._alike("forget"):
            self._scheduler.forget()

    def lead(self, work: Callable[[], T]) -> Optional[T]:
        """Let the first process take requests for all: it runs `work`, and the others run the same steps until `work`
        ends.

        Call it on every process. Copies of the model (`model_parallel_size` below the number of processes) share the
        requests: each goes to the one with the most room. Rows without a seed draw from seeds of their own. The model
        must be as it was built.

        Args:
            work: called without arguments on the first process. It may call this `Llama` from any thread, at any time.
                What all processes do alike is not for `work`: the model's own call, `model(…)`, and another `Llama`.

        Returns:
            What `work` returns; None on the other processes.

        Raises:
            RuntimeError: on the other processes, if `work` raises.
            ValueError: the model is not as it was built, or this process leads already.
        """
        if self._followers is not None:
            return work()  # it leads as long as it lives
        if self._leader is not None:
            raise ValueError("this process leads the others already; call lead() once, and in it whatever is to run")
        if not self._meets_others():
            return work()
        if not is_first_process():
            follow(self._scheduler, lambda name, *arguments: getattr(self, name)(*arguments))
            return None
        leader = self._leader = Leader(self._scheduler)
        try:
            result = work()
        except BaseException as error:
            leader.end(error)
            raise
        else:
            leader.end(None)
            return result
        finally:
            self._leader = None

    @property
    def led_copies(self) -> int:
        """How many copies of the model share the requests of this process; 0 if no other process follows it."""
        return 0 if self._leader is None else self._leader.copies

    def _meets_others(self) -> bool:
        """Whether there are processes to lead or to follow. Connects them."""
        with together(everyone=True):
            if several_processes() and not self._engine.is_as_built:
                raise ValueError(f"lead() {NOT_AS_BUILT}")
        from_first_process(None)  # one that dies before the first request would be waited for
        return several_processes()

    @contextmanager
    def _alike(self, name: str, *arguments: Any) -> Iterator[None]:
        """A block that does what the method `name` does; the processes that follow this one run that."""
        if (leader := self._leader) is None:
            yield
            return
        self._check_leads(leader)
        with self.lock, leader.all_do(name, *arguments):
            yield

    def _check_leads(self, leader: Leader) -> None:
        """ValueError if something was put into the model that other processes follow."""
        if leader.scheduler.engine.model is not self.model or not leader.scheduler.engine.is_as_built:
            raise ValueError(f"what other processes follow {NOT_AS_BUILT}, which they would not have; see `Llama.lead`")

    def __repr__(self) -> str:
        params, weight = self.model.params, self.model.norm.weight
        rounded = [module for module in self.model.modules() if isinstance(module, Quantized)]
        stored = {p for module in rounded for p in module.parameters()}  # numbers and scales, packed
        others = sum(p.numel() for p in self.model.parameters() if p not in stored)
        kind = f"{rounded[0].quantization.kind} and " if rounded else ""
        return (
            f"Llama({(others + sum(module.numbers for module in rounded)) / 1e6:,.1f} million parameters on this "
            f"process, {kind}{str(weight.dtype).removeprefix('torch.')} on {weight.device}; {params.n_layers} layers "
            f"of dim {params.dim}; {self.tokenizer.n_words} pieces; cache for {params.max_batch_size} prompts of "
            f"{params.max_seq_len} tokens)"
        )

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], Optional[list[list[float]]]]:
        """Continue prompts of ids, each up to (and without) EOS, or until the cache is full.

        Args:
            prompt_tokens: at most max_batch_size lists of ids, BOS included.
            max_gen_len: ids that follow each prompt, at most.
            temperature: 0 takes the best id; above it, ids are drawn, the more freely the higher it is. Default: 0.6.
            top_p: ids are drawn from the fewest best whose mass exceeds this. Default: 0.9.
            logprobs: report each id's log-probability. Default: False.
            echo: put the prompt in front. Default: False.

        Returns:
            The ids of each prompt; and with `logprobs` each id's natural log-probability under the model's own
            distribution (no temperature, no top-p), 0.0 for an echoed prompt's first id; otherwise None.

        Raises:
            ValueError: more prompts than max_batch_size; a prompt that is empty, longer than max_seq_len, or has an id
                outside the vocabulary; an option out of range; logits that are not finite.
        """
        limit = self.model.params.max_batch_size

        def prompts() -> Prompts:
            if isinstance(prompt_tokens, Sequence) and len(prompt_tokens) > limit:
                raise ValueError(
                    f"{len(prompt_tokens)} prompts, but max_batch_size is {limit}; pass fewer at once, "
                    f"or build with max_batch_size={len(prompt_tokens)}"
                )
            return Prompts(prompt_tokens)

        options = _given(temperature, top_p, max_gen_len, bool(logprobs))
        call = self._start(Asked(prompts, options, echo)).call
        tokens = [list(request.prompt) if echo else [] for request in call.requests]
        scores: list[list[float]] = [[] for _ in call.requests]
        with self._undisturbed(call):
            for step in call:
                scores[step.index] += step.prompt_logprobs or []
                if step.token is not None:
                    tokens[step.index].append(step.token)
                    scores[step.index].append(step.logprob)
        return tokens, scores if logprobs else None

    def steps(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: Union[bool, int] = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> Call:
        """`generate` for any number of prompts, a step at a time.

        Args:
            prompt_tokens: lists of ids, BOS included.
            temperature, top_p, max_gen_len, logprobs, echo: as in `text_completion`.
            options: stop, stop_ids, seed, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, draft, n, constraint. `llama.Options` describes them.

        Returns:
            What to iterate over for one `Step` after the other, once, and as far as you like. Its `cancel(index)` ends
            one prompt.

        Raises:
            ValueError: as `generate`.
        """
        given = _given(temperature, top_p, max_gen_len, logprobs, options)
        return self._start(Asked(lambda: Prompts(prompt_tokens), given, echo), streams=True).call

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: Union[bool, int] = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> list[CompletionPrediction]:
        """Continue any number of texts; those that find no slot of the cache wait for one.

        If there are several copies of the model, each takes its share of the texts, and every process returns all.

        Args:
            prompts: a list of texts.
            temperature: 0 takes the best id; above it, ids are drawn, the more freely the higher it is. Default: 0.6.
            top_p: ids are drawn from the fewest best whose mass exceeds this. Default: 0.9.
            max_gen_len: ids of each answer, at most. Default: max_seq_len - 1.
            logprobs: True reports each id's natural log-probability, a number N also the N best ids at each place.
                Default: False.
            echo: put the prompt in front. Default: False.
            options: stop=None, stop_ids=(), seed=None, top_k=0, min_p=0.0, repetition_penalty=1.0,
                presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, draft=None, n=1, constraint=None.
                `llama.Options` describes them.

        Returns:
            A prediction for each text, in order; n of them for each with the option n.

        Raises:
            ValueError: prompts that are not a list of texts; a prompt longer than max_seq_len; an option that is
                unknown or out of range; logits that are not finite.
        """
        given = _given(temperature, top_p, max_gen_len, logprobs, options)
        asked = Asked(lambda: Prompts(self._encode(prompts)), given, echo)
        return self._by_generate(asked, echo=echo)[1] if self._replaced_generate else self._complete(asked)[1]

    def stream_text(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: Union[bool, int] = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> Iterator[Chunk]:
        """`text_completion` as it is decided. The stream may be left at any time; on several processes, at the same
        chunk.

        Args:
            prompts: a list of texts.
            temperature, top_p, max_gen_len, logprobs, echo: as in `text_completion`.
            options: stop, stop_ids, seed, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, draft, n, constraint. `llama.Options` describes them.

        Returns:
            Chunks of all prompts, each prompt's in order: `index` says whose it is.

        Raises:
            ValueError: as `text_completion`, before the first chunk is asked for.
        """
        given = _given(temperature, top_p, max_gen_len, logprobs, options)
        return self._stream(Asked(lambda: Prompts(self._encode(prompts)), given, echo))[1]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: Union[bool, int] = False,
        *,
        on_unsafe: Literal["reply", "raise"] = "reply",
        continue_final_message: bool = False,
        **options: Unpack[Options],
    ) -> list[ChatPrediction]:
        """The assistant's reply to each of any number of dialogs.

        Args:
            dialogs: each a list of messages {"role": …, "content": …}, from [system,] user, assistant, … user.
            temperature, top_p, max_gen_len, logprobs: as in `text_completion`.
            on_unsafe: what becomes of a dialog whose messages contain a tag of the chat format. "reply" answers it with
                `UNSAFE_ERROR`, without tokens and without running it; "raise" raises DialogError. Default: "reply".
            continue_final_message: the dialogs end with the beginning of the assistant's reply, and the predictions are
                what follows it: the two texts, joined, are the reply. Default: False.
            options: stop, stop_ids, seed, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, draft, n, constraint. `llama.Options` describes them.

        Returns:
            A prediction for each dialog, in order; n of them for each with the option n.

        Raises:
            DialogError: a dialog that is empty, out of turn, or not made of messages. It is a ValueError.
            ValueError: as `text_completion`.
        """
        given = ending(self.chat_format, self.tokenizer, _given(temperature, top_p, max_gen_len, logprobs, options))
        asked = Asked(lambda: self.encode_dialogs(dialogs, on_unsafe, continue_final_message), given)
        if not self._replaced_generate:
            prompts, completions = self._complete(asked)
        elif continue_final_message:
            raise ValueError("generate was replaced by another one, which takes no continue_final_message")
        else:
            prompts, completions = self._by_generate(asked)
        replies = dict(zip(prompts.places, completions))
        return [chat_prediction(replies.get(i), logprobs) for i in range(len(dialogs) * options.get("n", 1))]

    def stream_chat(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: Union[bool, int] = False,
        *,
        on_unsafe: Literal["reply", "raise"] = "reply",
        continue_final_message: bool = False,
        **options: Unpack[Options],
    ) -> Iterator[Chunk]:
        """`chat_completion` as it is decided. The replies to unsafe dialogs come first.

        Args:
            dialogs, temperature, top_p, max_gen_len, logprobs, on_unsafe, continue_final_message: as in
                `chat_completion`.
            options: stop, stop_ids, seed, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, draft, n, constraint. `llama.Options` describes them.

        Returns:
            Chunks of all dialogs, each dialog's in order: `index` says whose it is.

        Raises:
            ValueError: as `chat_completion`, before the first chunk is asked for.
        """
        given = ending(self.chat_format, self.tokenizer, _given(temperature, top_p, max_gen_len, logprobs, options))
        prompts, chunks = self._stream(
            Asked(lambda: self.encode_dialogs(dialogs, on_unsafe, continue_final_message), given)
        )
        return chat_chunks(chunks, prompts.places, len(dialogs) * options.get("n", 1))

    def infill(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: Union[bool, int] = False,
        *,
        suffix_first: bool = False,
        **options: Unpack[Options],
    ) -> list[CompletionPrediction]:
        """What stands between each prefix and its suffix, for models with Code Llama's pieces for it.

        Args:
            prefixes, suffixes: two lists of texts, of equal length.
            temperature, top_p, max_gen_len, logprobs: as in `text_completion`.
            suffix_first: let the model read the suffix first. Default: False, as in Meta's release.
            options: stop, stop_ids, seed, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, draft, n, constraint. `llama.Options` describes them.

        Returns:
            A prediction for each pair, in order.

        Raises:
            ValueError: a tokenizer without these pieces; otherwise as `text_completion`.
        """
        asked = self._between(
            prefixes, suffixes, suffix_first, _given(temperature, top_p, max_gen_len, logprobs, options)
        )
        return self._by_generate(asked)[1] if self._replaced_generate else self._complete(asked)[1]

    def stream_infill(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: Union[bool, int] = False,
        *,
        suffix_first: bool = False,
        **options: Unpack[Options],
    ) -> Iterator[Chunk]:
        """`infill` as it is decided.

        Args:
            prefixes, suffixes, temperature, top_p, max_gen_len, logprobs, suffix_first: as in `infill`.
            options: stop, stop_ids, seed, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, draft, n, constraint. `llama.Options` describes them.

        Returns:
            Chunks, as from `stream_text`.
        """
        given = _given(temperature, top_p, max_gen_len, logprobs, options)
        return self._stream(self._between(prefixes, suffixes, suffix_first, given))[1]

    def _between(
        self, prefixes: Sequence[str], suffixes: Sequence[str], suffix_first: bool, given: dict[str, Any]
    ) -> Asked:
        given = with_stops(given, [infilling_ids(self.tokenizer).eot])
        return Asked(lambda: infilling_prompts(prefixes, suffixes, self.tokenizer, suffix_first), given)

    def chat(
        self, system: Optional[str] = None, *, dialog: Optional[Dialog] = None, **options: Unpack[TurnOptions]
    ) -> ChatSession:
        """A conversation that remembers: each turn runs only what is new.

        Args:
            system: the system message. Default: none.
            dialog: what was said before, as `chat_completion` takes it, up to a reply. Default: nothing.
            options: of every turn. temperature, top_p, max_gen_len and logprobs as in `text_completion`; stop,
                stop_ids, seed, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias,
                draft, constraint as in `llama.Options`, but no n.

        Raises:
            DialogError: a dialog that the format cannot express, or a message with a tag of the format.
            ValueError: an option that is unknown or out of range.
        """
        return ChatSession(self, system, dialog=dialog, **options)

    def continue_ids(
        self,
        prompt: Sequence[int],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: Union[bool, int] = False,
        *,
        begun: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> Iterator[Chunk]:
        """Stream what follows one prompt of ids, running only what the cache does not hold from the call before.

        Args:
            prompt: ids, BOS included.
            temperature, top_p, max_gen_len, logprobs: as in `text_completion`.
            begun: the last ids of the prompt, if the text is to go on from theirs: then it begins with the space
                between two words, which it would otherwise lack. Default: none.
            options: stop, stop_ids, seed, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                logit_bias, draft, n, constraint. `llama.Options` describes them.

        Returns:
            Chunks, as from `stream_text`.
        """
        given = _given(temperature, top_p, max_gen_len, logprobs, options)
        return self._stream(Asked(lambda: Prompts([prompt], [begun]), given, continues=True))[1]

    def check_options(self, options: Mapping[str, Any]) -> None:
        """ValueError unless a completion of one prompt would take them, with one answer."""
        choice = parse_options(options, 1, self.model.vocab_size, self.model.params.max_seq_len)
        forms(choice.constraint, self.tokenizer, [()], ())
        if choice.n > 1:
            raise ValueError(
                f"n={options['n']}: here a prompt has one answer; text_completion and chat_completion take n"
            )

    @overload
    def score(
        self, texts: Sequence[str], continuations: None = None, *, stride: Optional[int] = None
    ) -> list[Score]: ...

    @overload
    def score(self, texts: Sequence[str], continuations: Sequence[str]) -> list[ContinuationScore]: ...

    def score(
        self, texts: Sequence[str], continuations: Optional[Sequence[str]] = None, *, stride: Optional[int] = None
    ) -> Union[list[Score], list[ContinuationScore]]:
        """How probable the model finds each text, token by token, with BOS in front; or, if `continuations` are given,
        each of these after the text of the same index: score([context], [continuation]).

        A text longer than max_seq_len is read in windows; each token is scored once, in the first window that holds it.
        A context and its continuation are encoded as one text, which is split behind as many ids as the context has by
        itself. What contexts begin with in common is read once.

        Args:
            texts: a list of texts; with continuations the contexts, which may be empty.
            continuations: a list of texts, one for each context. Default: none.
            stride: tokens between the beginnings of two windows. Default: half of max_seq_len. Not with continuations.

        Raises:
            ValueError: texts that are not a list of texts, or a stride out of range; a continuation without ids of its
                own; a pair of more than max_seq_len + 1 ids, BOS included (the last one is not read).
        """
        if continuations is not None:
            if stride is not None:
                raise ValueError(
                    f"stride={shortened(stride)} is for texts without continuations: a pair is read in one piece"
                )
            return self._score_pairs(lambda: encode_pairs(lambda text: self._encode([text])[0], texts, continuations))
        size = self.model.params.max_seq_len
        stride = max(1, size // 2) if stride is None else stride
        stride = whole_number("stride", stride, 1, max(size - 1, 1), f"from 1 to max_seq_len - 1 = {size - 1}")
        ids: list[list[int]] = []
        windows: list[tuple[int, int]] = []

        def prompts() -> Prompts:
            ids.extend(self._encode(texts))
            windows.extend((i, at) for i, row in enumerate(ids) for at in window_starts(len(row), size, stride))
            return Prompts([ids[i][at : at + size] for i, at in windows])

        call = self._start(Asked(prompts, _given(0, 1, 0, True), echo=True)).call
        with self._undisturbed(call):
            parts = {step.index: step.prompt_logprobs or [] for step in call}
        scores: list[list[float]] = [[] for _ in ids]
        for window, (i, at) in enumerate(windows):
            scores[i] += parts[window][len(scores[i]) - at :]
        return [
            Score(tokens=split(self.tokenizer, row), logprobs=values, perplexity=perplexity(values))
            for row, values in zip(ids, scores)
        ]

    def score_ids(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[ContinuationScore]:
        """How probable the model finds each continuation after its context, both as ids.

        Args:
            contexts: ids of each context, one at least (BOS, for example, which none gets here).
            continuations: ids of what follows each, one at least.

        Raises:
            ValueError: what is no list of lists of ids, an unknown id, and a pair of more than max_seq_len + 1 ids (the
                last one is not read).
        """
        return self._score_pairs(lambda: id_pairs(contexts, continuations, self.model.params))

    def _score_pairs(self, pairs: Callable[[], list[Pair]]) -> list[ContinuationScore]:
        made: list[Pair] = []
        order: list[int] = []

        def prompts() -> Prompts:
            made.extend(pairs())
            places, prompts = pair_prompts(made, self.model.params)
            order.extend(places)
            return prompts

        call = self._start(Asked(prompts, _given(0, 1, 0, 1))).call  # with the best id at each place
        scores: dict[int, ContinuationScore] = {}
        with self._undisturbed(call), progress(call) as bar:
            for step in call:
                place = order[step.index]
                scores[place] = pair_score(self.tokenizer, made[place], step)
                bar.update()
        return [scores[i] for i in range(len(made))]

    @torch.no_grad()
    def embed(
        self, texts: Sequence[str], *, layer: int = -1, pooling: Literal["mean", "last"] = "mean"
    ) -> torch.Tensor:
        """Hidden states of texts, BOS in front, as one vector each: float32 (texts, dim).

        Args:
            texts: a list of texts.
            layer: how many blocks to run, 0 for the embeddings alone; -1, the default, is all of them and the last
                norm.
            pooling: "mean" over a text's tokens, the default, or "last" for its last token's.

        Raises:
            ValueError: a text longer than max_seq_len, or another layer or pooling than there is.
        """
        with self._alike("_embed", texts, layer, pooling):
            return self._embed(texts, layer, pooling)

    def _embed(self, texts: Sequence[str], layer: int, pooling: str) -> torch.Tensor:
        with self.lock, together(self._group) as agreement:
            if pooling not in ("mean", "last"):
                raise ValueError(f"pooling={shortened(pooling)} must be 'mean' or 'last'")
            blocks, most = whole(layer), self.model.n_layers
            if blocks is None or not -1 <= blocks <= most:
                raise ValueError(f"layer={shortened(layer)} must be from 0 to {most}, or -1 for all and the last norm")
            layer = blocks
            self._engine.check_files()
            prompts = check_prompts(self._encode(texts), self.model.params)
            agreement.values = {"prompts": prompts, "layer": layer, "pooling": pooling}
        vectors = []
        with self._engine.turn():
            slot = self._scheduler.lend_slot()
            for prompt in prompts:
                passes = self._engine.prefill([prompt], [slot], layers=layer, pass_length=len(prompt))
                chunks = [hidden[0].float() for _, hidden, _ in passes]
                vectors.append(torch.cat(chunks).mean(0) if pooling == "mean" else chunks[-1][-1])
            if not vectors:
                return torch.empty(0, self.model.params.dim, dtype=torch.float32, device=self._engine.device)
            stacked = torch.stack(vectors)
            if not all(finite := stacked.isfinite().all(-1).tolist()):
                raise self._engine.not_finite(finite.index(False), "hidden states", slot)
        return stacked

    @property
    def _replaced_generate(self) -> bool:
        """Whether a subclass, or somebody on this object or on the class, has a `generate` of their own."""
        return "generate" in vars(self) or type(self).generate is not GENERATE

    def _by_generate(self, asked: Asked, **echo: bool) -> tuple[Prompts, list[CompletionPrediction]]:
        """Completions by a `generate` that somebody has put in Meta's place, called as Meta's code calls it."""
        temperature, top_p, length, logprobs = (asked.options[name] for name in METAS_OPTIONS)
        if other := set(asked.options) - set(METAS_OPTIONS):
            raise ValueError(f"generate was replaced by another one, which takes no {', '.join(sorted(other))}")
        length = self.model.params.max_seq_len - 1 if length is None else length
        prompts = asked.prompts()
        tokens, scores = self.generate(
            prompt_tokens=prompts.ids,
            max_gen_len=length,
            temperature=temperature,
            top_p=top_p,
            logprobs=bool(logprobs),
            **echo,
        )
        completions = []
        for i, row in enumerate(tokens):
            reason: FinishReason = "length" if len(row) >= length else "stop"
            completions.append(CompletionPrediction(generation=self.tokenizer.decode(row), finish_reason=reason))
            if logprobs:
                completions[-1]["tokens"] = split(self.tokenizer, row)
                completions[-1]["logprobs"] = list(scores[i]) if scores else []
        return prompts, completions

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in list_of_texts("prompts", prompts)]

    def encode_dialogs(self, dialogs: Sequence[Dialog], on_unsafe: str, continue_final_message: bool) -> Prompts:
        """The prompts of the safe dialogs. For the arguments and errors see `chat_completion`."""
        if isinstance(dialogs, str) or not isinstance(dialogs, Sequence):
            raise ValueError(f"dialogs is a list of dialogs, not {type(dialogs).__name__}; put one into a list")
        if on_unsafe not in ("reply", "raise"):
            raise ValueError(f"on_unsafe={shortened(on_unsafe)} must be 'reply' or 'raise'")
        written, tokenizer = self.chat_format, self.tokenizer
        tags = written.tags(tokenizer)
        for dialog in dialogs:
            check_dialog(dialog, continue_final_message)
        safe = [i for i, dialog in enumerate(dialogs) if not is_unsafe(dialog, tags)]
        if on_unsafe == "raise" and len(safe) < len(dialogs):
            raise DialogError(f"{UNSAFE_ERROR} (dialog {min(set(range(len(dialogs))) - set(safe))})")
        prompts = [written.encode_dialog(dialogs[i], tokenizer, continue_final_message) for i in safe]
        if not continue_final_message:
            return Prompts(prompts, places=safe)
        asked = [written.encode_dialog(dialogs[i][:-1], tokenizer) for i in safe]
        begun = [ids[in_common(ids, before) :] for ids, before in zip(prompts, asked)]
        return Prompts(prompts, begun, safe)

    def _start(self, asked: Asked, share: tuple[int, int] = (0, 1), *, streams: bool = False) -> Running:
        """A call of this replica's share (which, of how many) of the prompts. All is checked, on every process alike,
        before anything runs. streams: see `Call`."""
        (which, replicas), leader = share, self._leader
        # The processes that make this call, all with the same arguments.
        group = None if leader is not None else self._group
        with self.lock if group is not None else nullcontext(), together(group, everyone=replicas > 1) as agreement:
            self._engine.check_files()
            prompts = asked.prompts()
            ids = check_prompts(prompts.ids, self.model.params)
            choice = parse_options(asked.options, len(ids), self.model.vocab_size, self.model.params.max_seq_len)
            agreement.values = {"prompts": ids, "scored": prompts.scored, "echo": bool(asked.echo), **choice.values()}
            if group is not None:  # a row of one process only would wait for the others for ever
                agreement.values = {**agreement.values, "streams under way": self._scheduler.running}
            prompts = prompts._replace(ids=ids).times(choice.n)
            stops = self.tokenizer.stop_ids if isinstance(self.tokenizer, Tokenizer) else {self.tokenizer.eos_id}
            ends = frozenset({*stops, *choice.stop_ids})
            before = prompts.ids if asked.echo else prompts.begun or [()] * len(prompts.ids)
            grammars = forms(choice.constraint, self.tokenizer, before, ends)
        least = 1 if asked.continues else LEAST_SHARED
        scored = prompts.scored or (prompts.ids if choice.scored and asked.echo else [()] * len(prompts.ids))
        made = partial(
            Request, logprobs=choice.scored, alternatives=choice.alternatives, draft=choice.draft, least_shared=least
        )
        requests = [
            made(ids, choice.length, choice.sampling, seed, ends, scored=told, scored_from=at, grammar=grammar)
            for ids, seed, grammar, told in zip(map(list, prompts.ids), choice.seeds, grammars, scored)
            for at in [0 if asked.echo else len(ids) + 1 - len(told)]  # they end one behind the prompt
        ][which::replicas]
        generator, seed, device = None, choice.seed, self._engine.device
        if seed is None and choice.sampling.temperature > 0:
            broadcast_random_state(device, group)
            if leader is not None:  # wherever a row runs, and whatever runs beside it
                requests = [r if r.seed is not None else replace(r, seed=_drawn_seed(device)) for r in requests]
            elif replicas > 1:  # copies that draw alike would write alike
                seed = _drawn_seed(device)
        if seed is not None:
            generator = torch.Generator(device).manual_seed(seed + which)
        lanes = min(len(requests), self.model.params.max_batch_size)
        source = Source(lanes, generator, None if sample_top_p is SAMPLE_TOP_P else sample_top_p)
        plainly = not all_agree(self._engine.is_as_built, group)
        if self._engine.batch_invariant and (plainly or source.draw is not None):
            raise ValueError(INVARIANT_AS_BUILT)
        if leader is not None:
            self._check_leads(leader)
        pace = partial(keep_pace, group) if streams else lambda: None
        call = Call(leader or self._scheduler, requests, source, streams=streams, plainly=plainly, before_step=pace)
        return Running(call, choice, prompts)

    def _undisturbed(self, call: Call) -> AbstractContextManager[Any]:
        """A block for a call that is run to its end: others wait, if the model does not let their steps in between."""
        alike = self._group is not None and self._leader is None
        return self.lock if call.plainly or alike else nullcontext()

    def begin(self, asked: Asked, *, streams: bool = True) -> tuple[Prompts, Completions]:
        """A stream that was checked, and of which nothing runs until it is read. streams: see `Call`."""
        if self._replaced_generate:
            raise ValueError(
                "generate was replaced, and streams do not go through it; use text_completion or chat_completion"
            )
        call, choice, prompts = self._start(asked, streams=streams)
        return prompts, Completions(self.tokenizer, call, stops=choice.stops, echo=asked.echo, begun=prompts.begun)

    def _stream(self, asked: Asked) -> tuple[Prompts, Iterator[Chunk]]:
        prompts, completions = self.begin(asked)
        return prompts, iter(completions)

    def _complete(self, asked: Asked) -> tuple[Prompts, list[CompletionPrediction]]:
        """Drain the stream of this replica's share of the prompts, and put all shares together."""
        which, replicas = replica() if self._replicated and self._leader is None else (0, 1)
        call, choice, prompts = self._start(asked, (which, replicas))
        begun = prompts.begun[which::replicas]
        with self._undisturbed(call):
            chunks = Completions(self.tokenizer, call, stops=choice.stops, echo=asked.echo, begun=begun)
            mine = predictions(self.tokenizer, shown(chunks, call), len(call.requests), begun)
            shares = gather_from_replicas(mine) if replicas > 1 else [mine]
        whole = [CompletionPrediction() for part in shares for _ in part]
        for other, part in enumerate(shares):
            whole[other::replicas] = part
        return prompts, whole

    @property
    def _replicated(self) -> bool:
        """Whether fairscale's groups are still those that this model was built for, and hold copies of it."""
        return model_parallel_group() is self._group


def _checked(given: Mapping[str, Any], place: torch.device) -> tuple[Optional[int], int, int]:
    """The numbers among the arguments of `build`: max_seq_len, max_batch_size, seed. ValueError if an argument is not
    right."""
    sizes = {"max_seq_len": given["max_seq_len"], "max_batch_size": given["max_batch_size"]}
    for name, size in sizes.items():
        if size is not None or name == "max_batch_size":
            sizes[name] = whole_number(name, size, 1, 2**31 - 1, "of 1 or more, and below 2**31")
    seed = whole_number("seed", given["seed"], -(2**63), 2**64 - 1, "of 64 bits")
    compile, batch_invariant = given["compile"], given["batch_invariant"]
    if compile not in (None, True, False):
        raise ValueError(f"compile={shortened(compile)} must be True, False or None")
    if batch_invariant not in (True, False):
        raise ValueError(f"batch_invariant={shortened(batch_invariant)} must be True or False")
    if batch_invariant:
        check_invariant(place, compile)
    check_format(given["chat_format"])
    if given["ckpt_dir"] is None and given["tokenizer_path"] is not None:
        raise ValueError(f"tokenizer_path={given['tokenizer_path']!r} without a checkpoint; pass ckpt_dir as well")
    return sizes["max_seq_len"], sizes["max_batch_size"], seed


def _build_over(processes: int, given: dict[str, Any]) -> Llama:
    """`Llama.build` on processes that this one starts."""
    count, place = check(processes, given)
    _checked(given, place)
    if count == 1:
        return Llama.build(**given)
    check_shares(given["ckpt_dir"], given["draft"], given["model_parallel_size"] or count)
    with started(count, Llama.build, given) as followers:
        llama = Llama.build(**given)
        llama._meets_others()
        llama._leader, llama._followers = Leader(llama._scheduler, followers), followers
        followers.follow(llama._leader)
    return llama


class Running(NamedTuple):
    """A call whose arguments were checked, and what was made of them."""

    call: Call
    choice: Choice
    prompts: Prompts


def _drawn_seed(device: torch.device) -> int:
    return int(torch.randint(2**62, (), device=device))


def _given(
    temperature: float,
    top_p: float,
    max_gen_len: Optional[int],
    logprobs: Union[bool, int],
    options: Optional[Options] = None,
) -> dict[str, Any]:
    """Meta's arguments and the options, by name."""
    metas = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "logprobs": logprobs}
    return {**metas, **(options or {})}


GENERATE = Llama.generate
