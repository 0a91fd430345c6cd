"""Tests attention kernels on a device, and chooses the first one that computes correctly.

The test runs a UNet's attention module with a UNet's processor, and attention by diffusers' dispatcher, which its
transformers call. It compares the results with float64. It covers several head sizes and lengths, self and cross
attention, masks, inputs that are not contiguous, and new memory filled with NaN (rows ATTENTION 01 to 03 and 05 of
``docs/corruption.md``). A kernel that fails or is missing is rejected with an error, and never silently replaced. The
choice depends on the device and the versions, never on the free memory (row ATTENTION 07) nor on measured times: they
differ between two machines of the same kind, and another kernel computes other pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from safelight import boundary
from safelight.boundary import kernels
from safelight.boundary.kernels import KERNELS
from safelight.devices import choice, measurements
from safelight.devices.base import Device
from safelight.devices.failures import is_lost, is_out_of_memory
from safelight.errors import SettingError


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape to test.

    ``keys``: number of keys, None for self attention.
    ``strided``: the input is not contiguous.
    ``dispatched``: by diffusers' dispatcher, as in transformers.
    ``hidden_keys``: so many of the last keys are hidden by a mask.
    """

    heads: int
    head_size: int
    tokens: int
    keys: int | None = None
    strided: bool = False
    batch: int = 1
    dispatched: bool = False
    hidden_keys: int = 0

    def concerns(self, kernel: str) -> bool:
        """Return whether a kernel may have to compute this shape."""
        if not self.dispatched:
            return True
        reached = kernels.has_dispatcher() and kernels.reaches_dispatcher(kernel)
        return reached and (not self.hidden_keys or kernel in kernels.WITH_MASK)


SHAPES = (
    Shape(8, 40, 64),
    Shape(8, 40, 64, 77, strided=True, batch=2),
    Shape(5, 64, 256, strided=True, batch=2),
    Shape(2, 80, 1088),
    Shape(2, 160, 320, 77),
    Shape(1, 512, 256),
    Shape(1, 64, 4100),
    Shape(2, 128, 1088, strided=True, dispatched=True),
    Shape(1, 128, 4100, 256, dispatched=True),
    Shape(2, 128, 320, hidden_keys=37, batch=2, dispatched=True),
)
"""Head sizes of SD 1 (40, 80, 160), SD 2 and SDXL (64), the VAE (512), and of transformers for flows (128), some of
which hide the padding of a text by a mask; token counts around 1,024 and 4,096."""

TIMED_SHAPE = Shape(8, 40, 1024)

TOLERANCE = 24
"""The allowed error is this, times the dtype's epsilon, times the largest value. Rounding alone gives less."""

_CANDIDATES = tuple(name for name in KERNELS if name != "sliced")
"""What ``auto`` chooses from. ``sliced`` exists only for UNets, and saves memory rather than time."""

QUERY_BLOCK = 512
"""How many queries the reference computes at once."""


@dataclass(frozen=True, slots=True)
class KernelResult:
    """The test result of a kernel.

    ``passed``: equal to float64 up to rounding, in every shape.
    ``why``: the reason for the result, as text.
    ``seconds``: time for :data:`TIMED_SHAPE`, 0 if it failed.
    """

    passed: bool
    why: str
    seconds: float


