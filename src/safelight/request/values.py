"""The values that some fields of a request may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

PromptSyntax = Literal["a1111", "compel"]
PROMPT_SYNTAXES: tuple[PromptSyntax, ...] = ("a1111", "compel")

Seamless = Literal["", "x", "y", "xy"]
SEAMLESS: tuple[Seamless, ...] = ("", "x", "y", "xy")

UPSCALERS: Mapping[str, str] = {
    "latent": "Latent",
    "latent-nearest": "Latent (nearest)",
    "latent-bicubic": "Latent (bicubic)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
"""How a first pass is enlarged for high-resolution fix: its latents, or its pixels. A1111's names beside ours."""
