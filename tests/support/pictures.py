"""Random pictures for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def soft_picture(path: Path, size: tuple[int, int], seed: int) -> Path:
    """Write a picture of soft random colours. ``size``: (width, height)."""
    colours = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(seed))
    Image.fromarray((colours * 255).byte().numpy()).resize(size).save(path)
    return path
