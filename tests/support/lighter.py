"""What makes images cheaper in `make test`. In `make test-all` all is as for users.

- All engines of a test process share their skeletons: building them takes longer than most images of the tests. A
  skeleton is compared with what it was whenever it is taken and put back, so what one test did to it is no other's. On
  a simulated device every engine builds its own: their buffers are in that device's memory.
- Of each VAE, an engine decodes the first image a second time to learn what is normal, not the first hundred.
"""

from __future__ import annotations

import pytest

from safelight.assembly import engine
from safelight.models.skeleton import Skeleton, SkeletonCache, SkeletonKey
from safelight.pipeline.checks import appearance
from safelight.pipeline.checks.appearance import _Map

_DOUBTS = _Map.doubts
_COMMON = SkeletonCache(max_count=48)


class SharedSkeletons(SkeletonCache):
    """The cache of one engine. Its skeletons on the CPU are those of all engines."""

    def __init__(self) -> None:
        super().__init__()
        self._free = _COMMON._free
        self._own = SkeletonCache()

    def _of(self, key: SkeletonKey) -> SkeletonCache:
        return _COMMON if key.device.type == "cpu" else self._own

    def take(self, key: SkeletonKey) -> Skeleton:
        return self._of(key).take(key)

    def put_back(self, skeleton: Skeleton) -> list[str]:
        return self._of(skeleton.key).put_back(skeleton)

    def check(self) -> list[str]:
        return _COMMON.check() + self._own.check()


def doubts(self: _Map, scores: tuple[float, float]) -> bool:
    """Whether an image is decoded a second time."""
    return _DOUBTS(self, scores) if self.count >= appearance.ALWAYS_CHECKED else self.count == 0


def make_lighter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "SkeletonCache", SharedSkeletons)
    patch.setattr(_Map, "doubts", doubts)


def as_for_users(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "SkeletonCache", SkeletonCache)
    patch.setattr(_Map, "doubts", _DOUBTS)
