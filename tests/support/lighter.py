"""What makes images cheaper in `make test`. In `make test-all` all is as for users.

- All engines of a test process share their skeletons: building them takes longer than most images of the tests. A
  skeleton is compared with what it was whenever it is taken and put back, so what one test did to it is no other's. On
  a simulated device every engine builds its own: their buffers are in that device's memory.
- Of each VAE, an engine decodes the first image a second time to learn what is normal, not the first hundred; and not
  an image that another engine of the process has decoded twice.
- A test process identifies and hashes an unchanged checkpoint that is used by its path once.
- A test process computes the exact result that attention kernels are compared with once for each shape and dtype.
- A test process builds the commands of the command line once.
- A test process reads the certificates of the system once, not for each HTTP client.
- The self-test of a device copies each size once, not three times, and times 16 MiB, not 64.
"""

from __future__ import annotations

import functools
import ssl
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from torch import nn

from safelight.assembly import engine
from safelight.catalog import library
from safelight.catalog.describe import CONVERTED, Choices, Shelf, read_model
from safelight.catalog.model import Model, Origin
from safelight.devices import selftest
from safelight.memory.account import BufferAccount
from safelight.models import attention
from safelight.models.attention import Shape
from safelight.models.skeleton import Skeleton, SkeletonCache, SkeletonKey
from safelight.pipeline.checks import appearance
from safelight.pipeline.checks.appearance import _Map

_DOUBTS = _Map.doubts
_COMMON = SkeletonCache(max_count=48)
_REFERENCE = attention._reference
_GET_COMMAND = typer.main.get_command
_create_default_context = functools.cache(ssl.create_default_context)
_ROUNDS, _TIMED_BYTES = selftest.ROUNDS, selftest.TIMED_BYTES
_read: dict[Path, Model] = {}
_decoded_twice: set[tuple[float, float]] = set()
_exact: dict[tuple[Shape, torch.dtype, float], torch.Tensor] = {}


class SharedSkeletons(SkeletonCache):
    """The cache of one engine. Its skeletons on the CPU are those of all engines."""

    def __init__(self, account: BufferAccount) -> None:
        super().__init__()
        self._free = _COMMON._free
        self._own = SkeletonCache(account=account)

    def _of(self, key: SkeletonKey) -> SkeletonCache:
        return _COMMON if key.device.type == "cpu" else self._own

    def take(self, key: SkeletonKey) -> Skeleton:
        return self._of(key).take(key)

    def put_back(self, skeleton: Skeleton) -> list[str]:
        return self._of(skeleton.key).put_back(skeleton)

    def clear(self) -> None:
        self._own.clear()

    def check(self) -> list[str]:
        return _COMMON.check() + self._own.check()


def doubts(self: _Map, scores: tuple[float, float]) -> bool:
    """Whether an image is decoded a second time."""
    if self.count >= appearance.ALWAYS_CHECKED:
        return _DOUBTS(self, scores)
    new = scores not in _decoded_twice
    _decoded_twice.add(scores)
    return self.count == 0 and new


def read_model_once(
    shelf: Shelf, path: Path, name: str, origin: Origin, choices: Choices, on_bytes: Any = None
) -> Model:
    """Return what ``read_model`` returned for the same unchanged files, if they are used by their path."""
    known = _read.get(path)
    simple = origin == "path" and choices == Choices() and on_bytes is None
    if simple and known is not None and not known.manifest.changed_files():
        return known
    model = read_model(shelf, path, name, origin, choices, on_bytes)
    if (
        simple
        and not model.sources
        and not path.is_relative_to(shelf.conversions.parent)
        and model.format not in CONVERTED
    ):
        _read[path] = model
    return model


def reference(module: nn.Module, shape: Shape, hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The exact result. All weights and inputs are seeded, so that the first input tells which they are."""
    key = (shape, hidden.dtype, float(hidden.flatten()[0]))
    if key not in _exact:
        _exact[key] = _REFERENCE(module, shape, hidden, keys)
    return _exact[key]


def make_lighter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "SkeletonCache", SharedSkeletons)
    patch.setattr(_Map, "doubts", doubts)
    patch.setattr(library, "read_model", read_model_once)
    patch.setattr(attention, "_reference", reference)
    patch.setattr(typer.main, "get_command", functools.cache(_GET_COMMAND))
    patch.setattr(ssl, "create_default_context", _create_default_context)
    patch.setattr(selftest, "ROUNDS", 1)
    patch.setattr(selftest, "TIMED_BYTES", 1 << 24)


def as_for_users(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "SkeletonCache", SkeletonCache)
    patch.setattr(_Map, "doubts", _DOUBTS)
    patch.setattr(library, "read_model", read_model)
    patch.setattr(attention, "_reference", _REFERENCE)
    patch.setattr(typer.main, "get_command", _GET_COMMAND)
    patch.setattr(selftest, "ROUNDS", _ROUNDS)
    patch.setattr(selftest, "TIMED_BYTES", _TIMED_BYTES)
