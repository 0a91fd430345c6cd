"""A simulated accelerator in CPU memory, for tests and for machines without an accelerator. It can fail on purpose.

For torch it is a separate device (``simulated:0``, a backend in pure Python). So a tensor on the wrong device is an
error, as on CUDA, but results have the same bits as on the CPU. Its memory has a fixed size and is filled with NaN when
it is allocated and when it is freed. Copies arrive late and out of order. :class:`Faults` switches on failures that
real devices have shown.
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
from torch.utils import backend_registration

from safelight.devices import host
from safelight.devices.base import PASSED, READ_AHEAD, Fence
from safelight.errors import DeviceLostError, OutOfMemoryError

ROUNDING = 512
"""Bytes. Allocations are rounded up to a multiple, as CUDA's caching allocator does."""

STAGE_BYTES = 1 << 18
"""Bytes of a staging buffer. It is small, so that copies in tests need several buffers."""

STREAMS = 2
"""How many streams run the copies. Copies on different streams overtake each other."""

POISON = 0xFF
"""The value of unwritten bytes. It gives NaN in each dtype that models use."""


@dataclass
class Faults:
    """The failures to simulate. A count is how often the failure still happens; 0 means never.

    ``lost_waits``: count; waiting for a fence returns at once.
    ``early_frees``: count; an asynchronous copy reads its source after it was overwritten, as if it was freed.
    ``corrupt_above``: copies of more than this many bytes are corrupted; None for no copies.
    ``corrupted``: count of such copies.
    ``failed_allocations``: count; an allocation raises OutOfMemoryError.
    ``overflow``: a dtype in which large results become infinite (:data:`OVERFLOWS_AT`).
    ``gone``: the device was lost.
    """

    lost_waits: int = 0
    early_frees: int = 0
    corrupt_above: int | None = None
    corrupted: int = 0
    failed_allocations: int = 0
    overflow: torch.dtype | None = None
    gone: bool = False


OVERFLOWS_AT = 16.0
"""The magnitude above which results become infinite with ``Faults.overflow``."""


class OnDevice(torch.Tensor):
    """A tensor on the simulated device. ``cpu_tensor`` holds its bytes."""

    cpu_tensor: torch.Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], inner: torch.Tensor) -> OnDevice:
        wrapper = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=_device(), requires_grad=False
        )
        wrapper.cpu_tensor = inner
        return wrapper

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
        """Run whole functions on the CPU tensors, so that the results are bit-identical to the CPU's."""
        kwargs = kwargs or {}
        if not all(issubclass(kind, OnDevice) for kind in types):
            # A streamed parameter is among the arguments. It fetches its tensor first, and then this is called again.
            return NotImplemented
        if func == _SET_DATA:
            # The wrapper's shape cannot change, so it stays. The old CPU tensor is released.
            args[0].cpu_tensor = _unwrap(args[1])
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
            return _to_copy(args[0], kwargs)
        if func is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            _unwrap(target).copy_(_unwrap(source))
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
    """Whether the arguments name a device, so that the call may move a tensor."""
    if func in (torch.Tensor.cpu, torch.Tensor.cuda):
        return True
    named = (*args[1:], *kwargs.values())
    return any(
        isinstance(value, torch.device) or (isinstance(value, str) and func is torch.Tensor.to) for value in named
    ) or (func is torch.Tensor.to and any(isinstance(value, torch.Tensor) for value in named))


