"""The only module that moves bytes: from a file to host memory, and from there to a device and back.

Files that Safelight does not own are read with ``pread``. If such a file shrinks, a read is short and raises an error;
a memory map would kill the process. One pass reads, hashes and casts the bytes. Copies are verified by their sum at the
target. No source is freed and no target is read before the copy's fence has passed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
import xxhash

from safelight.devices import sums
from safelight.devices.base import Device, Fence
from safelight.devices.verification import Verification
from safelight.errors import IntegrityError, TransferError
from safelight.files.disk import open_regular
from safelight.files.header import Beside
from safelight.logs import Log

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = Log(__name__)

CHUNK_ELEMENTS = 1 << 19
"""Elements of a chunk. A chunk and its casts are small enough for a core's caches (fp16 to bf16 is 2.3 times as fast in
blocks), and large enough to keep the interpreter's overhead small."""

PIECE_BYTES = 1 << 20
"""Bytes of each piece when a corrupted copy is repeated. They are small, because large copies are what fails."""

LOWEST_PRIORITY = 19
"""The lowest thread priority: such a thread runs only if no other wants the core."""

FENCE_RETRIES = 4
"""How often a fence is waited for again before its copy is repeated."""

FILL_BYTE = 0xA5
"""The byte that fills the target before a copy that will be verified."""

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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""torch's dtypes by safetensors' names. Adapters also use F64 and integers."""


_CHANGED_REMEDY = (
    "The file changed since it was added. If you changed it, add it again with `safelight models add` or "
    "`safelight adapters add`; if not, download it again."
)


COMPILED_DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes to which :attr:`Blocks.compiled` dequantises."""


Compiled = Callable[[torch.Tensor, torch.Tensor], None]
"""Dequantises blocks (uint8, flat) to fp32 or bf16 (flat) at once, where both are."""

FindCompiled = Callable[[], Compiled | None]
"""Returns the function, None if there is none."""


class Decode(Protocol):
    """Dequantises blocks."""

    def __call__(self, raw: torch.Tensor, out: torch.Tensor, first: int, beside: torch.Tensor, /) -> None:
        """Dequantise blocks.

        ``raw``: their bytes, uint8, flat.
        ``out``: where to write their numbers, fp32, flat.
        ``first``: the number of the first of them within the tensor.
        ``beside``: the bytes of the tensors beside, uint8, flat.
        """
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """A form in which several numbers share a block of bytes.

    ``elements``, ``nbytes``: of a block.
    ``compiled``: the functions that do so faster, each for a type of device.
    """

    elements: int
    nbytes: int
    decode: Decode
    compiled: Mapping[str, FindCompiled] = field(default_factory=dict[str, FindCompiled])

    def compiled_for(self, target: torch.Tensor) -> Compiled | None:
        """Return the function that dequantises to a tensor at once; None if there is none."""
        find = self.compiled.get(target.device.type)
        return None if find is None or target.dtype not in COMPILED_DTYPES else find()

    def decode_to(
        self, raw: torch.Tensor, target: torch.Tensor, first: int, beside: torch.Tensor, wide: torch.Tensor
    ) -> None:
        """Dequantise blocks in fp32, and round once to the target's dtype.

        ``raw``, ``first``, ``beside``: see :class:`Decode`.
        ``target``: flat, contiguous.
        ``wide``: fp32, on the same device, with as many numbers; it is used if the target has another dtype.
        """
        compiled = self.compiled_for(target)
        if compiled is not None:
            compiled(raw, target)
        elif target.dtype == torch.float32:
            self.decode(raw, target, first, beside)
        else:
            self.decode(raw, wide, first, beside)
            target.copy_(wide)


