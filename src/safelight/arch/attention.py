"""Attention: which kernels there are, whether each computes rightly on a device, and which is the fastest there.

A kernel is tried by the module that a UNet has, with the processor that a UNet gets, against the same sums in float64:
several head sizes and lengths, self and cross attention, an input that is not contiguous, and fresh memory filled with
NaN (rows ATTENTION 01 to 03 and 05 of the corpus). What failed or is not there is refused, never replaced in silence.
The choice depends on the device and the versions, never on the memory that happens to be free (ATTENTION 07).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from safelight.arch import diffusers_fence
from safelight.arch.diffusers_fence import kernels
from safelight.arch.diffusers_fence.kernels import KERNELS
from safelight.devices import choice, kept
from safelight.devices.base import Device
from safelight.errors import SettingError


@dataclass(frozen=True, slots=True)
class Shape:
    """An attention that is tried: ``keys`` None for self attention. ``strided``: the input is not contiguous."""

    heads: int
    head_size: int
    tokens: int
    keys: int | None = None
    strided: bool = False
    batch: int = 1


SHAPES = (
    Shape(8, 40, 64),
    Shape(8, 40, 64, 77, strided=True, batch=2),
    Shape(5, 64, 256, strided=True, batch=2),
    Shape(2, 80, 1088),
    Shape(2, 160, 320, 77),
    Shape(1, 512, 256),
    Shape(1, 64, 4100),
)
"""Of SD 1 (40, 80, 160), SD 2 and SDXL (64) and the VAE (one head of 512), below and above 1,024 and 4,096 tokens."""

TIMED = Shape(8, 40, 1024)

TOLERANCE = 24
"""Times the dtype's epsilon and the largest value: more than rounding makes of sums of this length."""

FASTER = 0.8
"""``auto`` takes another than the first only if it needs at most so much of its time: two measurements must agree."""

BLOCK = 512
"""Queries for which the reference computes at once."""


@dataclass(frozen=True, slots=True)
class Tried:
    """``passed``: within rounding of float64 in every shape, else ``why`` not. ``seconds`` of the timed shape."""

    passed: bool
    why: str
    seconds: float


class Kernels:
    """The kernels on ``device``, tried at their first use in a dtype and kept in ``attention.json`` of ``folder``."""

    def __init__(self, device: Device, folder: Path) -> None:
        self._device = device
        self._path = folder / "attention.json"
        versions = f"torch {torch.__version__}, diffusers {diffusers_fence.VERSION}"
        self._machine = f"{device.name}, {choice.hardware(device)}, {versions}"

    def chosen(self, wanted: str, dtype: torch.dtype, slice_size: str = "auto") -> str:
        """The kernel of that name, for ``auto`` the fastest that passed. Raises SettingError with why it is refused."""
        if wanted != "auto":
            tried = self.tried([wanted], dtype, slice_size)[wanted]
            if not tried.passed:
                raise SettingError("attention_type", wanted, "the settings", tried.why)
            return wanted
        passed = {name: tried for name, tried in self.tried(KERNELS, dtype).items() if tried.passed}
        if not passed:
            raise SettingError("attention_type", wanted, "the settings", f"no kernel computes rightly in {dtype} here")
        best = next(iter(passed))
        for name, tried in passed.items():
            if tried.seconds < FASTER * passed[best].seconds:
                best = name
        return best

    def tried(self, names: Sequence[str], dtype: torch.dtype, slice_size: str = "auto") -> dict[str, Tried]:
        """What is known of kernels, else what trying them shows. It takes about a second."""
        found: dict[str, Tried] = {}
        for name in names:
            why = kernels.missing_kernel(name, self._device.torch)
            with suppress(TypeError):
                found[name] = (
                    Tried(False, why, 0.0)
                    if why
                    else Tried(**kept.read(self._path, self._key(name, dtype, slice_size)))
                )
        unknown = [name for name in names if name not in found]
        for name, tried in try_out(unknown, dtype, self._device.torch, slice_size).items():
            kept.keep(self._path, self._key(name, dtype, slice_size), asdict(tried))
            found[name] = tried
        return {name: found[name] for name in names}

    def _key(self, name: str, dtype: torch.dtype, slice_size: str) -> str:
        return f"{self._machine}, {dtype}, {name}" + (f" {slice_size}" if name == "sliced" else "")


