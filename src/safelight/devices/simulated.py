"""An accelerator in CPU memory, for tests and for trying what a machine without one cannot: it can fail on purpose.

To torch it is a device of its own (``simulated:0``, a backend in pure Python), so that a tensor on the wrong device is
an error as on CUDA, while its bits are the CPU's. It has memory of a set size, filled with NaN when it is given out and
when it is given back; copies that arrive late and out of order; and switches for the failures that real devices have
shown (:class:`Faults`).
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from safelight.devices import host
from safelight.devices.base import AHEAD, PASSED, Fence
from safelight.errors import DeviceLostError, OutOfMemoryError

ROUNDING = 512
"""Bytes, as CUDA's caching allocator rounds."""

STAGE_BYTES = 1 << 18
"""Small, so that the copies of tests go through several buffers."""

STREAMS = 2
"""Copies run on so many streams and overtake each other."""

POISON = 0xFF
"""Of which every byte is made that nobody has written: a NaN in each dtype that models use."""


@dataclass
class Faults:
    """What goes wrong. Counts say how often it will still happen; 0 means never.

    ``lost_waits``: a fence that is waited for returns at once, as if the wait had been forgotten.
    ``early_frees``: an asynchronous copy reads its source late, after it was overwritten, as if it had been freed.
    ``corrupt_above``: copies of more bytes lose some of them; None for no such size. ``corrupted``: how many do.
    ``failed_allocations``: memory cannot be had. ``overflow``: a dtype in which large results become infinite.
    ``gone``: the device has disappeared.
    """

    lost_waits: int = 0
    early_frees: int = 0
    corrupt_above: int | None = None
    corrupted: int = 0
    failed_allocations: int = 0
    overflow: torch.dtype | None = None
    gone: bool = False


OVERFLOWS_AT = 16.0
"""With ``Faults.overflow``: the magnitude above which results become infinite."""


class OnDevice(torch.Tensor):
    """A tensor of the simulated device: ``cpu_tensor`` is the one that holds its bytes."""

    cpu_tensor: torch.Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=_device(), requires_grad=False
        )
        made.cpu_tensor = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"<on the simulated device: {self.dtype} {list(self.shape)}>"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Whole functions run on the CPU tensors, so that they take the CPU's own paths and give its bits."""
        kwargs = kwargs or {}
        if not all(issubclass(kind, OnDevice) for kind in types):
            # A streamed parameter among them has the first word: it brings the tensor, then this is called again.
            return NotImplemented
        if func == _SET_DATA:
            # Its shape stays, as a wrapper's cannot change; what it held is let go.
            args[0].cpu_tensor = _open(args[1])
            return None
        if func in _DEVICE_ITSELF or _moves(func, args, kwargs):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _run(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default:
            return _copied(args[0], kwargs)
        if func is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            _open(target).copy_(_open(source))
            return target
        return _run(func, args, kwargs)


_SET_DATA = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]

_DEVICE_ITSELF = frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("device", "is_cpu", "is_cuda", "is_mps", "data", "grad", "is_leaf")
) | frozenset(
    {
        torch.Tensor.detach,
        torch.Tensor.requires_grad_,
        torch.Tensor.copy_,
        torch.Tensor.__repr__,
        torch.Tensor.untyped_storage,
        torch.Tensor.data_ptr,
    }
)


