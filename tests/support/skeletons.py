"""Skeletons that all engines of a test process share: building them takes longer than most images of the tests.

A skeleton is compared with what it was whenever it is taken and put back, so what one test did to it is no other's. On
a simulated device every engine builds its own: their buffers are in that device's memory.
"""

from __future__ import annotations

from safelight.models.skeleton import Skeleton, SkeletonCache, SkeletonKey

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