def _unwrap(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.cpu_tensor
    if isinstance(value, torch.device) and value.type == _device().type:
        return torch.device("cpu")
    return value


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a function on the CPU tensors. Raises RuntimeError if host tensors are among the arguments, as CUDA does."""
    _current().check()
    back: dict[int, OnDevice] = {}
    named = {name: _opened(value, func, back) for name, value in kwargs.items()}
    return _closed(func(*[_opened(value, func, back) for value in args], **named), back)


def _opened(value: Any, func: Callable[..., Any], back: dict[int, OnDevice]) -> Any:
    """Return an argument with the CPU tensors in place of those on the device, which ``back`` gets."""
    kind = type(value)
    if kind is OnDevice:
        back[id(value.cpu_tensor)] = value
        return value.cpu_tensor
    if kind is tuple or kind is list:
        return kind([_opened(one, func, back) for one in value])
    if isinstance(value, torch.Tensor) and value.dim() > 0 and func is not torch.Tensor.__getitem__:
        name = getattr(func, "__name__", str(func))
        raise RuntimeError(f"{name}: expected all tensors on {_device()}, found one on {value.device}")
    return _unwrap(value)


def _closed(result: Any, back: Mapping[int, OnDevice]) -> Any:
    """Put the tensors of a result on the device. torch's own tuples (``torch.return_types``) keep their type."""
    if isinstance(result, torch.Tensor):
        return _wrap(result, back)
    if isinstance(result, tuple | list) and not isinstance(result, torch.Size):
        values: Sequence[Any] = result
        return type(result)(_closed(value, back) for value in values)
    return result


def _wrap(result: torch.Tensor, back: Mapping[int, OnDevice]) -> torch.Tensor:
    if id(result) in back:
        return back[id(result)]
    faults = _current().faults
    if faults.overflow is not None and result.dtype == faults.overflow:
        result = torch.where(result.abs() > OVERFLOWS_AT, torch.full_like(result, float("inf")), result)
    return OnDevice(result)


def _to_copy(tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    goal = kwargs.pop("device", None)
    kwargs.pop("non_blocking", None)
    here = isinstance(tensor, OnDevice) if goal is None else torch.device(goal).type == _device().type
    copy = torch.ops.aten._to_copy.default(_unwrap(tensor), **kwargs)
    return OnDevice(copy) if here else copy


class _Module:
    """What torch asks of ``torch.simulated``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


def _register_backend(name: str) -> None:
    """Register a backend in pure Python with torch."""
    # torch 2.9 has no such function, and needs no hook and no device guard for what this backend does.
    register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if register is not None:
        register(name)
    else:
        backend_registration.rename_privateuse1_backend(name)
        backend_registration.generate_methods_for_privateuse1_backend()
        torch._register_device_module(name, _Module())
    # torch asks for it where a model switches autocast off, too. The device has no dtype for autocast.
    getattr(torch, name).get_amp_supported_dtype = list[torch.dtype]


class _Registered:
    """The backend of the process. torch allows only one, so it serves the most recently created device."""

    def __init__(self) -> None:
        _register_backend("simulated")
        self.library = torch.library.Library("aten", "IMPL")
        self.device: weakref.ref[Simulated] | None = None

        def empty(size: Sequence[int], **kwargs: Any) -> torch.Tensor:
            return _poison(torch.empty(size, dtype=kwargs.get("dtype")))

        def empty_strided(size: Sequence[int], stride: Sequence[int], **kwargs: Any) -> torch.Tensor:
            return _poison(torch.empty_strided(size, stride, dtype=kwargs.get("dtype")))

        def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            del non_blocking
            _unwrap(target).copy_(_unwrap(source))
            return target

        self.library.impl("empty.memory_format", empty, "PrivateUse1")
        self.library.impl("empty_strided", empty_strided, "PrivateUse1")
        self.library.impl("_copy_from", copy_from, "PrivateUse1")


def _poison(tensor: torch.Tensor) -> OnDevice:
    if tensor.numel():
        torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(POISON)
    return OnDevice(tensor)


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
    """The fence of a copy that a stream runs."""

    def __init__(self, faults: Faults, done: Future[None]) -> None:
        self._faults = faults
        self._done = done

    def wait(self) -> None:
        if self._faults.lost_waits > 0:
            self._faults.lost_waits -= 1
            return
        self._done.result()


class Simulated:
    """See :class:`safelight.devices.base.Device`.

    ``nbytes``: bytes of its memory.
    ``bandwidth``: bytes per second of copies, None for the CPU's own speed.
    ``latency``: seconds before each copy.
    ``seed``: seed of the order in which copies arrive.

    ``cached_bytes``: freed bytes that are not yet returned to the system, as by CUDA's caching allocator.
    """

    name = "simulated"
    has_own_memory = True
    read_ahead = READ_AHEAD

    def __init__(
        self,
        nbytes: int = 2 << 30,
        bandwidth: float | None = None,
        latency: float = 0.0,
        seed: int = 0,
        faults: Faults | None = None,
        staging_buffer_bytes: int = STAGE_BYTES,
    ) -> None:
        self.nbytes = nbytes
        self.bandwidth = bandwidth
        self.latency = latency
        self.staging_buffer_bytes = staging_buffer_bytes
        self.faults = faults or Faults()
        self.asynchronous = True
        self._allocated = self._peak = 0
        self.cached_bytes = 0
        self._chance = random.Random(seed)
        self._lock = threading.RLock()
        self._link_free = 0.0
        self._streams = [ThreadPoolExecutor(1, f"safelight-simulated-{n}") for n in range(STREAMS)]
        _registered().device = weakref.ref(self)

    @property
    def torch(self) -> torch.device:
        return _device()

    def check(self) -> None:
        """Raise DeviceLostError if the device was lost."""
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
            self.cached_bytes = max(0, self.cached_bytes - self.rounded(nbytes))
            self._peak = max(self._peak, self._allocated)
        inner = host.allocate(nbytes)
        inner.fill_(POISON)
        return OnDevice(inner)

    def release(self, base: torch.Tensor) -> None:
        _unwrap(base).fill_(POISON)
        with self._lock:
            self._allocated -= self.rounded(base.numel())
            self.cached_bytes += self.rounded(base.numel())

    def storage(self, base: torch.Tensor) -> torch.UntypedStorage:
        return _unwrap(base).untyped_storage()

    def address(self, tensor: torch.Tensor) -> int:
        return _unwrap(tensor).data_ptr()

    def rounded(self, nbytes: int) -> int:
        return -(-nbytes // ROUNDING) * ROUNDING

    def allocated(self) -> int | None:
        return self._allocated

    def reset_peak(self) -> int:
        with self._lock:
            self._peak = self._allocated
            return self._allocated

    def peak(self) -> int:
        return self._peak

    def free_cache(self) -> None:
        self.cached_bytes = 0

    def available(self) -> int:
        return max(0, self.nbytes - self._allocated)

    def push(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        return self._submit(source, _unwrap(target))

    def pull(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        return self._submit(_unwrap(source), target)

    def copy_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def record_fence(self) -> Fence:
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
            # Simulates a program that reuses the source memory before the driver has copied it.
            source = torch.full_like(source, POISON)
        if not self.asynchronous:
            _transmit(self, source, target, corrupt)
            return PASSED
        # The stream's thread releases its arguments only after its future is done. Popping them releases them before.
        held = [(source, target)]
        return _Copy(self.faults, stream.submit(lambda: _transmit(self, *held.pop(), corrupt)))

    def close(self) -> None:
        """Wait for the streams to finish."""
        for stream in self._streams:
            stream.shutdown(wait=True)


def _transmit(device: Simulated, source: torch.Tensor, target: torch.Tensor, corrupt: bool) -> None:
    """Copy at the device's speed."""
    time.sleep(device.latency)
    if device.bandwidth is not None:
        with device._lock:
            begin = max(time.perf_counter(), device._link_free)
            device._link_free = begin + source.numel() / device.bandwidth
            until = device._link_free
        time.sleep(max(0.0, until - time.perf_counter()))
    device.check()
    target.copy_(source)
    if corrupt:
        target[target.numel() // 2 :].fill_(POISON)


@contextlib.contextmanager
def simulated(**settings: Any) -> Generator[Simulated]:
    """Create a device for the time of the context."""
    device = Simulated(**settings)
    try:
        yield device
    finally:
        device.close()
