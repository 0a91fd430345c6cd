"""What a skeleton is like: every module's whole ``__dict__``, so that what a job left behind is seen.

Hooks, processors, a replaced ``forward``, a flag, a cached tensor: each is an entry of some module's ``__dict__``.
Values are compared by identity or, where they are plain, by value; the entries of containers and of small objects
(attention processors) one level deep. Of parameters only the names count, and that each is absent as it was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from safelight.arch.absent import AbsentParameter

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_BOUND = frozenset({"_parameters", "_buffers"})


class _Entry:
    """A value as it was: the object itself, and what it held."""

    __slots__ = ("copy", "inner", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.inner = _inside(value)
        # The version counter does not see what is written through ``.data``; such tensors are small.
        self.copy = value.detach().clone() if isinstance(value, torch.Tensor) and not value.is_meta else None

    def same(self, now: Any) -> bool:
        if isinstance(self.value, _PLAIN):
            return type(now) is type(self.value) and now == self.value
        if now is not self.value:
            return False
        if isinstance(now, torch.Tensor):
            return self.copy is None or torch.equal(now, self.copy)
        held = _inside(now)
        if held is None or self.inner is None:
            return held is self.inner
        return len(held) == len(self.inner) and all(
            key in held and _identical(held[key], value) for key, value in self.inner.items()
        )


def _identical(now: Any, before: Any) -> bool:
    return now is before or (isinstance(before, _PLAIN) and type(now) is type(before) and now == before)


def _inside(value: Any) -> dict[Any, Any] | None:
    """The entries of a container or small object, None for what has none."""
    if isinstance(value, (*_PLAIN, nn.Module, torch.Tensor)):
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return dict.fromkeys(value)
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _slots(module: nn.Module) -> dict[str, str]:
    """The names of a module's parameters, and for each whether it is absent, none, or somebody's."""
    kinds: dict[type, str] = {AbsentParameter: "absent", type(None): "none"}
    return {name: kinds.get(type(parameter), "foreign") for name, parameter in module._parameters.items()}


class Fingerprint:
    """How a module and everything below it was when this was taken."""

    def __init__(self, module: nn.Module) -> None:
        self._modules: list[tuple[str, nn.Module, type[nn.Module], dict[str, _Entry], dict[str, _Entry | None]]] = []
        for name, child in module.named_modules():
            entries = {key: _Entry(value) for key, value in vars(child).items() if key not in _BOUND}
            buffers = {key: _Entry(value) for key, value in child._buffers.items()}
            self._modules.append((name, child, type(child), entries, dict(buffers)))
        self._parameters = [(name, child, _slots(child)) for name, child in module.named_modules()]

    def differences(self) -> list[str]:
        """What is no longer as it was, one phrase for each; empty when nothing changed."""
        found = [
            f"{name or 'the module'}: parameters are {sorted(_slots(module).items())}"
            for name, module, slots in self._parameters
            if _slots(module) != slots
        ]
        for name, module, kind, entries, buffers in self._modules:
            label = name or "the module"
            if type(module) is not kind:
                found.append(f"{label}: type {type(module).__name__}, was {kind.__name__}")
            for what, now, before in (("", vars(module), entries), ("buffer ", module._buffers, buffers)):
                present = {key for key in now if what or key not in _BOUND}
                found += [f"{label}: {what}{key} was added" for key in present - set(before)]
                for key, entry in before.items():
                    if key not in present:
                        found.append(f"{label}: {what}{key} was removed")
                    elif entry is not None and not entry.same(now[key]):
                        found.append(f"{label}: {what}{key} changed")
        return found
