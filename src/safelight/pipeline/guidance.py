"""Guidance: which rows the denoiser computes in one call, and how their predictions become one prediction.

The denoising loop knows no kind of guidance. A family names a kind, and :func:`make_guidance` returns its object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from safelight.families.family import GuidanceKind
from safelight.families.family_model import Tensors


@dataclass(frozen=True, slots=True)
class Condition:
    """What steers the denoiser in a step. ``negative``: None if the guidance does not read the negative prompt."""

    positive: Tensors
    negative: Tensors | None


@dataclass(frozen=True, slots=True)
class Row:
    """What the denoiser sees in one row of a call.

    ``prompt``: True for the prompt, False for the negative prompt.
    ``gets_extra_channels``: whether this batch entry gets the extra input channels (image latents) or zeros.
    """

    prompt: bool = True
    gets_extra_channels: bool = True


@dataclass(frozen=True, slots=True)
class Guidance(ABC):
    """Builds the batch for one denoiser call and combines its predictions.

    ``scale``: how strongly the image follows the prompt.
    ``rows``: the batch entries of the subclass; one has the prompt.
    """

    rows: ClassVar[tuple[Row, ...]]
    scale: float

    @abstractmethod
    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        """Return one prediction (1, …) from those of all rows (rows, …)."""

    def repeat_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Repeat latents (1, …) for all rows."""
        return _join([latents] * len(self.rows))

    def conditions_of_rows(self, condition: Condition) -> list[Tensors]:
        """Return the conditioning of each row."""
        found: list[Tensors] = []
        for row in self.rows:
            tensors = condition.positive if row.prompt else condition.negative
            assert tensors is not None
            found.append(tensors)
        return found

    def batch_extra_channels(self, channels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the extra input channels, each (1, …), for all rows. A row that does not get them has zeros."""
        return tuple(
            _join([one if row.gets_extra_channels else torch.zeros_like(one) for row in self.rows]) for one in channels
        )

    @property
    def prompt_row(self) -> slice:
        """The row with the prompt."""
        at = next(at for at, row in enumerate(self.rows) if row.prompt)
        return slice(at, at + 1)

    def pad_to_rows(self, added: torch.Tensor) -> torch.Tensor:
        """Return ``added``, which belongs to the row with the prompt, with zeros for the other rows."""
        return _join([added if row.prompt else torch.zeros_like(added) for row in self.rows])


@dataclass(frozen=True, slots=True)
class Unguided(Guidance):
    """The prediction for the prompt alone. ``scale`` is for denoisers that have it as an input."""

    rows: ClassVar = (Row(),)

    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        return prediction


@dataclass(frozen=True, slots=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    It moves the prediction away from that for the negative prompt.
    """

    rows: ClassVar = (Row(prompt=False), Row())

    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        without, with_prompt = prediction.chunk(2)
        return without + self.scale * (with_prompt - without)


@dataclass(frozen=True, slots=True)
class ClassifierFreeFromPrompt(Guidance):
    """Classifier-free guidance, written as a step away from the prediction for the prompt.

    It is the same formula with another rounding. The rows and the sum have the order of diffusers' ``ZImagePipeline``,
    whose ``guidance_scale`` is one less.
    """

    rows: ClassVar = (Row(), Row(prompt=False))

    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        with_prompt, without = prediction.chunk(2)
        return with_prompt + (self.scale - 1) * (with_prompt - without)


@dataclass(frozen=True, slots=True)
class ClassifierFreeSameNorm(Guidance):
    """Classifier-free guidance that changes only the direction of a token's values, not their norm.

    The norm is that of the prediction for the prompt. The rows and the sum have the order of diffusers'
    ``QwenImagePipeline``.
    ``patch``: latents per token in each direction.
    """

    rows: ClassVar = (Row(), Row(prompt=False))
    patch: int

    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        with_prompt, without = prediction.chunk(2)
        combined = without + self.scale * (with_prompt - without)
        factors = self._norms(with_prompt) / self._norms(combined)
        return combined * factors.repeat_interleave(self.patch, -2).repeat_interleave(self.patch, -1)

    def _norms(self, values: torch.Tensor) -> torch.Tensor:
        """Return each token's norm, (1, 1, rows, columns)."""
        # Contiguous, as diffusers' tokens are: a sum over strided values has other last bits.
        tokens = F.pixel_unshuffle(values, self.patch).movedim(1, -1).contiguous()
        return torch.norm(tokens, dim=-1).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class ImageAndText(Guidance):
    """Guidance by the input image and by the prompt (Brooks et al. 2023, arXiv 2211.09800, equation 3).

    The rows and the sum have the order of diffusers' ``StableDiffusionInstructPix2PixPipeline``.
    ``image_scale``: how strongly the result follows the input image.
    """

    rows: ClassVar = (Row(), Row(prompt=False), Row(prompt=False, gets_extra_channels=False))
    image_scale: float

    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        text, image, neither = prediction.chunk(3)
        return neither + self.scale * (text - image) + self.image_scale * (image - neither)


READS_NEGATIVE: Mapping[GuidanceKind, bool] = {
    "classifier_free": True,
    "classifier_free_from_prompt": True,
    "classifier_free_same_norm": True,
    "image_and_text": True,
    "distilled": False,
    "none": False,
}
"""Whether a kind of guidance reads the negative prompt."""


def make_guidance(
    kind: GuidanceKind, scale: float, image_scale: float, distilled: float | None = None, patch: int = 1
) -> Guidance:
    """Return the guidance of a kind. A scale of 1 or less turns it off.

    ``distilled``: the scale of distilled guidance; None for other kinds.
    ``patch``: latents per token of the denoiser in each direction.
    """
    if kind == "distilled" and distilled is not None:
        return Unguided(distilled)
    if scale > 1 and kind == "image_and_text":
        return ImageAndText(scale, image_scale)
    if scale > 1 and kind == "classifier_free":
        return ClassifierFree(scale)
    if scale > 1 and kind == "classifier_free_from_prompt":
        return ClassifierFreeFromPrompt(scale)
    if scale > 1 and kind == "classifier_free_same_norm":
        return ClassifierFreeSameNorm(scale, patch)
    return Unguided(scale)


def _join(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(rows)) if len(rows) > 1 else rows[0]
