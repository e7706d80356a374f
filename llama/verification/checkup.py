"""All checks of a folder, in order: what reads the files, what reads the weights, what runs the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from ..generation import Llama
from ..loading import checkpoint_folder, prepared, trained_positions
from ..model import ModelArgs, Transformer
from ..runtime import device_kind
from ..system.files import user_path
from ..system.printable import counted, shortened
from ..tokenizer import Tokenizer
from ..tokenizer_files import find_tokenizer, need_tokenizer, open_tokenizer
from ..weights.checkpoint import Checkpoint, fit_vocabulary, known_ids, open_checkpoint
from . import faults, itself, repairs
from .checksums import check_checksums
from .known import Known, check_known, check_order, check_perplexities, check_published, check_setting, recognise
from .results import FAIL, Result, failed, not_applicable, passed
from .spread import check_weights
from .texts import KINDS

MANY = 10**9  # parameters whose rounding takes a CPU minutes
ROWS = 4  # texts that are read side by side
POSITIONS = 320  # room for a text that is read, or for a prompt and its answer; less if the model was made for less
SETTINGS = ("params.json", "config.json", "generation_config.json", "tokenizer.model", "tokenizer.json")
CUT_SHORT = (
    "A file is cut short, damaged or missing, or it is of another model; the sentence says which. Download or convert "
    "the folder again."
)
CANNOT_RUN = "The sentence says what is missing and what would do; --quick leaves out all that runs the model."
CANNOT_COMPUTE = "Weights are damaged (see the rows above), or float16 overflows: try --dtype bfloat16 or float32."
NOT_ITS_OWN = (
    "The tokenizer belongs to another model. Take the one that came with the weights, or pass --tokenizer_path."
)


class Asked(NamedTuple):
    """What is to be verified. quick: without running the model. rounded: whether int8 and int4 are compared; None:
    unless a CPU would need long for it. processes: the most that are started. seconds: how long faults of meaning are
    looked for. texts: that the model finds likely, in place of those of this package. wikitext: WikiText-2's test
    split."""

    folder: Path
    tokenizer_path: Optional[str] = None
    device: Optional[str] = None
    dtype: Optional[str] = None
    compile: Optional[bool] = None
    quick: bool = False
    rounded: Optional[bool] = None
    processes: int = 4
    seconds: float = 600.0
    texts: tuple[str, ...] = ()
    wikitext: Optional[str] = None
    positions: int = POSITIONS

    def given(self, rows: int = ROWS, **more: Any) -> dict[str, Any]:
        """The arguments of `build`."""
        return {"ckpt_dir": str(self.folder), "tokenizer_path": self.tokenizer_path, "device": self.device,
                "dtype": self.dtype, "max_seq_len": self.positions, "max_batch_size": rows, **more}  # fmt: skip

    def build(self, **more: Any) -> Llama:
        with redirect_stdout(StringIO()):  # how long it took to load is not what is asked
            return Llama.build(**self.given(**more))


class Opened(NamedTuple):
    """A folder whose files are whole."""

    checkpoint: Checkpoint
    args: ModelArgs
    model: Transformer  # on the meta device
    tokenizer: Optional[Tokenizer]


def verify(asked: Asked) -> Iterator[Result]:
    """The results of all checks, each as soon as it is known. ValueError if there is no folder."""
    folder = checkpoint_folder(asked.folder)
    asked = asked._replace(folder=folder)
    if not folder.exists():
        raise ValueError(
            f"there is no folder and no file {folder}; pass the checkpoint's folder, or its name on the hub"
        )
    outcome, opened = _open(asked)
    yield outcome
    checkpoint = opened.checkpoint if opened is not None else None
    yield check_checksums(folder, files_of(folder, checkpoint, asked.tokenizer_path))
    if opened is None:
        yield not_applicable("all other checks", "the files could not be opened")
        return
    yield _tokenizer(asked, opened)
    weights = check_weights(opened.checkpoint, opened.model)
    yield from weights
    known = recognise(opened.checkpoint, opened.args)
    yield check_known(known)
    if asked.quick or weights[0].verdict == FAIL:
        yield from _settings(opened, known)
        why = "--quick leaves it out" if asked.quick else "no text can be read with weights that are not finite"
        yield not_applicable("running the model", why)
        return
    positions = trained_positions(opened.checkpoint) or POSITIONS
    yield from _run(asked._replace(positions=min(positions, POSITIONS)), opened, known)


def files_of(folder: Path, checkpoint: Optional[Checkpoint], tokenizer_path: Optional[str] = None) -> list[Path]:
    """The files of a folder that are loaded, and its tokenizer, wherever that is; all that look like them, if it could
    not be opened."""
    home = folder if folder.is_dir() else folder.parent
    weights = [] if checkpoint is None else list(checkpoint.paths)
    if checkpoint is None:
        patterns = ("consolidated.*.pth", "*.safetensors", "pytorch_model*.bin")
        weights = sorted(path for pattern in patterns for path in home.glob(pattern)) if folder.is_dir() else [folder]
    beside = [home / name for name in SETTINGS] if folder.is_dir() else []
    with suppress(ValueError):  # the row of the files says what is wrong with it
        tokenizer = find_tokenizer(folder, tokenizer_path)
        beside += [tokenizer] if tokenizer is not None and tokenizer not in weights + beside else []
    return weights + [path for path in beside if path.is_file()]


def _open(asked: Asked) -> tuple[Result, Optional[Opened]]:
    """Names, shapes, headers and sizes."""
    name = "files"
    try:
        checkpoint = open_checkpoint(asked.folder)
        tokenizer, pieces = None, checkpoint.shape("tok_embeddings.weight", 1)[0]
        given = None if asked.tokenizer_path is None else user_path(asked.tokenizer_path)
        if (path := find_tokenizer(asked.folder, given)) is not None:
            tokenizer = open_tokenizer(asked.folder, path, known_ids(checkpoint))
            pieces = tokenizer.n_words
        args = replace(fit_vocabulary(checkpoint, pieces), max_seq_len=1, max_batch_size=1)
        model = prepared(checkpoint, args, torch.device("cpu"), None).model
    except ValueError as error:
        return failed(name, str(error), CUT_SHORT), None
    nbytes = sum(path.stat().st_size for path in checkpoint.paths)
    told = f"{checkpoint.format} format, {counted(len(checkpoint.paths), 'file')} of {nbytes:,} bytes in all"
    told += f": names, shapes and sizes are those that {checkpoint.config} describes"
    return passed(name, told), Opened(checkpoint, args, model, tokenizer)


def _tokenizer(asked: Asked, opened: Opened) -> Result:
    """Whether texts come back from their ids."""
    name, tokenizer = "tokenizer", opened.tokenizer
    if tokenizer is None:
        try:
            need_tokenizer(asked.folder, None)
        except ValueError as error:
            return failed(name, str(error), NOT_ITS_OWN)
    assert tokenizer is not None
    texts = [text for of_kind in KINDS.values() for text in of_kind]
    ids = [tokenizer.encode(text, bos=False, eos=False) for text in texts]
    if wrong := [text for text, row in zip(texts, ids) if tokenizer.decode(row) != text]:
        back = tokenizer.decode(ids[texts.index(wrong[0])])
        return failed(name, f"{shortened(wrong[0], 40)} becomes {shortened(back, 40)}", NOT_ITS_OWN)
    rate = sum(map(len, texts)) / sum(map(len, ids))
    told = (
        f"{tokenizer.n_words} pieces; {counted(len(texts), 'text')} come back from their ids ({rate:.1f} characters "
        f"an id)"
    )
    return passed(name, told)


def _settings(opened: Opened, known: Known) -> Iterator[Result]:
    for check, value in ((repairs.THETA, opened.args.rope_theta), (repairs.EPS, opened.args.norm_eps)):
        if (result := check_setting(known, check, value)) is not None:
            yield result
    if (result := check_order(known, opened.checkpoint)) is not None:
        yield result


def _run(asked: Asked, opened: Opened, known: Known) -> Iterator[Result]:
    """What runs the model."""
    try:
        llama = asked.build(compile=asked.compile)
    except ValueError as error:
        yield failed("loading", str(error), CANNOT_RUN)
        return
    told = {result.name: result for result in _settings(opened, known)}
    ids = itself.sample(llama)
    reference = itself.one_pass(llama, ids)
    if not reference.isfinite().all():
        yield from told.values()
        yield failed("running the model", "its numbers are NaN or infinite after a text", CANNOT_COMPUTE)
        return
    for result in faults.check_meaning(llama, asked.seconds, asked.texts):
        yield _surer(result, told.get(result.name))
    yield from check_published(llama, known)
    yield from itself.check_itself(llama)
    quantized, counts = itself.is_quantized(llama), itself.startable(llama, asked.processes)
    weight, parameters = llama.model.norm.weight, sum(p.numel() for p in llama.model.parameters())
    rounded = (device_kind(weight) != "cpu" or parameters < MANY) if asked.rounded is None else asked.rounded
    del llama  # its memory is needed
    for kind in itself.QUANTIZED:
        if quantized:
            yield not_applicable(kind, "the folder's weights are rounded already")
        elif not rounded:
            yield not_applicable(kind, "rounding so large a model takes a CPU minutes; --rounded does it")
        else:
            yield itself.check_quantized(asked.build, kind, reference, ids)
    if not counts:
        yield not_applicable(
            "several processes", "this machine or --processes allows one only, or the heads cannot be shared"
        )
    for count in counts:
        yield itself.check_processes(count, asked.given(), reference, ids)
    if asked.wikitext is not None:
        try:
            trained = trained_positions(opened.checkpoint) or known.window
            llama = asked._replace(positions=min(known.window, trained)).build(rows=1)
        except ValueError as error:
            yield failed("wikitext", str(error), CANNOT_RUN)
        else:
            yield from check_perplexities(llama, known, asked.wikitext)


def _surer(by_text: Result, by_name: Optional[Result]) -> Result:
    """What a text shows and what is known of the model, in one row: a failure of either is one."""
    if by_name is None or (by_text.verdict == FAIL and by_name.verdict != FAIL):
        return by_text
    told = f"{by_name.told}; {by_text.told}" if by_text.verdict == by_name.verdict else by_name.told
    return by_name._replace(told=told)
