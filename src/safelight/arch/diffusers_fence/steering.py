"""A stand-in for the UNet in a pipeline. Each call uses the conditions and ControlNets of its step.

So one pipeline supports all combinations, and the state that changes between steps belongs to one call of the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import nn

LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Conditions:
    """Conditions of a UNet.

    ``each``: the different conditions, by the pipelines' argument names.
    ``at``: the index into ``each`` for each step.
    """

    each: Sequence[Mapping[str, torch.Tensor]]
    at: Sequence[int] = (0,)

    @property
    def first(self) -> Mapping[str, torch.Tensor]:
        return self.each[self.at[0]]

    def between(self, first: int, last: int) -> Conditions:
        """Return the conditions for the steps ``first`` (from 0) up to, not including, ``last``."""
        return Conditions(self.each, self.at[first:last])

    def during(self, share: float) -> int:
        """Return the index for a share of the steps. A sampler may call the UNet several times per step."""
        return self.at[min(len(self.at) - 1, int(share * len(self.at) + 1e-6))]


@dataclass(frozen=True)
class Controlled:
    """A bound ControlNet and its picture.

    ``net``: the ControlNet.
    ``picture``: PIL, of the image's size.
    ``weight``: factor of its output.
    ``start``, ``end``: the shares of the steps between which it is used.
    ``soft``: reduce its output in the outer layers.
    ``prompt_only``: do not use it for the negative prompt.
    """

    net: nn.Module
    picture: Any
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    soft: bool = False
    prompt_only: bool = False


Residuals = tuple[list[torch.Tensor], torch.Tensor]
"""What a ControlNet adds to the outputs of the encoder's blocks, and of the middle block."""


class Steered:
    """Is called like the UNet and forwards all other attributes to it. ``pipeline``: the pipeline that contains it."""

    pipeline: Any = None

    def __init__(self, unet: nn.Module, conditions: Conditions, controls: Sequence[Controlled]) -> None:
        self.unet = unet
        self._conditions = conditions
        self._controls = [(control, self._hint(control, unet)) for control in controls]
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["unet"], name)

    @staticmethod
    def _hint(control: Controlled, unet: nn.Module) -> torch.Tensor:
        processor = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
        like = cast("Any", unet)
        return processor.preprocess(control.picture).contiguous().to(device=like.device, dtype=like.dtype)

    def passed(self, done: int) -> None:
        """Set the number of finished scheduler steps."""
        self._done = done

    def forget(self) -> None:
        """Release the pipeline and the ControlNets."""
        self.pipeline, self._controls = None, []

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **more: Any
    ) -> Any:
        steps = max(1, self.pipeline.num_timesteps)
        guided = len(sample) == 2
        at = self._conditions.during(self._done / steps)
        if at != self._conditions.at[0]:
            condition = self._conditions.each[at]
            encoder_hidden_states = _paired(condition, "prompt_embeds", guided)
            if "pooled_prompt_embeds" in condition:
                pooled = _paired(condition, "pooled_prompt_embeds", guided)
                more["added_cond_kwargs"] = {**more["added_cond_kwargs"], "text_embeds": pooled}
        added = more.get("added_cond_kwargs")
        residuals: Residuals | None = None
        for control, shown in self._controls:
            if self._done / steps >= control.start and (self._done + 1) / steps <= control.end:
                found = _residuals(control, shown, sample, timestep, encoder_hidden_states, added)
                residuals = found if residuals is None else _add(residuals, found)
        if residuals is not None:
            more |= {
                "down_block_additional_residuals": residuals[0],
                "mid_block_additional_residual": residuals[1],
            }
        return self.unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, **more)


def _paired(condition: Mapping[str, torch.Tensor], name: str, guided: bool) -> torch.Tensor:
    """With guidance, concatenate the negative prompt's tensor and the prompt's, in the pipelines' order."""
    return torch.cat([condition[f"negative_{name}"], condition[name]]) if guided else condition[name]


def _residuals(
    control: Controlled,
    shown: torch.Tensor,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    hidden: torch.Tensor,
    added: Mapping[str, torch.Tensor] | None,
) -> Residuals:
    # An inpainting UNet gets the mask and the picture as extra channels after the latents. A ControlNet does not.
    sample = sample[:, :LATENT_CHANNELS]
    halved = control.prompt_only and len(sample) == 2
    if halved:
        sample, hidden = sample[1:], hidden[1:]
        added = None if added is None else {name: tensor[1:] for name, tensor in added.items()}
    down, middle = cast("Any", control.net)(
        sample,
        timestep,
        encoder_hidden_states=hidden,
        controlnet_cond=torch.cat([shown] * len(sample)),
        conditioning_scale=control.weight,
        guess_mode=control.soft,
        added_cond_kwargs=added,
        return_dict=False,
    )
    if halved:
        down = [torch.cat([torch.zeros_like(tensor), tensor]) for tensor in down]
        middle = torch.cat([torch.zeros_like(middle), middle])
    return list(down), middle


def _add(one: Residuals, other: Residuals) -> Residuals:
    return [a + b for a, b in zip(one[0], other[0], strict=True)], one[1] + other[1]
