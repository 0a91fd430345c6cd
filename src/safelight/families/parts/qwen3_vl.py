"""The language model of Qwen3-VL (Bai et al. 2025, arXiv 2511.21631) as a text encoder: the table of its tensors.

It has the layers of Qwen3, but other weights, and other frequencies of the rotary embedding. Its vision tower is not
used.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass
from typing import ClassVar

from safelight.families.parts import qwen3
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.tables import Shapes

PATTERN = r"(model\.)?visual\.deepstack_merger_list\."
"""Matches a tensor that a Qwen3-VL has, and other language models do not."""

_UNREAD = re.compile(rf"{qwen3.VISION}|(model\.)?lm_head\.")


@dataclass(frozen=True, slots=True)
class Qwen3VLConfig(Qwen3Config):
    """Settings of the language model of a Qwen3-VL."""

    architecture: ClassVar[str] = "qwen3-vl"


def infer(shapes: Shapes) -> Qwen3VLConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    return Qwen3VLConfig(*astuple(qwen3.infer(shapes)))


def unread_reason(name: str) -> str | None:
    """Return why a tensor may be left over, None if it may not. ``name``: without prefix."""
    return "not used: only the text is read" if _UNREAD.match(name) else qwen3.unread_reason(name)
