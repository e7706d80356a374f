"""What `build` makes of a folder before it loads weights: a model without numbers, for it and for its draft model, checked."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch

from . import memory, runtime
from .layers.agreement import together
from .layers.parallel import all_alike, group_size, model_parallel_group, several_processes
from .model import ModelArgs, Transformer, check_args
from .system.checks import whole
from .system.files import is_there, read_json
from .tokenizer import Tokenizer, user_path
from .tokenizer_files import find_tokenizer, open_tokenizer
from .weights import hub
from .weights.adapter import AdaptedCheckpoint, add_adapter
from .weights.checkpoint import Checkpoint, fill, open_checkpoint, prepare
from .weights.gguf import GGUFCheckpoint

DEMO = Path(__file__).parent / "demo"  # the model that comes with the package
DEMO_POSITIONS = 512
PATIENCE = 1.0  # seconds between two looks at a download, which may outlast any collective's time limit


def checkpoint_folder(given: Union[str, Path], fetching: bool = True) -> Path:
    """The folder of a path, or of a name on the Hugging Face Hub (org/name, org/name@revision), which is fetched into the hub's
    cache if it is not there. ValueError if it cannot be had."""
    return hub.locate(str(given), user_path(given), fetching)


def checkpoint_folders(*given: Union[str, Path, None]) -> list[Optional[Path]]:
    """`checkpoint_folder` of each that is given, on all processes together. The first process of each node fetches; the others
    then find it in the cache. All wait for it in short meetings, so a long download meets no time limit."""

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
    if fetches := runtime.Launch.read().local_rank == 0:
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
    """The model of a checkpoint, on this launcher's processes. ValueError if it cannot be had so."""
    processes, sharers = group_size(model_parallel_group()), runtime.memory_sharers(place)
    check_args(args, processes, checkpoint.folder)
    chosen = runtime.choose_dtype(dtype, checkpoint.dtype, place)
    with torch.device("meta"):
        model = Transformer(args)
    quantization = prepare(model, checkpoint, quantize)
    return Prepared(model, checkpoint, memory.Placement(args, chosen, processes, place, sharers, quantization))


def prepared_draft(
    folder: Union[str, Path], tokenizer: Tokenizer, of: memory.Placement, dtype: Union[str, torch.dtype, None]
) -> Prepared:
    """The draft model in a folder, as it is stored, for the model that is placed there. ValueError unless both have the same
    ids, and it is made for as many positions."""
    path, limits = user_path(folder), of.args
    checkpoint = add_adapter(open_checkpoint(path), None)
    way_out = "take a draft model that was made with the model's own tokenizer.model, or none"
    stated, wanted = checkpoint.args.vocab_size, tokenizer.n_words
    if stated not in (-1, wanted) and (stated < wanted or not checkpoint.leave_out_ids(wanted)):
        raise ValueError(f"the draft model in {path} has {stated} ids, but the model has {wanted}; {way_out}")
    own = find_tokenizer(path)
    if own is not None and _names(open_tokenizer(path, own)) != _names(tokenizer):
        raise ValueError(f"the draft model in {path} has another tokenizer than the model, {own}; {way_out}")
    positions = trained_positions(checkpoint)
    if positions is not None and positions < limits.max_seq_len:
        raise ValueError(
            f"the draft model in {path} was made for {positions} positions, but max_seq_len is {limits.max_seq_len}; "
            f"build with max_seq_len={positions} or less, or without this draft"
        )
    args = replace(checkpoint.args, vocab_size=wanted, max_seq_len=limits.max_seq_len, max_batch_size=limits.max_batch_size)
    return prepared(checkpoint, args, of.device, dtype)


def _names(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.piece(i) for i in range(tokenizer.n_words) if i not in tokenizer.nameless]


def trained_positions(checkpoint: Checkpoint) -> Optional[int]:
    """How many positions the model of a checkpoint was made for, scaled ones included, if its files say so."""
    config, scaling = checkpoint.folder / "config.json", checkpoint.args.rope_scaling
    if checkpoint.folder.absolute() == DEMO:
        return DEMO_POSITIONS
    if scaling is not None:
        return scaling.positions
    base = checkpoint.base if isinstance(checkpoint, AdaptedCheckpoint) else checkpoint
    if isinstance(base, GGUFCheckpoint):
        return base.positions
    if checkpoint.config != config.name or not is_there(config):
        return None
    return whole(read_json(config, "a config.json has a few hundred bytes").get("max_position_embeddings"))