def try_out(
    names: Sequence[str],
    dtype: torch.dtype,
    at: torch.device,
    slice_size: str = "auto",
    shapes: Sequence[Shape] = SHAPES,
) -> dict[str, Tried]:
    """Try kernels on a device in every shape."""
    problems: dict[str, str] = {}
    for number, shape in enumerate(shapes if names else ()):
        with _seeded(number), torch.no_grad():
            module = kernels.attention_module(shape.heads, shape.head_size).to(dtype).eval()
            hidden, keys = _inputs(shape, dtype)
            exact = _reference(module, shape, hidden, hidden if keys is None else keys)
            allowed = TOLERANCE * torch.finfo(dtype).eps * float(exact.abs().max())
            _put(module, at)
            for name in names:
                if name not in problems and (
                    problem := _problem(module, name, slice_size, hidden, keys, exact, allowed)
                ):
                    problems[name] = f"{_said(shape)}: {problem}"
    return {
        name: Tried(False, problems[name], 0.0)
        if name in problems
        else Tried(True, f"within rounding of float64 in {len(shapes)} shapes", _seconds(name, dtype, at, slice_size))
        for name in names
    }


def _said(shape: Shape) -> str:
    what = f"attending to {shape.keys} keys" if shape.keys else "self attention"
    return f"{what}, {shape.heads} heads of {shape.head_size}, {shape.tokens} tokens"


def _put(module: nn.Module, at: torch.device) -> None:
    """Put the parameters on a device one by one, as binding does: ``Module.to`` refuses to change their backend."""
    for child in module.modules():
        for attribute, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[attribute] = nn.Parameter(parameter.to(at), requires_grad=False)


def _inputs(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = shape.heads * shape.head_size
    # Twice as large as a norm leaves it: scores far apart are what overflows.
    hidden = (2 * torch.randn(shape.batch, shape.tokens, width)).to(dtype)
    if shape.strided:
        hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    return hidden, None if shape.keys is None else torch.randn(shape.batch, shape.keys, width).to(dtype)


def _problem(
    module: nn.Module,
    name: str,
    slice_size: str,
    hidden: torch.Tensor,
    keys: torch.Tensor | None,
    exact: torch.Tensor,
    allowed: float,
) -> str | None:
    """Why a kernel fails in one shape: it raises, or is further from ``exact`` than ``allowed``."""
    at = next(module.parameters()).device
    try:
        kernels.set_attention(module, name, slice_size)
        # To a device first: copies make tensors contiguous unless they are told otherwise.
        there = hidden.to(at, memory_format=torch.preserve_format)
        with _poisoned_memory(at):
            got = module(there, None if keys is None else keys.to(at)).cpu().double()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return str(error)
    off = float((got - exact).abs().max())
    # NaN is never within.
    return None if off <= allowed else f"off by {off:.2g}, where rounding makes {allowed:.2g}"


def _reference(module: nn.Module, shape: Shape, hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in float64, on the CPU (Vaswani et al. 2017, 3.2.1)."""
    weights = {name: tensor.detach().cpu().double() for name, tensor in module.state_dict().items()}

    def heads(of: torch.Tensor, projection: str) -> torch.Tensor:
        out = of.cpu().double() @ weights[f"{projection}.weight"].T
        return out.unflatten(-1, (shape.heads, shape.head_size)).transpose(1, 2)

    q, k, v = heads(hidden, "to_q"), heads(keys, "to_k"), heads(keys, "to_v")
    scale = shape.head_size**-0.5
    parts = [torch.softmax(part @ k.transpose(-1, -2) * scale, -1) @ v for part in q.split(BLOCK, 2)]
    out = torch.cat(parts, 2).transpose(1, 2).flatten(2)
    return out @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


def _seconds(name: str, dtype: torch.dtype, at: torch.device, slice_size: str) -> float:
    """The best of several, for the timed shape."""
    with _seeded(0), torch.no_grad():
        module = kernels.attention_module(TIMED.heads, TIMED.head_size).to(dtype).eval()
        _put(module, at)
        kernels.set_attention(module, name, slice_size)
        hidden = _inputs(TIMED, dtype)[0].to(at)
        times: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            float(module(hidden).sum())
            times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def _poisoned_memory(at: torch.device) -> Generator[None]:
    """Within, fresh memory is NaN where torch can do that, and recycled memory was NaN before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # What is given back here is what allocators with a cache hand out next.
    torch.full((1 << 20,), float("nan"), device=at)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    """The global generator starts at ``seed`` within, and goes on after it as if nothing had been drawn."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