@dataclass(frozen=True, slots=True)
class Read:
    """Read ``nbytes`` bytes at ``offset`` of ``path`` into ``target`` and compare their XXH3-128 with ``xxh3`` (hex).

    ``dtype``: the dtype in the file, by safetensors' name.
    ``transpose``: the file stores the transposed matrix.
    ``target``: in host memory, with the shape that the module expects and the final dtype.
    ``hash_result``: whether to hash the target's final bytes too.
    ``swap_halves``: the file stores the second half of the rows before the first.
    ``blocks``: how to dequantise the bytes; None for a plain dtype.
    ``beside``: the tensors that ``blocks`` needs. Without ``blocks``, the target has their bytes at its end.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: str
    transpose: bool
    xxh3: str
    target: torch.Tensor
    hash_result: bool = True
    swap_halves: bool = False
    blocks: Blocks | None = None
    beside: tuple[Beside, ...] = ()


class _Staging(threading.local):
    """Each thread's own buffers: bytes from the file, and fp32 values on the way from fp16 to bf16."""

    def __init__(self) -> None:
        self.raw = torch.empty(CHUNK_ELEMENTS * 4, dtype=torch.uint8, device="cpu")
        self.wide = torch.empty(CHUNK_ELEMENTS, dtype=torch.float32, device="cpu")


STAGING_BYTES = CHUNK_ELEMENTS * 8
"""Bytes of the buffers of one reading thread."""

_staging = _Staging()


def read_all(reads: Sequence[Read], threads: int, background: bool = False) -> list[str]:
    """Do all reads on ``threads`` threads, and return each target's XXH3-128 (hex) in order, "" if not hashed.

    It returns when every byte has arrived and every hash is correct.

    ``background``: nobody waits for these reads, so the reader threads run only while no other thread wants the cores.
    Raises IntegrityError if bytes differ from the manifest or a file is too short.
    """
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for path in {read.path for read in reads} | {one.path for read in reads for one in read.beside}:
            opened[path], _ = open_regular(path)
            stack.callback(os.close, opened[path])
        if not background and (threads == 1 or len(reads) == 1):
            return _run(reads, opened)
        # Each reader casts on one thread, because the OpenMP teams of several readers would compete for the cores. The
        # number of threads belongs to the thread that sets it. New threads inherit it, so it is restored.
        with (
            torch_threads(torch.get_num_threads()),
            ThreadPoolExecutor(threads, "safelight-read", _prepare, (background,)) as pool,
        ):
            futures = [pool.submit(_run, share, opened) for share in _shares(reads, threads)]
            return [digest for future in futures for digest in future.result()]


def _prepare(background: bool) -> None:
    """Initialise a new reader thread."""
    torch.set_num_threads(1)
    if background and sys.platform == "linux":
        # All threads of a denoising step wait for the slowest one, so a reader on one core delays all cores. Only Linux
        # has priorities per thread. A thread cannot raise its priority again, so the caller's must never be lowered.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)


