"""The tokenizer of a folder: its SentencePiece model, or one that is rebuilt from tokenizer.json; the tokens that were
added, the ids that end an answer, and the chat template."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Optional, Union

from .gguf_tokenizer import Vocabulary, read_vocabulary
from .system.checks import whole
from .system.files import contents, is_there, read_file, read_json, user_path
from .system.launch import is_first_process
from .system.printable import counted, escaped, shortened
from .tokenizer import AddedToken, Spaced, Tokenizer
from .tokenizer_json import read_tokenizer_json, rebuilt, steps
from .weights.places import find_gguf

MOST_IDS = 2**24
FILES = ("tokenizer.model", "tokenizer.json")  # the first that is there counts


def find_tokenizer(ckpt_dir: Path, given: Union[str, PathLike[str], None] = None) -> Optional[Path]:
    """The path that was given, or the file in that folder; or a GGUF model itself, or the checkpoint's tokenizer.model,
    or else its tokenizer.json; None if there is no such file.

    Meta's layout has one file beside the folders of all models; other layouts have one in each folder.
    """
    if given is not None and (path := user_path(given)).is_dir() and path.name not in FILES:
        found = next((path / name for name in FILES if is_there(path / name)), None)
        if found is None:
            raise ValueError(f"no {' or '.join(FILES)} in tokenizer_path={path}, which holds {contents(path)}")
        return found
    if given is not None:
        return path
    if files := find_gguf(ckpt_dir):
        return files[0]
    places = (*(ckpt_dir / name for name in FILES), ckpt_dir.absolute().parent / FILES[0])
    return next((path for path in places if is_there(path)), None)


def need_tokenizer(ckpt_dir: Path, given: Union[str, PathLike[str], None] = None) -> Path:
    """As `find_tokenizer`, but ValueError if there is no such file."""
    if path := find_tokenizer(ckpt_dir, given):
        return path
    if not ckpt_dir.is_dir():
        raise ValueError(
            f"no checkpoint folder at {ckpt_dir}; pass the folder that holds consolidated.00.pth and params.json"
        )
    raise ValueError(
        f"no tokenizer.model or tokenizer.json in {ckpt_dir}, nor a tokenizer.model in the folder above it; pass "
        "tokenizer_path (--tokenizer_path)"
    )


def open_tokenizer(
    ckpt_dir: Path, given: Union[str, PathLike[str], None] = None, rows: Optional[int] = None
) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or the one in the file `given`, with what the folder says of added tokens,
    of stops and of chats. rows: how many ids the model has, if that is known.

    ValueError if a file is missing or wrong.
    """
    path = need_tokenizer(ckpt_dir, given)
    described: Union[_Described, Vocabulary]
    if path.suffix.lower() == ".gguf":
        described = read_vocabulary(path)
        proto: Optional[bytes] = described.proto
    else:
        described = _Described(ckpt_dir)
        proto = None
        if path.suffix == ".json":
            told = described.tokenizer if path == ckpt_dir / "tokenizer.json" else read_tokenizer_json(path)
            proto = rebuilt(path, told, described.bos, described.eos)
    tokenizer = Tokenizer(str(path), added=described.added, rows=rows, proto=proto)
    doubtful = [
        f"{i} is {shortened(token.content)} there and {shortened(piece)} in {escaped(path.name)}"
        for i, token in tokenizer.added.items()
        if i < tokenizer.sp_model.vocab_size() and (piece := tokenizer.sp_model.IdToPiece(i)) != token.content
    ]
    if doubtful and is_first_process():
        warnings.warn(
            f"{escaped(str(ckpt_dir))} names added tokens: {', '.join(doubtful[:3])}; the first counts", stacklevel=4
        )
    if tokenizer.nameless and is_first_process():
        warnings.warn(
            f"{escaped(str(ckpt_dir))} has {tokenizer.n_words} ids, and {counted(len(tokenizer.nameless), 'id')} "
            f"without a name ({_span(tokenizer.nameless)}): they are never drawn",
            stacklevel=4,
        )
    tokenizer.other_stops = frozenset(i for i in described.stops if i < tokenizer.n_words)
    tokenizer.chat_template = described.chat_template
    tokenizer.boundaries = described.bos, described.eos
    tokenizer.spaced = described.spaced
    return tokenizer


def _span(ids: frozenset[int]) -> str:
    return f"{min(ids)} to {max(ids)}" if len(ids) > 1 else str(min(ids))


