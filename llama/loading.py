"""What `build` makes of a folder before it loads weights: a model without numbers, for it and for its draft model,
checked."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch

from . import memory, runtime
from .layers.agreement import together
from .layers.parallel import all_alike, group_size, is_first_process, model_parallel_group, several_processes
from .model import ModelArgs, Transformer, check_args
from .rotary import metas_positions
from .system.files import user_path
from .tokenizer import Tokenizer
from .tokenizer_files import find_tokenizer, need_tokenizer, open_tokenizer
from .weights import hub
from .weights.adapter import add_adapter, tokenizer_folder
from .weights.checkpoint import Checkpoint, fill, fit_vocabulary, known_ids, open_checkpoint, prepare
from .weights.fingerprint import fingerprints
from .weights.peft import CONFIG
from .weights.places import DEMO as DEMO
from .weights.places import DEMO_POSITIONS as DEMO_POSITIONS

DEMO_TOLD = (
    "This is the demo model, which tells small children's stories. For Llama 2, download its weights (see README.md) "
    "and pass ckpt_dir (--ckpt_dir)."
)
UNSTATED = 2048  # max_seq_len if it is not given
PATIENCE = 1.0  # seconds between two looks at a download, which may outlast any collective's time limit


def checkpoint_folder(given: Union[str, Path], fetching: bool = True) -> Path:
    """The folder of a path, or of a name on the Hugging Face Hub (org/name, org/name@revision, or org/name:Q4_K_M
    for one of its GGUF files), which is fetched into the hub's cache if it is not there. ValueError if it is neither
    there nor fetched."""
    return hub.locate(str(given), user_path(given), fetching)


def checkpoint_folders(*given: Union[str, Path, None]) -> list[Optional[Path]]:
    """`checkpoint_folder` of each that is given, on all processes together. The first process of each node fetches; the
    others then find it in the cache. All wait for it in short meetings, so a long download meets no time limit."""

    def find(fetching: bool) -> list[Optional[Path]]:
        return [None if name is None else checkpoint_folder(name, fetching) for name in given]

    if not several_processes():
        return find(True)
    outcome: list[tuple[list[Optional[Path]], Optional[Exception]]] = []

    def fetch() -> None:
        try:
            outcome.append((find(True), None))
        except Exception as error:
            outcome.append(([], error))

    thread = threading.Thread(target=fetch, daemon=True)
    if fetches := runtime.this_launch().local_rank == 0:
        thread.start()
    while not all_alike(None if fetches and _runs(thread) else "all have looked", None):
        pass
    with together(everyone=True):
        if not fetches:
            return find(False)
        ((found, failure),) = outcome
        if failure is not None:
            raise failure
        return found


def _runs(thread: threading.Thread) -> bool:
    thread.join(PATIENCE)
    return thread.is_alive()


class Opened(NamedTuple):
    """Folders that were opened and checked."""

    main: Prepared
    draft: Optional[Prepared]
    tokenizer: Tokenizer
    tokenizer_file: Path
    adapter: Optional[Path]
    placement: memory.Placement  # where the model and its draft model lie

    def compared(self) -> dict[str, Any]:
        """What must be the same on all processes."""
        several = several_processes()
        drafts = self.draft.checkpoint.paths if self.draft else []
        return {
            **vars(self.placement.args), "dtype": self.placement.dtype, "quantize": self.placement.quantization,
            "adapter": self.adapter is not None, "draft": self.draft is not None,
            **fingerprints([*self.main.checkpoint.paths, self.tokenizer_file] if several else []),
            **fingerprints([self.adapter / CONFIG] if self.adapter and several else []),
            **fingerprints(drafts if several else [], "draft's "),
        }  # fmt: skip

    def warn_beyond_training(self) -> None:
        args = self.placement.args
        trained = positions(self.main.checkpoint)
        if args.max_seq_len > trained and is_first_process():
            warnings.warn(
                f"max_seq_len={args.max_seq_len} goes beyond the {trained} positions that the model was trained on; "
                "what it writes there is likely to be nonsense",
                stacklevel=3,
            )

    def other_dtype(self) -> str:
        """A line for the user if the model runs in another dtype than the stored one; empty otherwise."""
        stored, used = (str(d).removeprefix("torch.") for d in (self.main.checkpoint.dtype, self.placement.dtype))
        place = self.placement.device
        told = (
            f"The checkpoint is {stored}, which is slow on {place}; running in {used}. Pass dtype={stored!r} to "
            f"keep it."
        )
        return "" if stored == used else told


class Wanted(NamedTuple):
    """What is to be loaded, as `build` was asked. max_seq_len: UNSTATED if None, or fewer if the folder says so."""

    folder: Path
    draft: Optional[Path]
    adapter: Optional[Path]
    tokenizer_path: Optional[str]
    max_seq_len: Optional[int]
    max_batch_size: int
    dtype: Union[str, torch.dtype, None]
    quantize: Optional[str]


def open_folders(wanted: Wanted, place: torch.device) -> Opened:
    """Open and check what is to be loaded on this launcher's processes; copies no weight. ValueError if something
    cannot be loaded on them."""
    checkpoint = add_adapter(open_checkpoint(wanted.folder), wanted.adapter)
    given = None if wanted.tokenizer_path is None else user_path(wanted.tokenizer_path)
    home = tokenizer_folder(wanted.folder, wanted.adapter, given)
    tokenizer_file = need_tokenizer(home, given)
    tokenizer = open_tokenizer(home, tokenizer_file, known_ids(checkpoint))
    args = replace(
        fit_vocabulary(checkpoint, tokenizer.n_words),
        max_seq_len=wanted.max_seq_len or min(trained_positions(checkpoint) or UNSTATED, UNSTATED),
        max_batch_size=wanted.max_batch_size,
    )
    main = prepared(checkpoint, args, place, wanted.dtype, wanted.quantize)
    draft, placement = None, main.placement
    if wanted.draft is not None:
        draft = prepared_draft(wanted.draft, tokenizer, placement, wanted.dtype)
        placement = replace(placement, draft=draft.placement)
    memory.check_fits(placement)
    return Opened(main, draft, tokenizer, tokenizer_file, wanted.adapter, placement)


def check_shares(ckpt_dir: Optional[str], draft: Optional[str], processes: int) -> None:
    """ValueError if these models cannot be shared by this number of processes."""
    for folder in checkpoint_folders(DEMO if ckpt_dir is None else ckpt_dir, draft):
        if folder is not None:
            checkpoint = open_checkpoint(folder)
            check_args(replace(checkpoint.args, vocab_size=max(1, checkpoint.args.vocab_size)), processes, folder)


class Prepared(NamedTuple):
    """A model on the meta device, and what is to become of it."""

    model: Transformer
    checkpoint: Checkpoint
    placement: memory.Placement

    def load(self) -> Transformer:
        fill(self.model, self.checkpoint, self.placement.device, self.placement.dtype)
        return self.model.eval().requires_grad_(False)


def prepared(
    checkpoint: Checkpoint,
    args: ModelArgs,
    place: torch.device,
    dtype: Union[str, torch.dtype, None],
    quantize: Optional[str] = None,
) -> Prepared:
    """The model of a checkpoint, on this launcher's processes. ValueError if these cannot share or compute it."""
    processes, sharers = group_size(model_parallel_group()), runtime.memory_sharers(place)
    check_args(args, processes, checkpoint.folder)
    chosen = runtime.choose_dtype(dtype, checkpoint.dtype, place)
    with torch.device("meta"):
        model = Transformer(args)
    quantization = prepare(model, checkpoint, quantize)
    if quantization is not None:
        quantization.check_device(place)
    return Prepared(model, checkpoint, memory.Placement(args, chosen, processes, place, sharers, quantization))


