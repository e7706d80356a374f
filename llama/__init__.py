"""Llama 2 inference: Meta's names and numbers, on any machine and any number of processes.

The names are imported when they are first used, since torch takes a second: the terminal's help does without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation import Dialog, Llama
    from .model import ModelArgs, Transformer
    from .tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"]
__version__ = "0.0.1"

_HOMES = {"Dialog": "chat", "Llama": "generation", "ModelArgs": "model", "Tokenizer": "tokenizer", "Transformer": "model"}


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
