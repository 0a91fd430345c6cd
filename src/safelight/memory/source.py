"""Where the bytes of a segment come from, and how they are known again; and the first of it: a file.

What was brought is known again by a *proof*: a value taken when it was produced, which can be taken anew from where the
bytes are now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import torch

from safelight.devices.pool import Slab
from safelight.devices.transfer import digest_of, numbered, read_all
from safelight.errors import IntegrityError
from safelight.memory.plan import Piece
from safelight.memory.scratch import Scratch
from safelight.memory.segments import Segment
from safelight.weights import store
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import Adapted, Overlay

_log = structlog.get_logger(__name__)

Proof = Hashable
"""Equal to another proof of the same segment if and only if the bytes are the same; None where none was taken."""


@dataclass(frozen=True, slots=True)
class Unseen:
    """The ``proof`` that a segment should have, of one that nobody has looked at since it arrived."""

    proof: Proof


@dataclass(frozen=True, eq=False)
class Target:
    """A segment, the slab that it will fill, and the views of its tensors in it."""

    segment: Segment
    slab: Slab
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, segment: Segment, slab: Slab) -> Target:
        return cls(segment, slab, store.views(slab.base, segment.tensors, segment.dtype))


Fetch = Callable[[Sequence[Target]], list[Proof]]
"""Fills the targets, and returns when all bytes are there and were verified; a proof for each."""


class Source(Protocol):
    """Brings segments of a component in a dtype."""

    def opened(
        self, component: ComponentManifest, dtype: torch.dtype, favour: bool = False
    ) -> AbstractContextManager[Fetch]:
        """A way to fetch the component's segments, as often as wanted while the context lasts. ``favour``: nobody needs
        them now."""
        ...

    @property
    def pressed(self) -> bool:
        """Whether somebody waits for room in the memory in which the source itself keeps bytes."""
        ...

    def proof(self, target: Target) -> Proof:
        """The proof of what is there now."""
        ...

    def follow(self, fetch: Fetch) -> None:
        """Between two uses of what ``fetch`` brings: let the memory in which the source itself keeps bytes follow what
        the machine allows now."""
        ...


class FromFile:
    """Reads segments from the manifest's files into host memory, hashed and cast in the same pass; where something lies
    over a weight, what it becomes is computed there, before anybody sees it.

    What a segment becomes in a dtype is always the same, so its proof is taken when it is read for the first time, and
    holds for every later reading. ``threads``: for reading, and for computing what lies over weights, whose last bits
    depend on their number. ``scratch``: a folder on whose disk finished segments of a lease that streams them may lie.
    """

    def __init__(self, threads: int, scratch: Path | None = None) -> None:
        self._threads = threads
        self._folder = scratch
        self._proofs: dict[tuple[str, Piece], Proof] = {}

    @property
    def pressed(self) -> bool:
        """See :class:`Source`: it keeps no bytes."""
        return False

    @contextlib.contextmanager
    def opened(self, component: ComponentManifest, dtype: torch.dtype, favour: bool = False) -> Generator[Fetch]:
        """See :class:`Source`."""
        del dtype
        if not isinstance(component, Adapted):
            yield lambda targets: self._fetch(component.digest, targets, favour)
            return
        with component.recipes() as overlays, Scratch(self._folder) as scratch:
            yield lambda targets: self._fetch_over(component.digest, targets, overlays, scratch)

    def _fetch_over(
        self, digest: str, targets: Sequence[Target], overlays: Mapping[str, Overlay], scratch: Scratch
    ) -> list[Proof]:
        """Bring segments with what lies over them: computed, or as it was computed before in this lease."""
        found = {target: self._kept(digest, target, scratch) for target in targets}
        missing = [target for target, proof in found.items() if proof is None]
        read_all([r for m in missing for r in store.reads(m.segment.tensors, m.tensors, prove=False)], self._threads)
        for target in missing:
            with numbered(self._threads), torch.inference_mode():
                for name, tensor in target.tensors.items():
                    if name in overlays:
                        tensor.copy_(overlays[name].applied(tensor))
            found[target] = self._made(digest, target)
            if any(name in overlays for name in target.tensors):
                scratch.offer(target.segment.piece.index, target.slab.base[: target.segment.nbytes])
        return [found[target] for target in targets]

    def _kept(self, digest: str, target: Target, scratch: Scratch) -> Proof:
        """The proof of a segment that was read from scratch; None where it is not there, or was spoiled."""
        known = self._proofs.get((digest, target.segment.piece))
        if known is None or not scratch.read(target.segment.piece.index, target.slab.base):
            return None
        if self.proof(target) == known:
            return known
        what = target.segment.label
        _log.warning("what was computed before was spoiled on disk; it is computed again", what=what)
        return None

    def _made(self, digest: str, target: Target) -> Proof:
        """The proof of a segment that was just brought. Raises IntegrityError when it is not that of the first time."""
        key, made = (digest, target.segment.piece), self.proof(target)
        if self._proofs.setdefault(key, made) != made:
            what = f"{target.segment.label} with what lies over it"
            raise IntegrityError(target.segment.tensors[0].path, what, "came out otherwise than before")
        return made

    def _fetch(self, digest: str, targets: Sequence[Target], favour: bool) -> list[Proof]:
        keys = [(digest, target.segment.piece) for target in targets]
        reads = [
            read
            for key, target in zip(keys, targets, strict=True)
            for read in store.reads(target.segment.tensors, target.tensors, key not in self._proofs)
        ]
        produced = iter(read_all(reads, self._threads, favour))
        for key, target in zip(keys, targets, strict=True):
            digests = tuple(next(produced) for _ in target.segment.tensors)
            self._proofs.setdefault(key, digests)
        return [self._proofs[key] for key in keys]

    def proof(self, target: Target) -> Proof:
        """See :class:`Source`: the digests of the tensors."""
        return tuple(digest_of(tensor) for tensor in target.tensors.values())

    def follow(self, fetch: Fetch) -> None:
        """See :class:`Source`: it keeps none."""
        del fetch
