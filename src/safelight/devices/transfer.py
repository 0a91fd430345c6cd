"""The one place in which bytes move: from a file into host memory, and from there to a device and back.

Files that Safelight does not own are read with ``pread``: a file that shrinks then gives a short read and an error,
where a map would kill the process. What is read is hashed and cast in the same pass; what is copied is summed where it
arrived. No source is freed and no target read before the fence between them is passed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import structlog
import torch
import xxhash

from safelight.devices import sums
from safelight.devices.base import Device, Fence
from safelight.devices.verification import Verification
from safelight.errors import IntegrityError, TransferError
from safelight.files import open_regular

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = structlog.get_logger(__name__)

CHUNK_ELEMENTS = 1 << 19
"""Small enough for a chunk and its casts to stay in a core's caches (fp16 to bf16 goes 2.3 times as fast in blocks),
large enough for the interpreter's own time to count little."""

PIECE_BYTES = 1 << 20
"""Of a synchronous copy that repeats one that went wrong: small, as large copies are what goes wrong."""

LOWEST = 19
"""The priority of a thread that runs when nothing else does."""

WAITS = 4
"""How often a fence is waited for again before a copy is repeated."""

MARKED = 0xA5
"""Fills the target of a copy that will be verified."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Torch's by the format's names; adapters have the wide ones and integers."""


@dataclass(frozen=True, slots=True)
class Read:
    """Read ``nbytes`` bytes at ``offset`` of ``path`` into ``target`` and compare their XXH3-128 with ``xxh3`` (hex).

    ``target`` is in host memory, has the shape that the module expects and its final dtype; ``dtype`` is the file's.
    With ``transpose`` the bytes hold the matrix the other way round. ``prove``: whether what is produced is hashed too.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: str
    transpose: bool
    xxh3: str
    target: torch.Tensor
    prove: bool = True


class _Staging(threading.local):
    """Each thread's own chunks: bytes as read, and fp32 between fp16 and bf16."""

    def __init__(self) -> None:
        self.raw = torch.empty(CHUNK_ELEMENTS * 4, dtype=torch.uint8, device="cpu")
        self.wide = torch.empty(CHUNK_ELEMENTS, dtype=torch.float32, device="cpu")


STAGING_BYTES = CHUNK_ELEMENTS * 8
"""Of one reading thread."""

_staging = _Staging()


def read_all(reads: Sequence[Read], threads: int, favour: bool = False) -> list[str]:
    """Carry out all reads, on ``threads`` threads; the XXH3-128 (hex) of each target as it was produced, in order.

    ``favour``: nobody waits for them, so the readers get the cores only while nothing else wants them. Returns when
    every byte has arrived and every hash was right. Raises IntegrityError when bytes differ from the manifest, or end
    too early.
    """
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for path in {read.path for read in reads}:
            opened[path], _ = open_regular(path)
            stack.callback(os.close, opened[path])
        if not favour and (threads == 1 or len(reads) == 1):
            return _run(reads, opened)
        # Each reader casts by itself: OpenMP teams of several readers would fight for the cores. The number belongs to
        # the thread that sets it; what new threads inherit is put back.
        with (
            numbered(torch.get_num_threads()),
            ThreadPoolExecutor(threads, "safelight-read", _prepare, (favour,)) as pool,
        ):
            futures = [pool.submit(_run, share, opened) for share in _shares(reads, threads)]
            return [digest for future in futures for digest in future.result()]


def _prepare(favour: bool) -> None:
    """In a new reader."""
    torch.set_num_threads(1)
    if favour and sys.platform == "linux":
        # A step's threads wait for the slowest of them, so a reader that takes its turn on one core costs it on all.
        # Only Linux has a priority of each thread; a thread cannot raise it again, so it is never the caller's.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)


