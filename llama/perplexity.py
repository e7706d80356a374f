"""The perplexity of a text by the methods that numbers are published for, each exactly as its tool has it.
docs/EVALUATION.md says where each comes from."""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING, NamedTuple, Optional, TypedDict

from .system.printable import counted, shortened
from .system.program import nearest

if TYPE_CHECKING:
    from .generation import Llama

# The ids that are read only, and those behind them, which are scored.
Window = tuple[list[int], list[int]]

METHODS = ("lm-eval", "joined-2048", "joined-4096", "llama.cpp-512")  # those of published numbers


class Perplexity(TypedDict, total=False):
    """The figures of a text.

    window: tokens of a window. tokens: how many are scored. nll: minus the sum of their ln p. perplexity: exp of
    nll / tokens. standard_error: of the perplexity, as llama.cpp tells it. With lm-eval also documents, words and bytes
    of the original text, and the figures of each word and byte, as the harness' task "wikitext" tells them.
    """

    method: str
    window: int
    windows: int
    tokens: int
    nll: float
    perplexity: float
    bits_per_token: float
    standard_error: float
    documents: int
    words: int
    bytes: int
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float


class Method(NamedTuple):
    """kind: a name without its number. window: tokens of a window; None is the model's own length."""

    kind: str
    window: Optional[int]

    def check_fits(self, max_seq_len: int) -> None:
        """ValueError if a model of this length cannot read a window."""
        if self.window is not None and self.window > max_seq_len:
            raise ValueError(
                f"{self.kind}-{self.window} reads windows of {self.window} tokens, but the model has room for "
                f"{max_seq_len} (max_seq_len); {self.kind}-{max_seq_len} would fit, and gives another number"
            )


def parse_method(name: str) -> Method:
    """A method by its name: one of METHODS, or joined-N or llama.cpp-N with windows of N tokens. ValueError for
    another."""
    if name == "lm-eval":
        return Method(name, None)
    found = re.fullmatch(r"(joined|llama\.cpp)-(\d{1,7})", str(name), flags=re.ASCII)
    if found is None or int(found[2]) < 4:
        raise ValueError(
            f"there is no method {shortened(name)}{nearest(str(name).lower(), METHODS)}; there are "
            f"{', '.join(METHODS)}, and joined-N and llama.cpp-N with windows of N tokens, 4 at least"
        )
    return Method(found[1], int(found[2]))


def perplexity(llama: Llama, text: str, method: str) -> Perplexity:
    """The perplexity of a text, a file's as it stands there, by a method. ValueError for an unknown method, a text of
    less than a window (two for llama.cpp), and a window that is longer than the model's max_seq_len."""
    parsed = parse_method(method)
    parsed.check_fits(llama.model.params.max_seq_len)
    if llama.tokenizer.bos_id < 0:
        raise ValueError("the vocabulary has no BOS, which all methods put in front of a text")
    if not text.strip():
        raise ValueError("the text is empty")
    window = parsed.window or llama.model.params.max_seq_len
    if parsed.kind == "lm-eval":
        return _by_documents(llama, _universal(text), method, window)
    if parsed.kind == "joined":
        pairs = joined_windows(llama.tokenizer.encode(joined(_universal(text)), bos=True, eos=False), window)
        return _figures(llama, pairs, method, window)
    # llama.cpp drops one line end behind the text.
    ids = llama.tokenizer.encode(text.removesuffix("\n"), bos=True, eos=False)
    return _figures(llama, chunks(ids, llama.tokenizer.bos_id, window), method, window, error=True)


def _figures(llama: Llama, pairs: list[Window], method: str, window: int, error: bool = False) -> Perplexity:
    scores = llama.score_ids(*map(list, zip(*pairs)))
    losses = [-logprob for score in scores for logprob in score["logprobs"]]
    nll, count = math.fsum(losses), len(losses)
    mean = nll / count
    told = Perplexity(
        method=method, window=window, windows=len(pairs), tokens=count, nll=nll, perplexity=math.exp(mean),
        bits_per_token=mean / math.log(2),
    )  # fmt: skip
    if error:  # of two windows at least, so of two tokens
        variance = math.fsum(loss * loss for loss in losses) / count - mean * mean
        told["standard_error"] = math.sqrt(max(variance, 0) / (count - 1)) * told["perplexity"]
    return told


