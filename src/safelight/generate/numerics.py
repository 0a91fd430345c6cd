"""The process-wide state that can change a number, set for a job and put back after it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator

import numpy as np
import torch


@contextlib.contextmanager
def fixed(threads: int, seed: int) -> Generator[None]:
    """Within: ``threads`` threads, fp32 as default dtype, full fp32 matrix products, denormals kept, no gradients, and
    every global random generator seeded with ``seed``, so that what a library draws from them repeats. After: as
    before.
    """
    before = (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision())
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
        torch.set_float32_matmul_precision(before[2])
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
