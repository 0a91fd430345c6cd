"""Checks of images that installed packages add (group ``safelight.checks``). What they find becomes marks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from safelight.errors import ExtensionError
from safelight.extensions import Extensible, extensions, function

Check = Callable[[torch.Tensor, torch.Tensor], Iterable[str]]
"""Takes latents, fp32 (channels, h, w), and pixels, uint8 (height, width, 3), in host memory. Returns phrases."""

GROUP = "safelight.checks"
CHECKS: Extensible[Check] = Extensible({}, GROUP, function)


def marks(latents: torch.Tensor, pixels: torch.Tensor) -> list[str]:
    """Run all checks and return what they find, each phrase after the name of its check.

    A check that fails becomes a mark as well: the image is not affected, and the user sees that it was not checked.

    ``latents``: (1, channels, h, w).
    ``pixels``: uint8 (height, width, 3), in host memory.
    """
    found: list[str] = []
    for name in CHECKS:
        try:
            found += [f"{name}: {phrase}" for phrase in _phrases(name, latents, pixels)]
        except ExtensionError as error:
            found.append(f"not checked: {error}")
    return found


def _phrases(name: str, latents: torch.Tensor, pixels: torch.Tensor) -> list[str]:
    """Run one check on copies, so that it cannot change the image. Raises ExtensionError if it fails."""
    check = CHECKS[name]
    try:
        phrases = check(latents[0].detach().cpu().float().clone(), pixels.clone())
        if isinstance(phrases, str):
            raise TypeError("returned a text, not a list of texts")
        return list(phrases)
    except Exception as error:
        raise extensions(GROUP).error(name, error) from error