def _universal(text: str) -> str:
    """The text as Python reads a file in text mode."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


# lm-eval: the task "wikitext" of lm-evaluation-harness


def _by_documents(llama: Llama, text: str, method: str, window: int) -> Perplexity:
    pages, tokenizer = documents(text), llama.tokenizer
    encoded = [tokenizer.encode(detokenized(page), bos=False, eos=False) for page in pages]
    told = _figures(llama, [pair for ids in encoded for pair in rolling(ids, tokenizer.bos_id, window)], method, window)
    words, size = sum(len(re.split(r"\s+", page)) for page in pages), sum(len(page.encode()) for page in pages)
    told |= {"documents": len(pages), "words": words, "bytes": size, "bits_per_byte": told["nll"] / size / math.log(2)}
    told |= {"word_perplexity": math.exp(told["nll"] / words), "byte_perplexity": math.exp(told["nll"] / size)}
    return told


def documents(text: str) -> list[str]:
    """WikiText's articles: a line such as " = Title = " begins one, and " = = Section = = " does not."""
    pages, page = list[str](), list[str]()
    for line in text.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append("\n".join(page))
            page = []
        page.append(line)
    return [*filter(str.strip, pages), "\n".join(page)]


def _plain(*changes: tuple[str, str]) -> list[tuple[str, str]]:
    return [(re.escape(old), new) for old, new in changes]


# What makes running text of WikiText's tokens, in this order. The second one finds next to nothing, since the slashes
# were meant to be its delimiters; the numbers that are published were made with it.
_CHANGES = [
    *_plain(("s '", "s'")),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *_plain(*((f" @{mark}@ ", mark) for mark in "-,."), *((f" {mark} ", f"{mark} ") for mark in ":;.!?,")),
    *(
        (rf"{begin}\s*([^{end}]*?)\s*{end}", rf"{begin[-1]}\1{end[-1]}")
        for begin, end in (r"\( \)".split(), r"\[ \]".split())
    ),
    *((rf"{begin}\s*([^{end}]*?)\s*{end}", rf"{begin}\1{end}") for begin, end in ("{}", '""', "''")),
    *_plain(*(("= " * n + "=", "=" * (n + 1)) for n in (3, 2, 1)), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}")),
    *_plain((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]


def detokenized(page: str) -> str:
    """An article of WikiText as running text, as the harness' task makes it."""
    for pattern, instead in _CHANGES:
        page = re.sub(pattern, instead, page)
    return page


def rolling(ids: list[int], first: int, window: int) -> list[Window]:
    """All ids, each once, behind `first`, in windows of `window` ids that are read. The last window is as long as the
    others, so it has more ids that are not scored. 5 ids in windows of 2: (first) 0 1, (1) 2 3, (2 3) 4."""
    pairs = [([first], ids[:window])] if ids else []
    for at in range(window, len(ids), window):
        end = min(at + window, len(ids))
        pairs.append((ids[end - window - 1 : at], ids[at:end]))
    return pairs


# joined-N: the code of GPTQ and AWQ


def joined(text: str) -> str:
    """The rows that Hugging Face's data set "wikitext" makes of the file, lines that are blank or end in their line
    end, joined by two line ends."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(text))


def joined_windows(ids: list[int], window: int) -> list[Window]:
    """Windows side by side; all ids are scored but the first of each. What is left at the end is not read. ValueError
    if there is no whole window."""
    if len(ids) < window:
        raise ValueError(f"the text has {counted(len(ids), 'token')}, fewer than one window of {window}")
    return [(ids[at : at + 1], ids[at + 1 : at + window]) for at in range(0, len(ids) - window + 1, window)]


# llama.cpp-N: llama-perplexity


def chunks(ids: list[int], bos: int, window: int) -> list[Window]:
    """Windows side by side, in which BOS stands in place of the first id; the ids behind their middle are scored. What
    is left at the end is not read. ValueError for fewer ids than two windows have."""
    if len(ids) < 2 * window:
        told = counted(len(ids), "token")
        raise ValueError(f"the text has {told}, and llama.cpp's method needs two windows of {window} at least")
    half = window // 2 + 1
    starts = range(0, len(ids) - window + 1, window)
    return [([bos, *ids[at + 1 : at + half]], ids[at + half : at + window]) for at in starts]
