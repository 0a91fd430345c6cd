"""Overlays lie over weights; nothing is written below them."""

from __future__ import annotations

import torch

from safelight.weights.overlay import Overlay


def test_what_is_made_is_new_and_the_weight_is_as_it_was() -> None:
    weight = torch.arange(6.0).view(2, 3)
    before = weight.clone()
    for function in (lambda w: w * 2, lambda w: w, lambda w: w.view(2, 3)):
        made = Overlay(function).apply(weight)
        made.add_(1)
        assert torch.equal(weight, before)
