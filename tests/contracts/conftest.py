"""One suite for every device: cpu and simulated always, cuda and mps where they are.

``make contracts DEVICE=mps`` asks for one, and fails when it is not there.
"""

from __future__ import annotations

import os

import pytest
import torch
from support.extensions import Install

from safelight.devices import choice
from safelight.devices.base import Device

WANTED = os.environ.get("SAFELIGHT_CONTRACTS_DEVICE", "")
PACKAGE = "remote"
"""The example device of a package."""
THERE = {
    PACKAGE: True,
    "cpu": True,
    "simulated": True,
    "cuda": torch.cuda.is_available(),
    "mps": torch.backends.mps.is_available(),
}
NAMES = [WANTED] if WANTED else [name for name, present in THERE.items() if present]


@pytest.fixture(params=NAMES)
def device(request: pytest.FixtureRequest, install: Install) -> Device:
    if request.param == PACKAGE:
        install("device")
    return choice.device(request.param)
