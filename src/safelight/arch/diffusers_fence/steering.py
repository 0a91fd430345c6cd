"""What stands for the UNet in a pipeline: each call is given what holds at its step, conditions and ControlNets.

So one pipeline does for every combination, and what changes between steps is nobody's state but this call's.
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
    """What a UNet is told: ``each`` by the pipelines' argument names; ``at``: which of them holds at each step."""

    each: Sequence[Mapping[str, torch.Tensor]]
    at: Sequence[int] = (0,)

    @property
    def first(self) -> Mapping[str, torch.Tensor]:
        return self.each[self.at[0]]

    def between(self, first: int, last: int) -> Conditions:
        """Those of a pass: of its steps, from ``first`` up to ``last``, from 0."""
        return Conditions(self.each, self.at[first:last])

    def during(self, share: float) -> int:
        """Which holds after that share of the steps; a sampler may call the UNet more often than once a step."""
        return self.at[min(len(self.at) - 1, int(share * len(self.at) + 1e-6))]


@dataclass(frozen=True)
class Controlled:
    """A bound ControlNet ``net`` and what it is shown (``picture``: PIL, of the size that is drawn).

    ``weight`` times its output counts from the share ``start`` of the steps to ``end``; ``soft``: less in the outer
    layers; ``prompt_only``: not for the negative prompt.
    """

    net: nn.Module
    picture: Any
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    soft: bool = False
    prompt_only: bool = False


Residuals = tuple[list[torch.Tensor], torch.Tensor]
"""What a ControlNet adds to the encoder's outputs, and to the middle's."""


class Steered:
    """Called as the UNet is; everything else about it is the UNet's. ``pipeline``: in which it stands."""

    pipeline: Any = None

    def __init__(self, unet: nn.Module, conditions: Conditions, controls: Sequence[Controlled]) -> None:
        self.unet = unet
        self._conditions = conditions
        self._controls = [(control, self._shown(control, unet)) for control in controls]
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["unet"], name)

    @staticmethod
    def _shown(control: Controlled, unet: nn.Module) -> torch.Tensor:
        processor = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
        like = cast("Any", unet)
        return processor.preprocess(control.picture).contiguous().to(device=like.device, dtype=like.dtype)

    def passed(self, done: int) -> None:
        """So many of the scheduler's steps are done."""
        self._done = done

    def forget(self) -> None:
        """Hold nothing any more."""
        self.pipeline, self._controls = None, []

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **more: Any
    ) -> Any:
        steps = max(1, self.pipeline.num_timesteps)
        guided = len(sample) == 2
        at = self._conditions.during(self._done / steps)
        if at != self._conditions.at[0]:
            told = self._conditions.each[at]
            encoder_hidden_states = _paired(told, "prompt_embeds", guided)
            if "pooled_prompt_embeds" in told:
                pooled = _paired(told, "pooled_prompt_embeds", guided)
                more["added_cond_kwargs"] = {**more["added_cond_kwargs"], "text_embeds": pooled}
        added = more.get("added_cond_kwargs")
        residuals: Residuals | None = None
        for control, shown in self._controls:
            if self._done / steps >= control.start and (self._done + 1) / steps <= control.end:
                found = _residuals(control, shown, sample, timestep, encoder_hidden_states, added)
                residuals = found if residuals is None else _summed(residuals, found)
        if residuals is not None:
            more |= {
                "down_block_additional_residuals": residuals[0],
                "mid_block_additional_residual": residuals[1],
            }
        return self.unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, **more)


def _paired(told: Mapping[str, torch.Tensor], name: str, guided: bool) -> torch.Tensor:
    """The negative prompt's before the prompt's, as the pipelines have them."""
    return torch.cat([told[f"negative_{name}"], told[name]]) if guided else told[name]


def _residuals(
    control: Controlled,
    shown: torch.Tensor,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    hidden: torch.Tensor,
    added: Mapping[str, torch.Tensor] | None,
) -> Residuals:
    # An inpainting UNet is given the mask and the picture behind the latents; a ControlNet is not.
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


def _summed(one: Residuals, other: Residuals) -> Residuals:
    return [a + b for a, b in zip(one[0], other[0], strict=True)], one[1] + other[1]