def _moves(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this names a device, and so may be a move from one to another."""
    if func in (torch.Tensor.cpu, torch.Tensor.cuda):
        return True
    named = (*args[1:], *kwargs.values())
    return any(
        isinstance(value, torch.device) or (isinstance(value, str) and func is torch.Tensor.to) for value in named
    ) or (func is torch.Tensor.to and any(isinstance(value, torch.Tensor) for value in named))


def _open(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.cpu_tensor
    if isinstance(value, torch.device) and value.type == _device().type:
        return torch.device("cpu")
    return value


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run on the CPU tensors. Raises RuntimeError when host tensors are mixed in, as CUDA would."""
    _current().check()
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    back: dict[int, OnDevice] = {}
    for value in flat:
        if isinstance(value, OnDevice):
            back[id(value.cpu_tensor)] = value
        elif isinstance(value, torch.Tensor) and value.dim() > 0 and func is not torch.Tensor.__getitem__:
            name = getattr(func, "__name__", str(func))
            raise RuntimeError(f"{name}: expected all tensors on {_device()}, found one on {value.device}")
    opened_args, opened_kwargs = pytree.tree_unflatten([_open(value) for value in flat], spec)
    return pytree.tree_map_only(torch.Tensor, lambda made: _wrapped(made, back), func(*opened_args, **opened_kwargs))


def _wrapped(made: torch.Tensor, back: Mapping[int, OnDevice]) -> torch.Tensor:
    if id(made) in back:
        return back[id(made)]
    faults = _current().faults
    if faults.overflow is not None and made.dtype == faults.overflow:
        made = torch.where(made.abs() > OVERFLOWS_AT, torch.full_like(made, float("inf")), made)
    return OnDevice(made)


def _copied(tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    goal = kwargs.pop("device", None)
    kwargs.pop("non_blocking", None)
    here = isinstance(tensor, OnDevice) if goal is None else torch.device(goal).type == _device().type
    made = torch.ops.aten._to_copy.default(_open(tensor), **kwargs)
    return OnDevice(made) if here else made


class _Registered:
    """The backend of the process: torch has room for one. It serves the device that was made last."""

    def __init__(self) -> None:
        _setup_privateuseone_for_python_backend("simulated")
        self.library = torch.library.Library("aten", "IMPL")
        self.device: weakref.ref[Simulated] | None = None

        def empty(size: Sequence[int], **kwargs: Any) -> torch.Tensor:
            return _poisoned(torch.empty(size, dtype=kwargs.get("dtype")))

        def empty_strided(size: Sequence[int], stride: Sequence[int], **kwargs: Any) -> torch.Tensor:
            return _poisoned(torch.empty_strided(size, stride, dtype=kwargs.get("dtype")))

        def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            del non_blocking
            _open(target).copy_(_open(source))
            return target

        self.library.impl("empty.memory_format", empty, "PrivateUse1")
        self.library.impl("empty_strided", empty_strided, "PrivateUse1")
        self.library.impl("_copy_from", copy_from, "PrivateUse1")


def _poisoned(made: torch.Tensor) -> OnDevice:
    if made.numel():
        torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage()).fill_(POISON)
    return OnDevice(made)


@cache
def _registered() -> _Registered:
    return _Registered()


@cache
def _device() -> torch.device:
    _registered()
    return torch.device("simulated", 0)


def _current() -> Simulated:
    found = _registered().device
    device = found() if found is not None else None
    if device is None:
        raise DeviceLostError("simulated")
    return device


class _Copy:
    """The fence of a copy that a stream will do."""

    def __init__(self, faults: Faults, done: Future[None]) -> None:
        self._faults = faults
        self._done = done

    def wait(self) -> None:
        if self._faults.lost_waits > 0:
            self._faults.lost_waits -= 1
            return
        self._done.result()


class Simulated:
    """See :class:`safelight.devices.base.Device`. ``nbytes``: its memory. ``bandwidth``: bytes a second of copies, None
    for as fast as the CPU copies; ``latency``: seconds before each. ``seed``: of the order in which copies arrive."""

    name = "simulated"
    separate = True
    ahead = AHEAD

    def __init__(
        self,
        nbytes: int = 2 << 30,
        bandwidth: float | None = None,
        latency: float = 0.0,
        seed: int = 0,
        faults: Faults | None = None,
        stage_bytes: int = STAGE_BYTES,
    ) -> None:
        self.nbytes = nbytes
        self.bandwidth = bandwidth
        self.latency = latency
        self.stage_bytes = stage_bytes
        self.faults = faults or Faults()
        self.asynchronous = True
        self._allocated = 0
        self._chance = random.Random(seed)
        self._lock = threading.RLock()
        self._link_free = 0.0
        self._streams = [ThreadPoolExecutor(1, f"safelight-simulated-{n}") for n in range(STREAMS)]
        _registered().device = weakref.ref(self)

    @property
    def torch(self) -> torch.device:
        return _device()

    def check(self) -> None:
        """Raises DeviceLostError when the device has disappeared."""
        if self.faults.gone:
            raise DeviceLostError(self.name)

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.check()
        with self._lock:
            failed = self.faults.failed_allocations > 0
            self.faults.failed_allocations -= failed
            if failed or self._allocated + self.rounded(nbytes) > self.nbytes:
                hint = f"The simulated device has {self.nbytes} bytes."
                raise OutOfMemoryError("An allocation", nbytes, self.nbytes - self._allocated, hint)
            self._allocated += self.rounded(nbytes)
        inner = host.allocate(nbytes)
        inner.fill_(POISON)
        return OnDevice(inner)

    def release(self, base: torch.Tensor) -> None:
        _open(base).fill_(POISON)
        with self._lock:
            self._allocated -= self.rounded(base.numel())

    def storage(self, base: torch.Tensor) -> torch.UntypedStorage:
        return _open(base).untyped_storage()

    def address(self, tensor: torch.Tensor) -> int:
        return _open(tensor).data_ptr()

    def rounded(self, nbytes: int) -> int:
        return -(-nbytes // ROUNDING) * ROUNDING

    def allocated(self) -> int | None:
        return self._allocated

    def available(self) -> int:
        return max(0, self.nbytes - self._allocated)

    def push(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        return self._submit(source, _open(target))

    def pull(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        return self._submit(_open(source), target)

    def aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def mark(self) -> Fence:
        return PASSED

    def staging(self, nbytes: int) -> torch.Tensor:
        return host.allocate(nbytes)

    def _submit(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        self.check()
        with self._lock:
            stream = self._chance.choice(self._streams)
            early = self.asynchronous and self.faults.early_frees > 0
            self.faults.early_frees -= early
            above = self.faults.corrupt_above
            corrupt = self.faults.corrupted > 0 and above is not None and source.numel() > above
            self.faults.corrupted -= corrupt
        if early:
            # The driver kept the address, the program believed the copy done and used the memory for something else.
            source = torch.full_like(source, POISON)
        if not self.asynchronous:
            self._copy(source, target, corrupt)
            return PASSED
        # The stream's thread lets go of its arguments only after it told that it is done: these are taken out before.
        held = [(source, target)]
        return _Copy(self.faults, stream.submit(lambda: self._copy(*held.pop(), corrupt)))

    def _copy(self, source: torch.Tensor, target: torch.Tensor, corrupt: bool) -> None:
        time.sleep(self.latency)
        if self.bandwidth is not None:
            with self._lock:
                begin = max(time.perf_counter(), self._link_free)
                self._link_free = begin + source.numel() / self.bandwidth
                until = self._link_free
            time.sleep(max(0.0, until - time.perf_counter()))
        self.check()
        target.copy_(source)
        if corrupt:
            target[target.numel() // 2 :].fill_(POISON)

    def close(self) -> None:
        """Let the streams finish."""
        for stream in self._streams:
            stream.shutdown(wait=True)


@contextlib.contextmanager
def simulated(**settings: Any) -> Generator[Simulated]:
    """A device for the time of a context."""
    device = Simulated(**settings)
    try:
        yield device
    finally:
        device.close()
