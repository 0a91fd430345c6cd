"""The process-wide state that can change a number, set for a job and put back after it."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

_one_at_a_time = threading.RLock()
"""This state belongs to the process: two engines in it wait for each other."""

_AUTOCAST = ("cpu", "cuda", "mps")

_SDP = ("flash", "mem_efficient", "math", "cudnn")
"""The switches of scaled dot-product attention; they hold on a CPU too."""


def _flushes_denormals() -> bool:
    return bool(torch.tensor([1e-39], device="cpu").mul(1.0).eq(0).item())


@contextlib.contextmanager
def fixed(threads: int, seed: int) -> Generator[None]:
    """Within: ``threads`` threads, fp32 as default dtype, the CPU as default device, full fp32 matrix products and
    convolutions (no TF32) by algorithms that are not chosen by trying, denormals kept, no autocast on any device, no
    gradients, every attention kernel that torch chooses by itself allowed, and every global random generator, those of
    devices in use too, seeded with ``seed``, so that what a library draws from them repeats. After: all as before.
    """
    with _one_at_a_time:
        yield from _fixed(threads, seed)


def _fixed(threads: int, seed: int) -> Generator[None]:
    cuda = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    device = torch.get_default_device()
    sdp = {name: getattr(cuda, f"{name}_sdp_enabled")() for name in _SDP}
    before = (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision())
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in _AUTOCAST}
    chosen = cudnn.benchmark, cudnn.allow_tf32
    on_devices = _states_of_devices()
    mkldnn: bool = torch._C._get_mkldnn_enabled()
    flushed = _flushes_denormals()
    try:
        if device.type != "cpu":
            torch.set_default_device(None)
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)
        for name in _SDP:
            getattr(cuda, f"enable_{name}_sdp")(True)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for generator, _ in on_devices:
            generator.manual_seed(seed)
        cudnn.benchmark, cudnn.allow_tf32 = False, False
        for kind in _AUTOCAST:
            torch.set_autocast_enabled(kind, False)
        torch._C._set_mkldnn_enabled(True)
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        if device.type != "cpu":
            torch.set_default_device(device)
        for kind, enabled in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
        cudnn.benchmark, cudnn.allow_tf32 = chosen
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
        torch.set_float32_matmul_precision(before[2])
        torch.set_flush_denormal(flushed)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch._C._set_mkldnn_enabled(mkldnn)
        for name, enabled in sdp.items():
            getattr(cuda, f"enable_{name}_sdp")(enabled)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for generator, state in on_devices:
            generator.set_state(state)


def _states_of_devices() -> list[tuple[torch.Generator, torch.Tensor]]:
    """The global random generators of devices that this process uses, and their states."""
    generators: list[torch.Generator] = []
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    if torch.backends.mps.is_available():
        generators.append(torch.mps._get_default_mps_generator())
    return [(generator, generator.get_state()) for generator in generators]
