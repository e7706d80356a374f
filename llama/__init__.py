"""Llama 2 inference: Meta's names and numbers, on any machine and any number of processes.

The names are imported when they are first used, since torch takes a second: the terminal's help does without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import Dialog, DialogError, Message
    from .completion import ChatPrediction, Chunk, CompletionPrediction, Score
    from .generation import Llama
    from .model import ModelArgs, Transformer
    from .options import Options
    from .session import ChatSession, ContextFull
    from .tokenizer import Tokenizer

__all__ = [
    "ChatPrediction", "ChatSession", "Chunk", "CompletionPrediction", "ContextFull", "Dialog", "DialogError", "Llama",
    "Message", "ModelArgs", "Options", "Score", "Tokenizer", "Transformer",
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("Dialog", "DialogError", "Message"), "chat"),
    **dict.fromkeys(("ChatPrediction", "Chunk", "CompletionPrediction", "Score"), "completion"),
    **dict.fromkeys(("ModelArgs", "Transformer"), "model"),
    **dict.fromkeys(("ChatSession", "ContextFull"), "session"),
    **{"Llama": "generation", "Options": "options", "Tokenizer": "tokenizer"},
}


def __getattr__(name: str) -> Any:
    """A public name, or a module of this package, as `llama.model` is after `import llama` with Meta's code too."""
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value
    module = f"{__name__}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
