"""Skeletons: modules without weights, one for each component configuration, ready to be bound.

Building a skeleton takes tens of milliseconds, so skeletons are cached. A skeleton that a job changed is not repaired.
It is discarded and built again, and the log lists the changes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from safelight.boundary import modules
from safelight.families.components import Config
from safelight.families.family_model import family_model
from safelight.families.registry import family
from safelight.logs import Log
from safelight.memory.account import BufferAccount
from safelight.models.absent import AbsentParameter
from safelight.models.fingerprint import Fingerprint

_log = Log(__name__)

CPU = torch.device("cpu")

MAX_CACHED = 12
"""How many skeletons are cached: the components of three or four architectures. Each is a few MB of Python objects."""


@dataclass(frozen=True, slots=True)
class SkeletonKey:
    """The inputs from which a skeleton is built.

    ``base``: family name. Some module settings follow from the family, not from tensor shapes.
    ``attention``: name of the attention kernel.
    ``device``: the device that computes. It holds the real buffers.
    ``slice_size``: for the kernel ``sliced``.
    ``seamless``: axes along which convolutions wrap around to the opposite side.
    """

    base: str
    role: str
    config: Config
    dtype: torch.dtype
    attention: str
    device: torch.device = CPU
    slice_size: str = "auto"
    seamless: str = ""


Build = Callable[[SkeletonKey], nn.Module]
"""Builds the module of a key. Its parameters are on the meta device, and its buffers are real."""


def build(key: SkeletonKey) -> nn.Module:
    """Build the component's module with diffusers or transformers."""
    model_family = family(key.base)
    model = family_model(model_family)
    return modules.build(
        lambda: model.build(model_family, key.config, key.attention),
        model.run_lazy_init,
        model.make_buffer,
        model.make_caches,
        key.config.keeps_fp32,
        key.dtype,
        key.attention,
        key.device,
        key.slice_size,
        key.seamless,
    )


class Skeleton:
    """A module with absent parameters and no persistent buffers. Other buffers (CLIP's ``position_ids``) are real.

    ``parameter_owners``: maps each tensor's name to its module and attribute.
    ``shapes``: maps each tensor's name to its shape.
    ``dtypes``: maps each tensor's name to its dtype.
    ``nbytes``: bytes of its buffers, of what its modules cache in plain attributes, and of the copies to compare them.
    """

    def __init__(self, key: SkeletonKey, build: Build = build) -> None:
        self.key = key
        self.module = build(key)
        self.parameter_owners: dict[str, tuple[nn.Module, str]] = {}
        self._absent: dict[str, AbsentParameter] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path, child in self.module.named_modules():
            for attribute, parameter in child._parameters.items():
                if parameter is not None:
                    name = f"{path}.{attribute}" if path else attribute
                    self.parameter_owners[name] = (child, attribute)
                    self.shapes[name] = parameter.shape
                    self.dtypes[name] = parameter.dtype
                    self._absent[name] = AbsentParameter(name, parameter.shape, parameter.dtype)
                    child._parameters[attribute] = self._absent[name]
        self._fingerprint = Fingerprint(self.module)
        self.nbytes = self._fingerprint.nbytes

    def clear(self) -> None:
        """Replace the bound parameters with the absent ones."""
        for name, (child, attribute) in self.parameter_owners.items():
            child._parameters[attribute] = self._absent[name]

    def differences(self) -> list[str]:
        """Return the changes since it was built."""
        return self._fingerprint.differences()


class SkeletonCache:
    """A cache of unbound skeletons by key. Thread-safe.

    ``account``: charges the skeletons' tensors to the ledger; None to charge nothing.
    """

    def __init__(self, max_count: int = MAX_CACHED, build: Build = build, account: BufferAccount | None = None) -> None:
        self._build = build
        self._account = account
        self._free: OrderedDict[SkeletonKey, Skeleton] = OrderedDict()
        self._max_count = max_count
        self._lock = threading.Lock()

    def take(self, key: SkeletonKey) -> Skeleton:
        """Return a skeleton for exclusive use: an unchanged cached one, or a new one."""
        with self._lock:
            cached = self._free.pop(key, None)
        if cached is not None and (changed := cached.differences()):
            # Code that still has a reference to one of its modules changed it while it was in the cache.
            self._log_discard(cached, changed)
            cached = None
        if cached is not None:
            return cached
        skeleton = Skeleton(key, self._build)
        if self._account is not None:
            self._account.charge(skeleton.module, skeleton.nbytes, f"the skeleton of {key.base} {key.role}")
        return skeleton

    def put_back(self, skeleton: Skeleton) -> list[str]:
        """Put a skeleton back into the cache. If it changed, discard it and return the changes."""
        changed = skeleton.differences()
        if changed:
            self._log_discard(skeleton, changed)
            return changed
        with self._lock:
            self._free[skeleton.key] = skeleton
            self._free.move_to_end(skeleton.key)
            while len(self._free) > self._max_count:
                self._free.popitem(last=False)
        return []

    def clear(self) -> None:
        """Discard all cached skeletons."""
        with self._lock:
            self._free.clear()
        if self._account is not None:
            self._account.settle()

    def check(self) -> list[str]:
        """Return the changes of all cached skeletons, and discard the changed ones."""
        with self._lock:
            cached = list(self._free.items())
        found: list[str] = []
        for key, skeleton in cached:
            if changed := skeleton.differences():
                with self._lock:
                    self._free.pop(key, None)
                self._log_discard(skeleton, changed)
                found += [f"{key.base} {key.role}: {what}" for what in changed]
        return found

    @staticmethod
    def _log_discard(skeleton: Skeleton, changed: list[str]) -> None:
        event = "a skeleton changed since it was built; it is built again"
        _log.warning(event, role=skeleton.key.role, changed=changed[:8])