def prepared_draft(
    folder: Union[str, Path], tokenizer: Tokenizer, of: memory.Placement, dtype: Union[str, torch.dtype, None]
) -> Prepared:
    """The draft model in a folder, as it is stored, for the model that is placed there. ValueError unless both have the
    same ids, and it is made for as many positions."""
    path, limits = user_path(folder), of.args
    checkpoint = add_adapter(open_checkpoint(path), None)
    way_out = "take a draft model that was made with the model's own tokenizer.model, or none"
    stated, wanted = checkpoint.args.vocab_size, tokenizer.n_words
    if stated not in (-1, wanted) and (stated < wanted or not checkpoint.leave_out_ids(wanted)):
        raise ValueError(f"the draft model in {path} has {stated} ids, but the model has {wanted}; {way_out}")
    own = find_tokenizer(path)
    if own is not None and _names(open_tokenizer(path, own)) != _names(tokenizer):
        raise ValueError(f"the draft model in {path} has another tokenizer than the model, {own}; {way_out}")
    made_for = trained_positions(checkpoint)
    if made_for is not None and made_for < limits.max_seq_len:
        raise ValueError(
            f"the draft model in {path} was made for {made_for} positions, but max_seq_len is {limits.max_seq_len}; "
            f"build with max_seq_len={made_for} or less, or without this draft"
        )
    args = replace(
        checkpoint.args, vocab_size=wanted, max_seq_len=limits.max_seq_len, max_batch_size=limits.max_batch_size
    )
    return prepared(checkpoint, args, of.device, dtype)


def _names(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.piece(i) for i in range(tokenizer.n_words) if i not in tokenizer.nameless]


def trained_positions(checkpoint: Checkpoint) -> Optional[int]:
    """How many positions the model of a checkpoint was made for, scaled ones included, if its files say so."""
    scaling = checkpoint.args.rope_scaling
    if checkpoint.folder.absolute() == DEMO:
        return DEMO_POSITIONS
    return checkpoint.positions if scaling is None else scaling.positions


def positions(checkpoint: Checkpoint) -> int:
    """How many positions the model of a checkpoint was trained on; those of Meta's models if its files do not say."""
    return trained_positions(checkpoint) or metas_positions(checkpoint.args.rope_theta)


def whole_length(
    ckpt_dir: Union[str, Path, None], device: Union[str, torch.device, None], model_parallel_size: Optional[int]
) -> int:
    """The max_seq_len with which a model has room for all positions that it was trained on. The arguments are those of
    `build`, before which all processes call this."""
    runtime.start(device, model_parallel_size)
    (folder,) = checkpoint_folders(DEMO if ckpt_dir is None else ckpt_dir)
    assert folder is not None
    with together(everyone=True):
        return positions(open_checkpoint(folder))
