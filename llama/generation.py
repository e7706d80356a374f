"""`Llama`: build a model, and generate ids, completions and chat replies with it. Text lives at this edge only."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Optional, TypedDict, Union

import torch

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
    encode_dialog,
    is_unsafe,
)
from .checkpoint import check_weights, fill, fit_vocabulary, open_checkpoint
from .engine import Engine, token_logprobs
from .model import ModelArgs, Transformer, check_args
from .parallel import broadcast_random_state, group_size, is_first_process, model_parallel_group, together
from .sampling import check_sampling, next_token, sample_top_p
from .tokenizer import Tokenizer, user_path

DEMO = Path(__file__).parent / "demo"  # the model that comes with the package
DEMO_POSITIONS = 512

__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR",
    "ChatPrediction", "CompletionPrediction", "Dialog", "DialogError", "Llama", "Message", "Role", "sample_top_p",
]  # fmt: skip


class CompletionPrediction(TypedDict, total=False):
    """`tokens` and `logprobs` are there if logprobs=True: one string and one number for each id; the strings, joined,
    are `generation`."""

    generation: str
    tokens: list[str]
    logprobs: list[float]


class ChatPrediction(TypedDict, total=False):
    """As `CompletionPrediction`, with the assistant's message in place of the text."""

    generation: Message
    tokens: list[str]
    logprobs: list[float]


@dataclass
class Step:
    """What one step decided for the row `row`."""

    row: int
    token: int
    logprob: float


