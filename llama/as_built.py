"""Whether a model is still as it was built. Only then may the fast ways run, which call no module, so that no hook, patch or
replaced part would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules


class Originals:
    """The methods and functions that people replace, as they were written."""

    def __init__(self, methods: Mapping[type, Sequence[str]], namespace: Mapping[str, Any], functions: Sequence[str]) -> None:
        """namespace: of the module in which the functions are looked up."""
        self.kinds = frozenset(methods)
        self.names = frozenset(name for names in methods.values() for name in names)
        self._methods = [(kind, name, getattr(kind, name)) for kind, names in methods.items() for name in names]
        self._namespace, self._functions = namespace, [(name, namespace[name]) for name in functions]

    def are_in_place(self) -> bool:
        return all(getattr(kind, name) is method for kind, name, method in self._methods) and all(
            self._namespace[name] is function for name, function in self._functions
        )


class Watch:
    """Looks at a model's parts. What it knows of them belongs to one model: a copy needs another one."""

    def __init__(self, originals: Originals) -> None:
        self._originals = originals
        self._links: list[tuple[dict[str, Any], str, Any, type]] = []  # a module's children by name, one of them, its class
        self._parts: list[dict[str, Any]] = []  # the attributes of each
        self._hooks: list[Any] = []
        self._known = False

    def sees_no_change(self, model: nn.Module) -> bool:
        """Whether the model's parts are of the original classes, unpatched and unhooked, and outside autocast."""
        known = self._links
        if not known or not all(them.get(name) is child and type(child) is kind for them, name, child, kind in known):
            self._survey(model)
        return (
            self._known
            and not any(self._hooks)
            and not torch_modules._has_any_global_hook()
            and not any(name in part for name in self._originals.names for part in self._parts)
            and self._originals.are_in_place()
            and not torch.is_autocast_enabled("cpu")
            and not torch.is_autocast_enabled("cuda")
        )

    def _survey(self, model: nn.Module) -> None:
        parts = [part for part in model.modules() if part is not model]
        families = [m._modules for m in (model, *parts)]
        self._links = [(them, name, child, type(child)) for them in families for name, child in them.items()]
        self._parts = [vars(part) for part in parts]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(m, kind) for m in (model, *parts) for kind in kinds]
        self._known = {type(part) for part in parts} <= self._originals.kinds
