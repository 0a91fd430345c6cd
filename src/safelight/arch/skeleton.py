"""Skeletons: architectures without bytes, one for each component configuration, ready to be bound.

Building one takes tens of milliseconds, so it is kept. A skeleton that a job left changed is not repaired: it is
dropped and built anew, and the log says what had changed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch
from torch import nn

from safelight.arch.absent import AbsentParameter
from safelight.arch.diffusers_fence import modules
from safelight.arch.fingerprint import Fingerprint
from safelight.formats.layout import ComponentConfig

_log = structlog.get_logger(__name__)

CPU = torch.device("cpu")

MOST_KEPT = 12
"""Skeletons kept: the components of three or four architectures. Each is a few megabytes of Python objects."""


@dataclass(frozen=True, slots=True)
class SkeletonKey:
    """What a skeleton is built from. ``base`` decides what shapes do not tell, ``attention`` is the kernel's name;
    ``slice_size`` is for ``sliced``; ``at`` is the device on which it computes, where its real buffers are;
    ``seamless`` names axes along which convolutions go on at the other side."""

    base: str
    role: str
    config: ComponentConfig
    dtype: torch.dtype
    attention: str
    at: torch.device = CPU
    slice_size: str = "auto"
    seamless: str = ""


Build = Callable[[SkeletonKey], nn.Module]
"""Makes the module of a key, on meta but for its buffers."""


def build(key: SkeletonKey) -> nn.Module:
    """The component's module, as diffusers or transformers makes it."""
    return modules.build(key.base, key.config, key.dtype, key.attention, key.at, key.slice_size, key.seamless)


class Skeleton:
    """A module whose parameters and persistent buffers are absent. Others (CLIP's ``position_ids``) are real.

    ``places`` maps each tensor's name to the module that owns it and the attribute.
    """

    def __init__(self, key: SkeletonKey, build: Build = build) -> None:
        self.key = key
        self.module = build(key)
        self.places: dict[str, tuple[nn.Module, str]] = {}
        self._absent: dict[str, AbsentParameter] = {}
        self.shapes: dict[str, torch.Size] = {}
        for path, child in self.module.named_modules():
            for attribute, parameter in child._parameters.items():
                if parameter is not None:
                    name = f"{path}.{attribute}" if path else attribute
                    self.places[name] = (child, attribute)
                    self.shapes[name] = parameter.shape
                    self._absent[name] = AbsentParameter(name, parameter.shape, key.dtype)
                    child._parameters[attribute] = self._absent[name]
        self._fingerprint = Fingerprint(self.module)

    def clear(self) -> None:
        """Put the absent parameters back in the place of those that were bound."""
        for name, (child, attribute) in self.places.items():
            child._parameters[attribute] = self._absent[name]

    def differences(self) -> list[str]:
        """What is not as it was built, parameters left out."""
        return self._fingerprint.differences()


class SkeletonCache:
    """Skeletons that are not bound, by their key. Takes and gives are safe from several threads."""

    def __init__(self, most: int = MOST_KEPT, build: Build = build) -> None:
        self._build = build
        self._free: OrderedDict[SkeletonKey, Skeleton] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def take(self, key: SkeletonKey) -> Skeleton:
        """A skeleton that nobody else has: a kept one that is as it was built, or one that is built now."""
        with self._lock:
            kept = self._free.pop(key, None)
        if kept is not None and (changed := kept.differences()):
            # Somebody kept a reference to one of its modules, and changed it while nobody used it.
            self._dropped(kept, changed)
            kept = None
        return kept if kept is not None else Skeleton(key, self._build)

    def give(self, skeleton: Skeleton) -> list[str]:
        """Take a skeleton back, if it is as it was built; else drop it and say what had changed."""
        changed = skeleton.differences()
        if changed:
            self._dropped(skeleton, changed)
            return changed
        with self._lock:
            self._free[skeleton.key] = skeleton
            self._free.move_to_end(skeleton.key)
            while len(self._free) > self._most:
                self._free.popitem(last=False)
        return []

    def check(self) -> list[str]:
        """What is not as it was built, of the kept ones; these are dropped."""
        with self._lock:
            kept = list(self._free.items())
        found: list[str] = []
        for key, skeleton in kept:
            if changed := skeleton.differences():
                with self._lock:
                    self._free.pop(key, None)
                self._dropped(skeleton, changed)
                found += [f"{key.base} {key.role}: {what}" for what in changed]
        return found

    @staticmethod
    def _dropped(skeleton: Skeleton, changed: list[str]) -> None:
        _log.warning("a skeleton was left changed and is built anew", role=skeleton.key.role, changed=changed[:8])
