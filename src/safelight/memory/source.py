"""Sources of a segment's bytes and how to verify them, and the source that reads files.

A *proof* is a checksum of a segment, computed when its bytes are produced. Computing it again from the bytes in memory
verifies them.
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
from safelight.devices.transfer import checksum_of, read_all, torch_threads
from safelight.errors import IntegrityError
from safelight.memory.plan import Piece
from safelight.memory.scratch import Scratch
from safelight.memory.segments import Segment
from safelight.weights import slab_views
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import OverlaidComponent, Overlay

_log = structlog.get_logger(__name__)

Proof = Hashable
"""Two proofs of a segment are equal if and only if its bytes are equal. None if no proof was computed."""


@dataclass(frozen=True, slots=True)
class Unverified:
    """The expected ``proof`` of a segment that was not verified since it arrived."""

    proof: Proof


@dataclass(frozen=True, eq=False)
class Target:
    """A segment, the slab to read it into, and the views of its tensors in that slab."""

    segment: Segment
    slab: Slab
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, segment: Segment, slab: Slab) -> Target:
        return cls(segment, slab, slab_views.views(slab.base, segment.tensors, segment.dtype))


Fetch = Callable[[Sequence[Target]], list[Proof]]
"""Fills the targets and returns a proof for each, once all bytes have arrived and are verified."""


class Source(Protocol):
    """Fetches the segments of a component in a dtype."""

    def open(
        self, component: ComponentManifest, dtype: torch.dtype, background: bool = False
    ) -> AbstractContextManager[Fetch]:
        """Return a function that fetches the component's segments, any number of times, within the context.

        ``background``: this is a prefetch, and nobody needs the segments yet.
        """
        ...

    @property
    def has_waiting_lease(self) -> bool:
        """Whether a lease waits for room in the memory that the source itself uses."""
        ...

    def proof(self, target: Target) -> Proof:
        """Compute the proof of the bytes that are in the target now."""
        ...

    def follow_budget(self, fetch: Fetch) -> None:
        """Adapt the memory that the source itself uses to the machine's current limits.

        Call it between two uses of the segments that ``fetch`` fills.
        """
        ...


class FileSource:
    """Reads segments from the manifest's files into host memory. One pass reads, hashes and casts the bytes.

    Overlays are applied there, before anybody sees the weights. A segment in a dtype always has the same bytes, so its
    proof is computed at the first read and is valid for all later reads.

    ``threads``: threads for reading and for applying overlays. The last bits of an overlaid weight depend on it.
    ``scratch``: folder for finished segments of a lease that streams them.
    """

    def __init__(self, threads: int, scratch: Path | None = None) -> None:
        self._threads = threads
        self._folder = scratch
        self._proofs: dict[tuple[str, Piece], Proof] = {}

    @property
    def has_waiting_lease(self) -> bool:
        """See :class:`Source`. Always False: this source uses no memory of its own."""
        return False

    @contextlib.contextmanager
    def open(self, component: ComponentManifest, dtype: torch.dtype, background: bool = False) -> Generator[Fetch]:
        """See :class:`Source`."""
        del dtype
        if not isinstance(component, OverlaidComponent):
            yield lambda targets: self._fetch(component.digest, targets, background)
            return
        with component.recipes() as overlays, Scratch(self._folder) as scratch:
            yield lambda targets: self._fetch_over(component.digest, targets, overlays, scratch, background)

    def _fetch_over(
        self,
        digest: str,
        targets: Sequence[Target],
        overlays: Mapping[str, Overlay],
        scratch: Scratch,
        background: bool,
    ) -> list[Proof]:
        """Fetch segments with overlays: apply the overlays, or read the result that this lease stored before."""
        found = {target: self._read_scratch(digest, target, scratch) for target in targets}
        missing = [target for target, proof in found.items() if proof is None]
        read_all(
            [r for m in missing for r in slab_views.reads(m.segment.tensors, m.tensors, prove=False)],
            self._threads,
            background,
        )
        for target in missing:
            with torch_threads(self._threads), torch.inference_mode():
                for name, tensor in target.tensors.items():
                    if name in overlays:
                        tensor.copy_(overlays[name].apply(tensor))
            found[target] = self._checked_proof(digest, target)
            if any(name in overlays for name in target.tensors):
                scratch.offer(target.segment.piece.index, target.slab.base[: target.segment.nbytes])
        return [found[target] for target in targets]

    def _read_scratch(self, digest: str, target: Target, scratch: Scratch) -> Proof:
        """Read a segment from scratch and return its proof. None if it is missing or corrupted."""
        known = self._proofs.get((digest, target.segment.piece))
        if known is None or not scratch.read(target.segment.piece.index, target.slab.base):
            return None
        if self.proof(target) == known:
            return known
        what = target.segment.label
        _log.warning("a scratch file's weights were corrupted on disk; computing them again", what=what)
        return None

    def _checked_proof(self, digest: str, target: Target) -> Proof:
        """The proof of a segment that was just computed. Raises IntegrityError if it differs from the first result."""
        key, proof = (digest, target.segment.piece), self.proof(target)
        if self._proofs.setdefault(key, proof) != proof:
            what = f"{target.segment.label} with its overlay"
            problem = "differs from the first time it was computed"
            remedy = "Test this machine's memory, for example with memtest86+."
            raise IntegrityError(target.segment.tensors[0].path, what, problem, remedy)
        return proof

    def _fetch(self, digest: str, targets: Sequence[Target], background: bool) -> list[Proof]:
        keys = [(digest, target.segment.piece) for target in targets]
        reads = [
            read
            for key, target in zip(keys, targets, strict=True)
            for read in slab_views.reads(target.segment.tensors, target.tensors, key not in self._proofs)
        ]
        produced = iter(read_all(reads, self._threads, background))
        for key, target in zip(keys, targets, strict=True):
            digests = tuple(next(produced) for _ in target.segment.tensors)
            self._proofs.setdefault(key, digests)
        return [self._proofs[key] for key in keys]

    def proof(self, target: Target) -> Proof:
        """See :class:`Source`. The proof is the tensors' digests."""
        return tuple(checksum_of(tensor) for tensor in target.tensors.values())

    def follow_budget(self, fetch: Fetch) -> None:
        """See :class:`Source`. Nothing to do: this source uses no memory of its own."""
        del fetch