class Kernels:
    """Kernels on ``device``, tested at the first use in a dtype. ``attention.json`` in ``folder`` stores results.

    ``numeric_state``: a context in which torch computes as in a job.
    """

    def __init__(
        self, device: Device, folder: Path, numeric_state: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._device = device
        self._numeric_state = numeric_state
        self._path = folder / "attention.json"
        versions = f"torch {torch.__version__}, diffusers {boundary.VERSION}"
        # A later Safelight tests more shapes or otherwise, and then the results of an earlier one do not count.
        self._machine = f"{device.name}, {choice.hardware(device)}, {versions}, {len(SHAPES)} shapes, as in a job"

    def choose(self, wanted: str, dtype: torch.dtype, slice_size: str = "auto") -> str:
        """Return the kernel to use: ``wanted``, or for ``auto`` the first of :data:`KERNELS` that passes.

        Raises SettingError with the reason if the kernel failed or is missing, or if no kernel passed.
        """
        if wanted != "auto":
            result = self.test([wanted], dtype, slice_size)[wanted]
            if not result.passed:
                raise SettingError("attention_type", wanted, "the settings", result.why)
            return wanted
        for name in _CANDIDATES:
            if self.test([name], dtype)[name].passed:
                return name
        raise SettingError("attention_type", wanted, "the settings", f"no kernel is correct in {dtype} here")

    def test(self, names: Sequence[str], dtype: torch.dtype, slice_size: str = "auto") -> dict[str, KernelResult]:
        """Return the stored results of kernels, and test those that have none. Testing takes about a second."""
        found: dict[str, KernelResult] = {}
        for name in names:
            why = kernels.missing_kernel(name, self._device.torch)
            with suppress(TypeError):
                found[name] = (
                    KernelResult(False, why, 0.0)
                    if why
                    else KernelResult(**measurements.read(self._path, self._key(name, dtype, slice_size)))
                )
        if unknown := [name for name in names if name not in found]:
            with self._numeric_state():
                tested = check_kernels(unknown, dtype, self._device.torch, slice_size)
            for name, result in tested.items():
                measurements.keep(self._path, self._key(name, dtype, slice_size), asdict(result))
            found |= tested
        return {name: found[name] for name in names}

    def _key(self, name: str, dtype: torch.dtype, slice_size: str) -> str:
        package = kernels.version_of_package(name)
        return f"{self._machine}, {dtype}, {name}{package and f' {package}'}" + (
            f" {slice_size}" if name == "sliced" else ""
        )


def check_kernels(
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    slice_size: str = "auto",
    shapes: Sequence[Shape] = SHAPES,
) -> dict[str, KernelResult]:
    """Test kernels on a device in every shape."""
    problems: dict[str, str] = {}
    for number, shape in enumerate(shapes if names else ()):
        with _seeded(number), torch.no_grad():
            make = kernels.DispatchedAttention if shape.dispatched else kernels.attention_module
            module = make(shape.heads, shape.head_size).to(dtype).eval()
            hidden, keys = _inputs(shape, dtype)
            exact = _reference(module, shape, hidden, hidden if keys is None else keys)
            allowed = TOLERANCE * torch.finfo(dtype).eps * float(exact.abs().max())
            _put(module, device)
            for name in names:
                if (
                    name not in problems
                    and shape.concerns(name)
                    and (problem := _problem(module, name, slice_size, shape, hidden, keys, exact, allowed))
                ):
                    problems[name] = f"{_describe(shape)}: {problem}"
    return {
        name: KernelResult(False, problems[name], 0.0)
        if name in problems
        else KernelResult(
            True,
            f"within rounding of float64 in {sum(shape.concerns(name) for shape in shapes)} shapes",
            _seconds(name, dtype, device, slice_size),
        )
        for name in names
    }


def _describe(shape: Shape) -> str:
    what = f"attending to {shape.keys} keys" if shape.keys else "self attention"
    where = " of a transformer" if shape.dispatched else ""
    return f"{what}{where}, {shape.heads} heads of {shape.head_size}, {shape.tokens} tokens"


def _mask(shape: Shape, device: torch.device) -> torch.Tensor | None:
    """Return the mask (batch, 1, 1, keys), False for hidden keys; None for a shape without hidden keys."""
    if not shape.hidden_keys:
        return None
    count = shape.keys or shape.tokens
    seen = torch.arange(count, device=device) < count - shape.hidden_keys
    return seen.expand(shape.batch, 1, 1, count)


def _put(module: nn.Module, device: torch.device) -> None:
    """Move parameters to a device one by one, as binding does."""
    for child in module.modules():
        for attribute, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[attribute] = nn.Parameter(parameter.to(device), requires_grad=False)


def _inputs(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = shape.heads * shape.head_size
    # Twice as large as after a norm, because scores that are far apart can overflow.
    hidden = (2 * torch.randn(shape.batch, shape.tokens, width)).to(dtype)
    if shape.strided:
        hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    return hidden, None if shape.keys is None else torch.randn(shape.batch, shape.keys, width).to(dtype)


def _problem(
    module: nn.Module,
    name: str,
    slice_size: str,
    shape: Shape,
    hidden: torch.Tensor,
    keys: torch.Tensor | None,
    exact: torch.Tensor,
    allowed: float,
) -> str | None:
    """Return why a kernel fails in one shape: it raises, or its error exceeds ``allowed``. None if it passes."""
    device = next(module.parameters()).device
    try:
        kernels.set_attention(module, name, slice_size)
        # Without ``preserve_format``, the copy to the device would make the tensor contiguous.
        on_device = hidden.to(device, memory_format=torch.preserve_format)
        with _poisoned_memory(device):
            on_device_keys = None if keys is None else keys.to(device)
            got = module(on_device, on_device_keys, attention_mask=_mask(shape, device)).cpu().double()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        if is_lost(error) or is_out_of_memory(error):
            # It says nothing about the kernel, and the result is stored.
            raise
        return str(error)
    error = float((got - exact).abs().max())
    # A NaN fails this comparison.
    return None if error <= allowed else f"off by {error:.2g}; rounding explains at most {allowed:.2g}"


def _reference(module: nn.Module, shape: Shape, hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Compute softmax(q k^T / sqrt(d)) v in float64 on the CPU (Vaswani et al. 2017, 3.2.1)."""
    weights = {name: tensor.detach().cpu().double() for name, tensor in module.state_dict().items()}

    def heads(of: torch.Tensor, projection: str) -> torch.Tensor:
        out = of.cpu().double() @ weights[f"{projection}.weight"].T
        return out.unflatten(-1, (shape.heads, shape.head_size)).transpose(1, 2)

    q, k, v = heads(hidden, "to_q"), heads(keys, "to_k"), heads(keys, "to_v")
    scale = shape.head_size**-0.5
    shown = k.shape[2] - shape.hidden_keys
    k, v = k[:, :, :shown], v[:, :, :shown]
    parts = [torch.softmax(part @ k.transpose(-1, -2) * scale, -1) @ v for part in q.split(QUERY_BLOCK, 2)]
    out = torch.cat(parts, 2).transpose(1, 2).flatten(2)
    return out @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


def _seconds(name: str, dtype: torch.dtype, device: torch.device, slice_size: str) -> float:
    """Return the best of three times for :data:`TIMED_SHAPE`, in seconds."""
    with _seeded(0), torch.no_grad():
        module = kernels.attention_module(TIMED_SHAPE.heads, TIMED_SHAPE.head_size).to(dtype).eval()
        _put(module, device)
        kernels.set_attention(module, name, slice_size)
        hidden = _inputs(TIMED_SHAPE, dtype)[0].to(device)
        times: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            float(module(hidden).sum())
            times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def _poisoned_memory(device: torch.device) -> Generator[None]:
    """Make uninitialised memory contain NaN within the context.

    In deterministic mode torch fills new tensors with NaN where it supports that. For the rest, a large NaN tensor is
    allocated and freed first, so that a caching allocator hands out its memory again.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.full((1 << 20,), float("nan"), device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    """Seed the global generator within the context, and restore its state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
