"""Creates diffusers' schedulers by the names of samplers, and gives diffusion and
rectified-flow schedulers one interface."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from safelight.boundary import schedulers
from safelight.families.family import Family
from safelight.request.samplers import SAMPLERS, Schedule

WHOLE = (0.0, 1.0)
"""All noise levels."""


class SamplerRun:
    """A sampler with its schedule, for one run of the denoising loop.

    It counts its own steps, so it is never used twice.

    ``scheduler``: diffusers' object, which computes the noise levels and the steps.
    ``calls``: the number of calls of the denoiser, after :meth:`begin`.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.calls = 0
        known = inspect.signature(scheduler.step).parameters
        self._eta: dict[str, Any] = {"eta": 0.0} if "eta" in known else {}
        self._takes_generator = "generator" in known

    def begin(
        self, steps: int, device: torch.device, strength: float | None, denoising_range: tuple[float, float] = WHOLE
    ) -> torch.Tensor:
        """Set the number of steps and return the timesteps to run.

        ``strength``: the share of the steps to run, counted from the end; None for all.
        ``denoising_range``: the range of noise levels to run, from 0 (pure noise) to 1 (none), as diffusers'
        ``denoising_start`` and ``denoising_end``. With a start above 0, ``strength`` has no effect.
        """
        self.scheduler.set_timesteps(steps, device=device)
        timesteps, (start, end) = self.scheduler.timesteps, denoising_range
        if start > 0:
            count = int((timesteps < self._timestep_at(start)).sum())
            if self.scheduler.order == 2 and count % 2 == 0:
                # Each timestep but the first is there twice: for the second call of a step, and for the first call of
                # the next step. An even count would start with a second call, so take one more.
                count += 1
            timesteps = self._from(len(timesteps) - count)
        elif strength is not None:
            timesteps = self._from(max(steps - min(int(steps * strength), steps), 0) * self.scheduler.order)
        if end < 1:
            timesteps = timesteps[: int((timesteps >= self._timestep_at(end)).sum())]
        self.calls = len(timesteps)
        return timesteps

    def _from(self, first: int) -> torch.Tensor:
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return self.scheduler.timesteps[first:]

    def _timestep_at(self, share: float) -> int:
        """Return the cutoff timestep for diffusers' ``denoising_start`` or ``denoising_end`` of ``share``."""
        trained = self.scheduler.config.num_train_timesteps
        return round(trained - share * trained)

    def initial_latents(self, noise: torch.Tensor) -> torch.Tensor:
        """Scale noise to the level of the first timestep."""
        return noise * self.scheduler.init_noise_sigma

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Add noise to latents, at the level of ``timestep``, a tensor of shape (1,)."""
        return self.scheduler.add_noise(latents, noise, timestep)

    def scale_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Scale latents as the denoiser wants them."""
        return self.scheduler.scale_model_input(latents, timestep)

    def step(
        self, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the latents after a step. ``generator``: for samplers that draw noise."""
        more = {**self._eta, **({"generator": generator} if self._takes_generator else {})}
        return self.scheduler.step(prediction, timestep, latents, **more, return_dict=False)[0]

    @property
    def sigma(self) -> float:
        """The noise level after the latest step, in the sampler's scale."""
        return schedulers.sigma(self.scheduler)


class FlowSamplerRun(SamplerRun):
    """A sampler with its schedule for a rectified flow: latents are a straight line between the image and noise."""

    def initial_latents(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.scheduler.scale_noise(latents, timestep, noise)

    def scale_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        del timestep
        return latents


def make(
    family: Family, sampler: str, schedule: Schedule, prediction_type: str, zero_terminal_snr: bool, seed: int
) -> SamplerRun:
    """Create the sampler for one run of the denoising loop.

    ``seed``: for samplers that draw noise from their own Brownian tree (``dpmpp_sde``) instead of the generator.
    """
    chosen = SAMPLERS[sampler]
    if family.noise.kind == "flow":
        assert chosen.flow is not None
        return FlowSamplerRun(schedulers.scheduler(chosen.flow, dict(family.noise.settings), seed))
    settings: dict[str, Any] = {**family.noise.settings, "prediction_type": prediction_type, **chosen.settings}
    if schedule == "karras":
        settings["use_karras_sigmas"] = True
    elif schedule == "exponential":
        settings["use_exponential_sigmas"] = True
    elif schedule == "sgm_uniform":
        settings["timestep_spacing"] = "trailing"
    if zero_terminal_snr:
        settings["timestep_spacing"] = "trailing"
        settings["rescale_betas_zero_snr"] = True
    return SamplerRun(schedulers.scheduler(chosen.scheduler, settings, seed))