@contextlib.contextmanager
def numbered(threads: int) -> Generator[None]:
    """Within: this thread computes on ``threads`` threads; after: as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shares(reads: Sequence[Read], count: int) -> list[list[Read]]:
    """The reads in ``count`` parts of about the same bytes, each in the file's order."""
    shares: list[list[Read]] = [[] for _ in range(count)]
    total, done = sum(read.nbytes for read in reads) or 1, 0
    for read in reads:
        shares[min(count - 1, done * count // total)].append(read)
        done += read.nbytes
    return shares


def _run(reads: Iterable[Read], opened: dict[Path, int]) -> list[str]:
    with torch.inference_mode():
        return [_read(read, opened[read.path]) for read in reads]


def _read(read: Read, descriptor: int) -> str:
    source, goal = DTYPES[read.dtype], read.target.dtype
    flat = read.target if not read.transpose else torch.empty(read.target.shape[::-1], dtype=goal, device="cpu")
    flat = flat.view(-1)
    item = source.itemsize
    arrived, produced = xxhash.xxh3_128(), xxhash.xxh3_128()
    direct = source == goal
    most = min(CHUNK_ELEMENTS * item, _staging.raw.numel())
    for done in range(0, read.nbytes, most):
        size = min(most, read.nbytes - done)
        target = flat[done // item : (done + size) // item]
        chunk = target.view(torch.uint8) if direct else _staging.raw[:size]
        view = _bytes_of(chunk)
        _fill(read, descriptor, view, read.offset + done)
        arrived.update(view)
        if not direct:
            _cast(chunk.view(source), target)
            if read.prove:
                produced.update(_bytes_of(target.view(torch.uint8)))
    digest = arrived.hexdigest()
    if digest != read.xxh3:
        raise IntegrityError(read.path, read.name, "its bytes are not those of the manifest")
    if read.transpose:
        read.target.copy_(flat.view(read.target.shape[::-1]).t())
        return digest_of(read.target) if read.prove else ""
    return digest if direct else produced.hexdigest()


def digest_of(tensor: torch.Tensor) -> str:
    """XXH3-128 (hex) of a contiguous tensor in host memory."""
    return xxhash.xxh3_128(_bytes_of(tensor.view(-1).view(torch.uint8))).hexdigest() if tensor.numel() else _EMPTY


_EMPTY = xxhash.xxh3_128().hexdigest()


def _bytes_of(chunk: torch.Tensor) -> memoryview:
    return memoryview(cast("Buffer", chunk.numpy()))


def _fill(read: Read, descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise IntegrityError(read.path, read.name, "the file ends before it does")
        view, offset = view[got:], offset + got


def _cast(chunk: torch.Tensor, target: torch.Tensor) -> None:
    if chunk.dtype == torch.float16 and target.dtype == torch.bfloat16:
        wide = _staging.wide[: chunk.numel()]
        wide.copy_(chunk)
        target.copy_(wide)
    else:
        target.copy_(chunk)


@dataclass
class Counts:
    """What happened to copies: ``wrong`` arrived other than they were sent, ``again`` were right when repeated."""

    copies: int = 0
    nbytes: int = 0
    wrong: int = 0
    again: int = 0


class Transfers:
    """Copies from the host to one device; ``verification`` says which are summed where they arrive.

    Where the device copies best from memory of its own kind (``stage_bytes``), bytes go through two such buffers, the
    next one filled while the last is on its way; ``stage_bytes`` sets their size instead. Safe to be used by several
    threads, which wait for each other.
    """

    def __init__(
        self, device: Device, verification: Verification | None = None, stage_bytes: int | None = None
    ) -> None:
        self.device = device
        self.verification = verification or Verification("always")
        self.counts = Counts()
        size = device.stage_bytes if stage_bytes is None else stage_bytes
        self._stages = [device.staging(size) for _ in range(2)] if size else []
        self._lock = threading.Lock()

    @property
    def staging_bytes(self) -> int:
        """Host memory that is held for copies."""
        return sum(stage.numel() for stage in self._stages)

    def push(self, what: str, source: torch.Tensor, target: torch.Tensor, verify: bool = True) -> sums.Sum | None:
        """Copy host bytes to the device, and return when they are there: uint8, contiguous, of one size.

        Gives their sum where they were to be verified, else None. ``what`` names them. A copy that arrived otherwise
        than it was sent is repeated in small synchronous pieces; raises TransferError when that did not help either.
        Whoever reads the source again may then try once more.
        """
        with self._lock:
            self.counts.copies += 1
            self.counts.nbytes += source.numel()
            if not verify:
                self._submitted(source, target)
                return None
            # What was there before may be the same bytes: then a copy that has not arrived would pass for one that has.
            with self.device.aside():
                target.fill_(MARKED)
            with self.verification.timed():
                sent = sums.of(source)
            fences = self._submitted(source, target)
            if self._is(target, sent):
                return sent
            self.counts.wrong += 1
            self.verification.found_wrong()
            _log.warning("a copy arrived otherwise than it was sent; it is repeated", what=what, nbytes=source.numel())
            if self._arrives(fences, target, sent) or self._in_pieces(source, target, sent):
                self.counts.again += 1
                return sent
        raise TransferError(what, self.device.name, source.numel())

    def _submitted(self, source: torch.Tensor, target: torch.Tensor) -> list[Fence]:
        """Submit the copy and wait for it; the fences of its parts. A buffer is filled again only after its fence.

        Whatever is raised, nothing is on its way any more when this ends: late bytes would land in another's slab.
        """
        fences: list[Fence] = []
        try:
            if not self._stages:
                fences.append(self.device.push(source, target))
            size = self._stages[0].numel() if self._stages else source.numel()
            for number, at in enumerate(range(0, source.numel(), size) if self._stages else ()):
                if number >= len(self._stages):
                    fences[number - len(self._stages)].wait()
                part = source[at : at + size]
                stage = self._stages[number % len(self._stages)][: part.numel()]
                stage.copy_(part)
                fences.append(self.device.push(stage, target[at : at + size]))
            for fence in fences:
                fence.wait()
        except BaseException:
            for fence in fences:
                with contextlib.suppress(Exception):
                    fence.wait()
            raise
        return fences

    def _is(self, target: torch.Tensor, sent: sums.Sum) -> bool:
        with self.verification.timed(), self.device.aside():
            return sums.of(target) == sent

    def _arrives(self, fences: Sequence[Fence], target: torch.Tensor, sent: sums.Sum) -> bool:
        """Whether waiting again helps: then it was the waiting that had failed, and nothing is on its way any more."""
        for _ in range(WAITS):
            for fence in fences:
                fence.wait()
            if self._is(target, sent):
                return True
        return False

    def _in_pieces(self, source: torch.Tensor, target: torch.Tensor, sent: sums.Sum) -> bool:
        for at in range(0, source.numel(), PIECE_BYTES):
            self.device.push(source[at : at + PIECE_BYTES], target[at : at + PIECE_BYTES]).wait()
        return self._is(target, sent)
