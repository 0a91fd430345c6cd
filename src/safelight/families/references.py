"""Reference images: pictures that a denoiser sees beside the latents. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from safelight.request.bounds import MOST_REFERENCES

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, slots=True)
class References:
    """How checkpoints take reference images, which the denoiser sees beside the latents.

    ``size``: the size in which the VAE encodes a picture, from the picture's size.
    ``most``, ``least``: how many pictures a request may have, and must have.
    ``least_side``: pixels that each side of a picture must have.
    ``most_ratio``: how many times as long as the other a side may be.
    ``vision_size``: the size in which the vision encoder sees a picture, from the picture's size; None if the text
    encoder does not see the pictures.
    ``sets_size``: the place of the picture whose encoded size is the image's, if the request names none: the first (0)
    or the last (-1).
    """

    size: Callable[[Size], Size]
    most: int = MOST_REFERENCES
    least: int = 0
    least_side: int = 1
    most_ratio: float = math.inf
    vision_size: Callable[[Size], Size] | None = None
    sets_size: Literal[0, -1] = 0
