"""What the families share whose text encoder is a language model with rotary embeddings."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import nn

from safelight.families.family_model import FamilyModel


class RotaryFamilyModel(FamilyModel):
    """Computes a family whose text encoder is a language model with rotary embeddings."""

    @staticmethod
    @abstractmethod
    def rotary_frequencies(config: Any) -> torch.Tensor:
        """Return the frequencies of the text encoder, fp32, on the CPU. ``config``: transformers' settings."""

    def make_buffer(self, module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor | None:
        if name in ("inv_freq", "original_inv_freq"):
            return self.rotary_frequencies(cast("Any", module).config)
        return super().make_buffer(module, name, buffer)
