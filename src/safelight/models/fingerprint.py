"""Fingerprints of skeletons: every module's whole ``__dict__``, to find what a job left behind.

Hooks, processors, a replaced ``forward``, a flag, a cached tensor: each is an entry of some module's ``__dict__``.
Plain values are compared by value, others by identity. Containers and small objects (attention processors) are also
compared entry by entry, one level deep. The bytes of tensors are compared, also of those that are deeper. Of
parameters, only the names are recorded, and whether each is absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import nn

from safelight.models.absent import AbsentParameter

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_COMPARED_SEPARATELY = frozenset({"_parameters", "_buffers"})


class _Entry:
    """A recorded value: the object itself and its entries."""

    __slots__ = ("copies", "inner", "keys", "value", "values")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.inner = _inside(value)
        self.keys = [] if self.inner is None else list(self.inner)
        self.values = [] if self.inner is None else list(self.inner.values())
        # The version counter does not count writes through ``.data``, so the bytes are copied. These tensors are small.
        self.copies = [(tensor, tensor.detach().clone()) for tensor in _tensors_in(value)]

    def untouched(self) -> bool:
        """Whether the value still holds the identical objects. A quick check: True is certain, False may be wrong."""
        if self.inner is None or self.copies:
            return False
        held = self.value if isinstance(self.value, (dict, list, tuple)) else getattr(self.value, "__dict__", None)
        if held is None or len(held) != len(self.keys):
            return False
        if isinstance(held, dict):
            return list(held) == self.keys and all(map(is_, held.values(), self.values))
        return all(map(is_, held, self.values))

    def same(self, now: Any) -> bool:
        if isinstance(self.value, _PLAIN):
            return type(now) is type(self.value) and now == self.value
        if now is not self.value:
            return False
        if not self._same_bytes(now):
            return False
        held = _inside(now)
        if held is None or self.inner is None:
            return held is self.inner
        identical = all(key in held and _identical(held[key], value) for key, value in self.inner.items())
        return len(held) == len(self.inner) and identical

    def _same_bytes(self, now: Any) -> bool:
        found = list(_tensors_in(now))
        return len(found) == len(self.copies) and all(
            tensor is before and torch.equal(tensor, copy)
            for tensor, (before, copy) in zip(found, self.copies, strict=True)
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the recorded tensors and their copies."""
        for pair in self.copies:
            yield from pair


def _tensors_in(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    """Yield the tensors of a value that are not on meta, and those of containers and small objects within it."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            yield value
    elif depth:
        for one in (_inside(value) or {}).values():
            yield from _tensors_in(one, depth - 1)


def _identical(now: Any, before: Any) -> bool:
    return now is before or (isinstance(before, _PLAIN) and type(now) is type(before) and now == before)


def _inside(value: Any) -> dict[Any, Any] | None:
    """The entries of a container or small object. None for other values."""
    if isinstance(value, (*_PLAIN, nn.Module, torch.Tensor)):
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return dict.fromkeys(value)
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _parameter_kinds(module: nn.Module) -> dict[str, str]:
    """The kind of each of a module's parameters, by name: ``absent``, ``none``, or ``foreign``."""
    kinds: dict[type, str] = {AbsentParameter: "absent", type(None): "none"}
    return {name: kinds.get(type(parameter), "foreign") for name, parameter in module._parameters.items()}


class Fingerprint:
    """Records the state of a module and its submodules."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = [_Module(name or "the module", child) for name, child in module.named_modules()]

    def differences(self) -> list[str]:
        """Return a phrase for each change since the recording. Empty if nothing changed."""
        return [phrase for module in self._modules if not module.same() for phrase in module.differences()]

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded tensors and of their copies."""
        found = {id(tensor): tensor for module in self._modules for tensor in module.tensors()}
        return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


class _Module:
    """The recorded ``__dict__`` of one module."""

    def __init__(self, label: str, module: nn.Module) -> None:
        self._label = label
        self._module = module
        self._kind = type(module)
        self._parameter_kinds = _parameter_kinds(module)
        self._names, self._types = list(module._parameters), list(map(type, module._parameters.values()))
        self._buffers = {key: _Entry(value) for key, value in module._buffers.items()}
        self._keys, self._values = list(vars(module)), list(vars(module).values())
        # Most values are plain, and most containers are empty. Only the others need an entry.
        self._empty: list[Any] = []
        self._entries: dict[str, _Entry] = {}
        for key, value in vars(module).items():
            if isinstance(value, _PLAIN) or key in _COMPARED_SEPARATELY:
                continue
            if isinstance(value, (dict, set)) and not value:
                self._empty.append(value)
            else:
                self._entries[key] = _Entry(value)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the recorded tensors and their copies."""
        for entry in (*self._buffers.values(), *self._entries.values()):
            yield from entry.tensors()

    def same(self) -> bool:
        """Whether nothing changed. A quick and exact check."""
        now = vars(self._module)
        return (
            type(self._module) is self._kind
            and list(now) == self._keys
            and (all(map(is_, now.values(), self._values)) or all(map(_identical, now.values(), self._values)))
            and not any(self._empty)
            and all(entry.untouched() or entry.same(entry.value) for entry in self._entries.values())
            and list(self._module._parameters) == self._names
            and list(map(type, self._module._parameters.values())) == self._types
            and self._module._buffers.keys() == self._buffers.keys()
            and all(entry.same(self._module._buffers[key]) for key, entry in self._buffers.items())
        )

    def differences(self) -> list[str]:
        """Return a phrase for each change. The caller knows that there is one."""
        label, found = self._label, list[str]()
        if _parameter_kinds(self._module) != self._parameter_kinds:
            found.append(f"{label}: parameters are {sorted(_parameter_kinds(self._module).items())}")
        if type(self._module) is not self._kind:
            found.append(f"{label}: type {type(self._module).__name__}, was {self._kind.__name__}")
        now = vars(self._module)
        before = dict(zip(self._keys, self._values, strict=True))
        found += _compare(label, "", now, {key: self._unchanged(key, now.get(key), before[key]) for key in before})
        buffers = self._module._buffers
        same = {key: entry.same(buffers.get(key)) for key, entry in self._buffers.items()}
        found += _compare(label, "buffer ", buffers, same)
        return found or [f"{label}: the order of its attributes changed"]

    def _unchanged(self, key: str, now: Any, before: Any) -> bool:
        """Whether an attribute is what it was. Parameters and buffers are compared elsewhere."""
        if key in _COMPARED_SEPARATELY:
            return True
        if key in self._entries:
            return self._entries[key].same(now)
        return _identical(now, before) and (isinstance(before, _PLAIN) or not before)


def _compare(label: str, what: str, now: Mapping[str, Any], unchanged: Mapping[str, bool]) -> list[str]:
    """Return a phrase for each change of names. ``unchanged``: whether each recorded name has its value."""
    found = [f"{label}: {what}{key} was added" for key in now.keys() - unchanged.keys()]
    for key, same in unchanged.items():
        if key not in now:
            found.append(f"{label}: {what}{key} was removed")
        elif not same:
            found.append(f"{label}: {what}{key} changed")
    return found
