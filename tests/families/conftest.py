"""The picture and the mask from which the families' tests begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

WIDTH, HEIGHT = 64, 48
"""Pixels of both."""


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a picture with soft colours."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    colours = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(2))
    Image.fromarray((colours * 255).byte().numpy()).resize((WIDTH, HEIGHT)).save(path)
    return path


@pytest.fixture(scope="session")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a mask whose middle is drawn again."""
    path = tmp_path_factory.mktemp("masks") / "mask.png"
    made = Image.new("L", (WIDTH, HEIGHT))
    made.paste(255, (16, 8, 48, 40))
    made.save(path)
    return path