class _Described:
    """What the JSON files of a folder in Hugging Face's format say of its tokenizer. Without them nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = self._json("tokenizer_config.json")
        path = folder / "tokenizer.json"
        self.tokenizer = tokenizer = read_tokenizer_json(path) if is_there(path) else {}
        by_id: dict[int, AddedToken] = {}
        for source, told in (
            ("added_tokens.json", self._flat()),
            ("tokenizer.json", self._listed(tokenizer.get("added_tokens"), "tokenizer.json")),
            ("tokenizer_config.json", self._by_id(config.get("added_tokens_decoder"))),
        ):
            for token in told:
                by_id[token.id] = token  # the later source is the one that transformers trusts
            texts = [token.content for token in by_id.values()]
            if len(set(texts)) < len(texts):
                twice = next(text for text in texts if texts.count(text) > 1)
                raise ValueError(
                    f"{folder / source} gives {shortened(twice)} another id than the other files of that folder do"
                )
        self.added = sorted(by_id.values())
        ids = {token.content: token.id for token in self.added} | _vocab(tokenizer)
        self.bos, self.eos = (_text(config.get(name)) for name in ("bos_token", "eos_token"))
        self.stops = {ids[self.eos]} if self.eos in ids else set()
        for name in ("generation_config.json", "config.json"):
            self.stops |= self._stops(name)
        self.spaced = _spaced(config, tokenizer)
        self.chat_template = self._template(config)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path, f"a {name} is smaller", 2**22) if is_there(path) else {}

    def _flat(self) -> Iterator[AddedToken]:
        """added_tokens.json: text -> id"""
        for content, i in self._json("added_tokens.json").items():
            yield self._token({"id": i, "content": content}, "added_tokens.json")

    def _listed(self, told: Any, name: str) -> Iterator[AddedToken]:
        if told is not None and not isinstance(told, list):
            raise ValueError(f"{self.folder / name}: its added tokens are no list but {shortened(told)}")
        for entry in told or ():
            yield self._token(entry, name)

    def _by_id(self, told: Any) -> Iterator[AddedToken]:
        name = "tokenizer_config.json"
        if told is not None and not isinstance(told, dict):
            raise ValueError(f"{self.folder / name}: added_tokens_decoder is no object but {shortened(told)}")
        for i, entry in (told or {}).items():
            yield self._token({**(entry if isinstance(entry, dict) else {"content": entry}), "id": _number(i)}, name)

    def _token(self, entry: Any, name: str) -> AddedToken:
        i, content = (whole(entry.get("id")), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if i is None or not 0 <= i < MOST_IDS or not isinstance(content, str) or not content:
            raise ValueError(
                f"{self.folder / name}: an added token has an id from 0 to {MOST_IDS} and a text, not "
                f"{shortened(entry)}"
            )
        return AddedToken(i, content, *(entry.get(key) is True for key in ("lstrip", "rstrip")))

    def _stops(self, name: str) -> set[int]:
        """eos_token_id of a file: one id, or several."""
        told = self._json(name).get("eos_token_id")
        ids = [whole(i) for i in (told if isinstance(told, list) else [] if told is None else [told])]
        if not all(i is not None and 0 <= i < MOST_IDS for i in ids):
            raise ValueError(f"{self.folder / name}: eos_token_id={shortened(told)} is neither an id nor a list of ids")
        return {i for i in ids if i is not None}

    def _template(self, config: dict[str, Any]) -> Optional[str]:
        path = self.folder / "chat_template.jinja"
        if is_there(path):
            return read_file(path, 2**20, "a chat template has a few thousand bytes").decode(errors="replace")
        told = config.get("chat_template")
        if isinstance(told, list):  # several by name
            named = {part.get("name"): part.get("template") for part in told if isinstance(part, dict)}
            told = named.get("default")
        return told if isinstance(told, str) else None


def _text(token: Any) -> Optional[str]:
    """The text of a token in tokenizer_config.json, which stands there by itself or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _number(text: str) -> Optional[int]:
    return int(text) if re.fullmatch(r"\d{1,9}", text, flags=re.ASCII) else None


def _vocab(tokenizer: dict[str, Any]) -> dict[str, int]:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return vocab if isinstance(vocab, dict) else {}


def _spaced(config: dict[str, Any], tokenizer: dict[str, Any]) -> Spaced:
    """`Tokenizer.spaced`, as transformers 5 takes it from these files."""
    inside = [step for key in ("normalizer", "pre_tokenizer") for step in steps(tokenizer.get(key))]
    if not (config or tokenizer) or any(step.get("type") == "Prepend" for step in inside):
        return "all"
    always = config.get("legacy") is True or any(step.get("prepend_scheme") == "always" for step in inside)
    return "words" if always else "first"
