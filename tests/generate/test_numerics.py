"""The process's numeric state: a job sets it, and puts it back."""

from __future__ import annotations

import random

import numpy as np
import torch

from safelight.generate import numerics


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_what_a_library_draws_repeats_and_others_draw_on_as_if_nothing_had_been() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    outside = [drawn(), drawn()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = drawn()
    with numerics.fixed(1, 7):
        within = drawn()
    assert [first, drawn()] == outside
    with numerics.fixed(1, 7):
        assert drawn() == within
    with numerics.fixed(1, 8):
        assert all(a != b for a, b in zip(drawn(), within, strict=True))