@contextlib.contextmanager
def torch_threads(threads: int) -> Generator[None]:
    """Compute on ``threads`` threads within the context, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shares(reads: Sequence[Read], count: int) -> list[list[Read]]:
    """Split the reads into ``count`` parts of about equal bytes, each in the file's order."""
    shares: list[list[Read]] = [[] for _ in range(count)]
    total, done = sum(read.nbytes for read in reads) or 1, 0
    for read in reads:
        shares[min(count - 1, done * count // total)].append(read)
        done += read.nbytes
    return shares


def _run(reads: Iterable[Read], opened: dict[Path, int]) -> list[str]:
    with torch.inference_mode():
        return [_read(read, opened) for read in reads]


def _read(read: Read, opened: Mapping[Path, int]) -> str:
    goal, blocks, descriptor = read.target.dtype, read.blocks, opened[read.path]
    elements, nbytes = (1, DTYPES[read.dtype].itemsize) if blocks is None else (blocks.elements, blocks.nbytes)
    in_order = not read.transpose and not read.swap_halves
    flat = read.target.view(-1) if in_order else torch.empty(read.target.numel(), dtype=goal, device="cpu")
    arrived, produced = xxhash.xxh3_128(), xxhash.xxh3_128()
    direct = blocks is None and DTYPES[read.dtype] == goal
    beside = _read_beside(read, flat, opened)
    most = max(1, min(CHUNK_ELEMENTS // elements, _staging.raw.numel() // nbytes)) * nbytes
    for done in range(0, read.nbytes, most):
        size = min(most, read.nbytes - done)
        target = flat[done // nbytes * elements : (done + size) // nbytes * elements]
        chunk = target.view(torch.uint8) if direct else _staging.raw[:size]
        view = _bytes_of(chunk)
        _fill(read, descriptor, view, read.offset + done)
        arrived.update(view)
        if not direct:
            if blocks is None:
                _cast(chunk.view(DTYPES[read.dtype]), target)
            else:
                blocks.decode_to(chunk, target, done // nbytes, beside, _staging.wide[: target.numel()])
            if read.hash_result:
                produced.update(_bytes_of(target.view(torch.uint8)))
    digest = arrived.hexdigest()
    if digest != read.xxh3:
        raise IntegrityError(read.path, read.name, "its bytes differ from the manifest", _CHANGED_REMEDY)
    if not in_order:
        ordered = flat.view(read.target.shape[::-1]).t() if read.transpose else flat.roll(flat.numel() // 2)
        read.target.copy_(ordered.view(read.target.shape) if read.swap_halves else ordered)
        return checksum_of(read.target) if read.hash_result else ""
    if read.beside and direct:
        arrived.update(_bytes_of(beside))
        return arrived.hexdigest()
    return digest if direct else produced.hexdigest()


def _read_beside(read: Read, flat: torch.Tensor, opened: Mapping[Path, int]) -> torch.Tensor:
    """Return the bytes of the tensors beside, verified.

    ``flat``: the target. Without blocks, it has them at its end.
    """
    total = sum(one.nbytes for one in read.beside)
    whole = torch.empty(total, dtype=torch.uint8, device="cpu") if read.blocks is not None else flat[read.nbytes :]
    at = 0
    for one in read.beside:
        view = _bytes_of(whole[at : at + one.nbytes])
        _fill(one, opened[one.path], view, one.offset)
        if xxhash.xxh3_128(view).hexdigest() != one.xxh3:
            raise IntegrityError(one.path, one.name, "its bytes differ from the manifest", _CHANGED_REMEDY)
        at += one.nbytes
    return whole


def checksum_of(tensor: torch.Tensor) -> str:
    """Return the XXH3-128 (hex) of a contiguous tensor in host memory."""
    return xxhash.xxh3_128(_bytes_of(tensor.view(-1).view(torch.uint8))).hexdigest() if tensor.numel() else _EMPTY


_EMPTY = xxhash.xxh3_128().hexdigest()


def _bytes_of(chunk: torch.Tensor) -> memoryview:
    return memoryview(cast("Buffer", chunk.numpy()))


def _fill(read: Read | Beside, descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise IntegrityError(read.path, read.name, "the file ends before the tensor does", _CHANGED_REMEDY)
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
    """Counts of copies.

    ``copies``, ``nbytes``: all copies, and their bytes.
    ``wrong``: how many arrived corrupted.
    ``repaired``: how many of these were correct after a repair.
    """

    copies: int = 0
    nbytes: int = 0
    wrong: int = 0
    repaired: int = 0


class Transfers:
    """Copies bytes from the host to one device. Thread-safe: threads wait for each other.

    If the device has staging buffers, bytes go through two of them: one is filled while the other is copied.

    ``verification``: decides which copies are verified.
    ``staging_buffer_bytes``: bytes of each buffer, 0 for none, None for the device's default.
    """

    def __init__(
        self, device: Device, verification: Verification | None = None, staging_buffer_bytes: int | None = None
    ) -> None:
        self.device = device
        self.verification = verification or Verification("always")
        self.counts = Counts()
        size = device.staging_buffer_bytes if staging_buffer_bytes is None else staging_buffer_bytes
        self._buffers = [device.staging(size) for _ in range(2)] if size else []
        self._lock = threading.Lock()

    @property
    def staging_bytes(self) -> int:
        """Bytes of host memory in the staging buffers."""
        return sum(buffer.numel() for buffer in self._buffers)

    def push(self, what: str, source: torch.Tensor, target: torch.Tensor, verify: bool = True) -> sums.Sum | None:
        """Copy host bytes to the device, and return when they have arrived.

        ``what``: a name for logs and errors.
        ``source``, ``target``: uint8, contiguous, of the same size.
        ``verify``: compare the sums of source and target. A corrupted copy is repeated in small pieces.

        Returns the sum if the copy was verified, else None.
        Raises TransferError if the repeated copy is corrupted too. The caller may read the source again and retry.
        """
        with self._lock:
            self.counts.copies += 1
            self.counts.nbytes += source.numel()
            if not verify:
                self._copy(source, target)
                return None
            # The target may hold the same bytes from before. Without the mark, a missing copy would look correct.
            with self.device.copy_stream():
                target.fill_(FILL_BYTE)
            with self.verification.timed():
                sent = sums.compute_sum(source)
            fences = self._copy(source, target)
            if self._matches(target, sent):
                return sent
            self.counts.wrong += 1
            self.verification.found_wrong()
            _log.warning("a copy arrived corrupted; repairing it", what=what, nbytes=source.numel())
            if self._arrives_late(fences, target, sent) or self._in_pieces(source, target, sent):
                self.counts.repaired += 1
                return sent
        raise TransferError(what, self.device.name, source.numel())

    def bring(self, what: str, tensor: torch.Tensor, always_verify: bool = False) -> torch.Tensor:
        """Copy a tensor of host memory to the device, into memory of torch's allocator.

        ``what``: names its content. It decides together with the policy whether the copy is verified.
        ``tensor``: contiguous.
        ``always_verify``: verify this copy, unless the policy is ``off``.
        Raises TransferError: see :meth:`push`.
        """
        target = torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8, device=self.device.torch)
        if tensor.numel():
            # The allocator may give memory that submitted work still uses.
            self.device.record_fence().wait()
            verify = self.verification.due(what) or (always_verify and self.verification.policy != "off")
            self.push(what, tensor.view(-1).view(torch.uint8), target, verify)
        return target.view(tensor.dtype).view(tensor.shape)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> list[Fence]:
        """Submit the copy in parts, wait for all of them, and return their fences.

        A staging buffer is filled again only after its fence has passed. Also after an error, no copy is in flight when
        this returns: late bytes would overwrite somebody else's slab.
        """
        fences: list[Fence] = []
        try:
            if not self._buffers:
                fences.append(self.device.push(source, target))
            size = self._buffers[0].numel() if self._buffers else source.numel()
            for number, at in enumerate(range(0, source.numel(), size) if self._buffers else ()):
                if number >= len(self._buffers):
                    fences[number - len(self._buffers)].wait()
                part = source[at : at + size]
                buffer = self._buffers[number % len(self._buffers)][: part.numel()]
                buffer.copy_(part)
                fences.append(self.device.push(buffer, target[at : at + size]))
            for fence in fences:
                fence.wait()
        except BaseException:
            for fence in fences:
                with contextlib.suppress(Exception):
                    fence.wait()
            raise
        return fences

    def _matches(self, target: torch.Tensor, sent: sums.Sum) -> bool:
        with self.verification.timed(), self.device.copy_stream():
            return sums.compute_sum(target) == sent

    def _arrives_late(self, fences: Sequence[Fence], target: torch.Tensor, sent: sums.Sum) -> bool:
        """Wait again, and return whether the bytes are correct then. If so, only the first wait had failed."""
        for _ in range(FENCE_RETRIES):
            for fence in fences:
                fence.wait()
            if self._matches(target, sent):
                return True
        return False

    def _in_pieces(self, source: torch.Tensor, target: torch.Tensor, sent: sums.Sum) -> bool:
        for at in range(0, source.numel(), PIECE_BYTES):
            self.device.push(source[at : at + PIECE_BYTES], target[at : at + PIECE_BYTES]).wait()
        return self._matches(target, sent)