class Llama:
    """A model and its tokenizer.

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
    ) -> Llama:
        """Load a folder in Meta's or Hugging Face's format onto this process, or onto all processes that torchrun started.

        ckpt_dir: the demo model that comes with this package if not given. tokenizer_path: if not given, the file
        tokenizer.model in ckpt_dir or in the folder above it. max_seq_len, max_batch_size: tokens (prompt and answer
        together; 2048 if not given, 512 for the demo model) and prompts that the cache has room for.
        model_parallel_size: how many processes share one copy of the model; all of them if not given. It need not be
        the number of shards. seed: of torch's generators, the same on every process. device: "cuda", "mps" or "cpu",
        the first of these that is there if not given. dtype: "float32", "bfloat16" or "float16", the checkpoint's own
        if not given (float16 for a bfloat16 checkpoint where the device cannot compute in bfloat16).

        Raises ValueError, on every process, before any weight is copied, where an argument or a file is not right.
        """
        started = time.time()
        folder = DEMO if ckpt_dir is None else user_path(ckpt_dir)
        trained = DEMO_POSITIONS if folder == DEMO else None
        if max_seq_len is None:
            max_seq_len = trained or 2048
        for name, limit in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
            if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
                raise ValueError(f"{name}={limit!r} must be a whole number of 1 or more")
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed={seed!r} must be a whole number of 64 bits")
        place = runtime.start(device, model_parallel_size)
        if ckpt_dir is None and tokenizer_path is not None:
            raise ValueError(f"tokenizer_path={tokenizer_path!r} without a checkpoint; pass ckpt_dir as well")
        # Tensors made in inference mode could not be used outside it.
        with together(everyone=True), torch.inference_mode(False):
            checkpoint = open_checkpoint(folder)
            tokenizer = Tokenizer(_find_tokenizer(folder) if tokenizer_path is None else tokenizer_path)
            args = fit_vocabulary(checkpoint, tokenizer.n_words)
            args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            check_args(args, group_size(model_parallel_group()))
            chosen_dtype = runtime.choose_dtype(dtype, checkpoint.dtype, place)
            processes, sharers = group_size(model_parallel_group()), runtime.memory_sharers(place)
            with torch.device("meta"):
                model = Transformer(args)
            check_weights(model, checkpoint)
            memory.check_fits(args, chosen_dtype, processes, place, sharers)
        with (
            together(everyone=True),
            torch.inference_mode(False),
            memory.explained(args, chosen_dtype, processes, place, sharers),
        ):
            fill(model, checkpoint, place, chosen_dtype)
        _warn_beyond_training(args, trained)
        torch.manual_seed(seed)
        print(f"Loaded in {time.time() - started:.2f} seconds")
        if ckpt_dir is None:
            print(
                "This is the demo model, which tells small children's stories. For Llama 2, download its weights "
                "(see README.md) and pass ckpt_dir (--ckpt_dir)."
            )
        return Llama(model.eval().requires_grad_(False), tokenizer)

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._group = model.output.group  # the processes that share this model

    @torch.inference_mode()
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], Optional[list[list[float]]]]:
        """Continue prompts of ids by at most `max_gen_len` ids each, up to (and without) EOS or the end of the cache.

        temperature 0 takes the best id; above it, ids are drawn from the fewest best whose mass exceeds `top_p`.
        echo puts the prompt in front. Returns the ids, and with `logprobs` each one's natural log-probability under the
        model's own distribution (no temperature, no top-p), 0.0 for an echoed prompt's first id; otherwise None.

        Raises ValueError for more prompts than max_batch_size, a prompt that is empty, longer than max_seq_len or has
        an id outside the vocabulary, options out of range, and logits that are not finite.
        """
        with together(self._group) as agreement:
            prompts = self._check(prompt_tokens, max_gen_len, temperature, top_p)
            agreement.value = (prompts, max_gen_len, temperature, top_p, logprobs, echo)
        tokens = [list(prompt) if echo else [] for prompt in prompts]
        scores: list[list[float]] = [[] for _ in prompts]
        if not prompts:
            return tokens, scores if logprobs else None
        engine = Engine(self.model)
        with self._explaining_memory():
            hidden = engine.prefill(prompts)
            if logprobs and echo:
                scores = engine.prompt_logprobs(hidden, prompts)
                for row, row_scores in enumerate(scores):
                    if any(map(math.isnan, row_scores)):
                        raise self._not_finite(row)
            for step in self._steps(engine, hidden, prompts, max_gen_len, temperature, top_p, logprobs):
                tokens[step.row].append(step.token)
                scores[step.row].append(step.logprob)
        return tokens, scores if logprobs else None

    def _explaining_memory(self) -> AbstractContextManager[None]:
        weight = self.model.norm.weight
        processes, sharers = group_size(self._group), runtime.memory_sharers(weight.device)
        return memory.explained(self.model.params, weight.dtype, processes, weight.device, sharers)

    def _steps(
        self,
        engine: Engine,
        hidden: torch.Tensor,
        prompts: list[list[int]],
        max_gen_len: int,
        temperature: float,
        top_p: float,
        logprobs: bool,
    ) -> Iterator[Step]:
        """The ids that follow the prompts, as they are decided. The one place that decides where a row ends."""
        limit = self.model.params.max_seq_len
        ends = [min(limit, len(prompt) + max_gen_len) for prompt in prompts]
        places = [len(prompt) for prompt in prompts]  # where each row's next id will stand
        active = {row for row, place in enumerate(places) if place < ends[row]}
        if not active:
            return
        if temperature > 0:
            broadcast_random_state(engine.device, self._group)
        logits = engine.last_logits(hidden, prompts)
        while True:
            # Rows that ended are drawn for as well: the draws of the others must not depend on them.
            chosen = next_token(logits, temperature, top_p)
            scored = token_logprobs(logits, chosen.clamp(min=0)).tolist() if logprobs else [0.0] * len(prompts)
            for row, token in enumerate(chosen.tolist()):
                if row not in active:
                    continue
                if token < 0:
                    raise self._not_finite(row)
                if token == self.tokenizer.eos_id:
                    active.remove(row)
                    continue
                yield Step(row, token, scored[row])
                places[row] += 1
                if places[row] == ends[row]:
                    active.remove(row)
            if not active:
                return
            # A row that ended writes over its own last place, which nobody reads any more.
            logits = engine.logits(engine.decode(chosen.clamp(min=0), [place - 1 for place in places])[:, -1])

    def _not_finite(self, prompt: int) -> ValueError:
        dtype = self.model.norm.weight.dtype
        way = "check the weights" if dtype == torch.float32 else "build it with dtype='float32' (or 'bfloat16')"
        return ValueError(f"the model's logits for prompt {prompt} are not finite in {dtype}; {way}")

    def _check(
        self, prompt_tokens: Sequence[Sequence[int]], max_gen_len: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        check_sampling(temperature, top_p)
        if isinstance(max_gen_len, bool) or not isinstance(max_gen_len, int) or max_gen_len < 0:
            raise ValueError(f"max_gen_len={max_gen_len!r} must be a whole number of 0 or more")
        params = self.model.params
        if not isinstance(prompt_tokens, Sequence):
            raise ValueError(f"prompt_tokens must be a list of lists of ids, not {type(prompt_tokens).__name__}")
        if len(prompt_tokens) > params.max_batch_size:
            raise ValueError(
                f"{len(prompt_tokens)} prompts, but max_batch_size is {params.max_batch_size}; "
                f"pass fewer at once, or build with max_batch_size={len(prompt_tokens)}"
            )
        try:
            prompts = [[index(token) for token in prompt] for prompt in prompt_tokens]
        except TypeError as error:
            raise ValueError(f"prompt_tokens must be lists of ids: {error}") from error
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {row} is empty; it needs at least one id, BOS ({self.tokenizer.bos_id}) for example")
            if len(prompt) > params.max_seq_len:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens, but max_seq_len is {params.max_seq_len}; "
                    f"shorten it, or build with max_seq_len={len(prompt)} or more"
                )
            for token in prompt:
                if not 0 <= token < params.vocab_size:
                    raise ValueError(
                        f"prompt {row} has the id {token}, which is outside the vocabulary; "
                        f"ids go from 0 to {params.vocab_size - 1}"
                    )
        return prompts

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continue each text. For the options and errors see `generate`; max_gen_len is max_seq_len - 1 if not given."""
        with together(self._group):
            if isinstance(prompts, str) or not isinstance(prompts, Sequence):
                raise ValueError(f"prompts is a list of texts, not {type(prompts).__name__}; put one text into a list")
            ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        tokens, scores = self.generate(ids, self._length(max_gen_len), temperature, top_p, logprobs, echo)
        predictions = [CompletionPrediction(generation=self.tokenizer.decode(row)) for row in tokens]
        for prediction, row, row_scores in zip(predictions, tokens, scores or []):
            prediction["tokens"] = self.tokenizer.split(row)
            prediction["logprobs"] = row_scores
        return predictions

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """The assistant's reply to each dialog. For the options and errors see `generate`.

        A dialog that is not [system,] user, assistant, … user raises `DialogError`. One whose messages contain a tag of
        the format is not run: its reply is `UNSAFE_ERROR`, without tokens.
        """
        with together(self._group):
            if isinstance(dialogs, str) or not isinstance(dialogs, Sequence):
                raise ValueError(f"dialogs is a list of dialogs, not {type(dialogs).__name__}")
            for dialog in dialogs:
                check_dialog(dialog)
            safe = [i for i, dialog in enumerate(dialogs) if not is_unsafe(dialog)]
            ids = [encode_dialog(dialogs[i], self.tokenizer) for i in safe]
        tokens, scores = self.generate(ids, self._length(max_gen_len), temperature, top_p, logprobs)
        rows = dict(zip(safe, tokens))
        row_scores = dict(zip(safe, scores or []))
        predictions = []
        for i in range(len(dialogs)):
            content = self.tokenizer.decode(rows[i]) if i in rows else UNSAFE_ERROR
            prediction = ChatPrediction(generation=Message(role="assistant", content=content))
            if logprobs:
                prediction["tokens"] = self.tokenizer.split(rows.get(i, []))
                prediction["logprobs"] = row_scores.get(i, [])
            predictions.append(prediction)
        return predictions

    def _length(self, max_gen_len: Optional[int]) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len


def _find_tokenizer(ckpt_dir: Path) -> str:
    """Meta's layout has one tokenizer.model beside the folders of all models; others have it in each."""
    if not ckpt_dir.is_dir():
        raise ValueError(f"no checkpoint folder at {ckpt_dir}; pass the folder that holds consolidated.00.pth and params.json")
    for folder in (ckpt_dir, ckpt_dir.absolute().parent):
        if (folder / "tokenizer.model").is_file():
            return str(folder / "tokenizer.model")
    raise ValueError(f"no tokenizer.model in {ckpt_dir} or in the folder above it; pass tokenizer_path (--tokenizer_path)")


def _warn_beyond_training(args: ModelArgs, trained: Optional[int]) -> None:
    trained = trained or (4096 if args.rope_theta == 10000.0 else 16384)  # Llama 2, Code Llama
    if args.max_seq_len > trained and is_first_process():
        warnings.warn(
            f"max_seq_len={args.max_seq_len} goes beyond the {trained} positions that the model was trained on; "
            "what it writes there is likely to be nonsense",
            stacklevel=3,
        )
