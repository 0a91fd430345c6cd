"""Creates diffusers' schedulers by the names of samplers, and gives diffusion and
rectified-flow schedulers one interface."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from safelight.boundary import schedulers
from safelight.families.family import Noise
from safelight.pipeline import beta_spacing
from safelight.request.samplers import SAMPLERS, FlowScheduler, Schedule

WHOLE = (0.0, 1.0)
"""All noise levels."""

TIMESTEPS = 1000
"""A flow's timesteps are its noise levels times this."""

Levels = Callable[[int], Sequence[float] | None]
"""Returns a rectified flow's noise levels for a number of steps, before the shift; None for the scheduler's own."""

_SIGMAS: Mapping[Schedule, Mapping[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}


def no_levels(steps: int) -> None:
    """Leave the noise levels to the scheduler."""
    del steps


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
        self._set_timesteps(steps, device)
        timesteps, (start, end) = self.scheduler.timesteps, denoising_range
        if start > 0:
            count = int((timesteps < self._timestep_at(start)).sum())
            if self.scheduler.order == 2 and count % 2 == 0:
                # Each timestep but the first is there twice: for the second call of a step, and for the first call of
                # the next step. An even count would start with a second call, so take one more.
                count += 1
            timesteps = self._from(len(timesteps) - count)
        elif strength is not None:
            timesteps = self._from(self._first_step(steps, strength) * self.scheduler.order)
        if end < 1:
            timesteps = timesteps[: int((timesteps >= self._timestep_at(end)).sum())]
        self.calls = len(timesteps)
        return timesteps

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        self.scheduler.set_timesteps(steps, device=device)

    def _first_step(self, steps: int, strength: float) -> int:
        return max(steps - min(int(steps * strength), steps), 0)

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
    """A sampler with its schedule for a rectified flow: latents are a straight line between the image and noise.

    ``levels``: returns the noise levels for a number of steps, before the shift; None for the scheduler's own.
    ``mu``: the shift that depends on the image's size; None for a constant shift.
    ``last_level``: the levels are stretched so that the last step begins at this one; None for no stretching.
    """

    def __init__(self, scheduler: Any, levels: Levels, mu: float | None, last_level: float | None) -> None:
        super().__init__(scheduler)
        self._levels = levels
        self._mu = mu
        self._last_level = last_level

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        sigmas = self._levels(steps)
        stretches = bool(getattr(self.scheduler, "config", {}).get("shift_terminal"))
        if steps == 1 and stretches:
            # A single level cannot be stretched: the library would divide by zero.
            self.scheduler.register_to_config(shift_terminal=None)
        more: dict[str, Any] = {} if self._mu is None else {"mu": self._mu}
        if sigmas is None:
            self.scheduler.set_timesteps(steps, device=device, **more)
        else:
            self.scheduler.set_timesteps(sigmas=sigmas, device=device, **more)
        if steps > 1 and self._last_level is not None and not stretches:
            _stretch(self.scheduler, self._last_level)
        # Some schedulers round timesteps, so that the first ones can be equal. Then they would look for a later one.
        self._from(0)

    def _first_step(self, steps: int, strength: float) -> int:
        # diffusers' pipelines for flows round the other way.
        return int(max(steps - min(steps * strength, steps), 0))

    def initial_latents(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(latents, timestep, noise)
        return self.scheduler.add_noise(latents, noise, timestep)

    def scale_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        del timestep
        return latents


def make(
    noise: Noise,
    sampler: str,
    schedule: Schedule,
    prediction_type: str,
    zero_terminal_snr: bool,
    seed: int,
    levels: Levels = no_levels,
    mu: float | None = None,
) -> SamplerRun:
    """Create the sampler for one run of the denoising loop.

    ``seed``: for samplers that draw noise from their own Brownian tree (``dpmpp_sde``) instead of the generator.
    ``levels``, ``mu``: for rectified flows; see :class:`FlowSamplerRun`.
    """
    chosen = SAMPLERS[sampler]
    if noise.kind == "flow":
        assert chosen.flow is not None
        return _flow(noise, chosen.flow, schedule, seed, levels, mu)
    settings: dict[str, Any] = {**noise.settings, "prediction_type": prediction_type, **chosen.settings}
    settings |= _SIGMAS.get(schedule, {})
    if schedule == "sgm_uniform":
        settings["timestep_spacing"] = "trailing"
    if zero_terminal_snr:
        settings["timestep_spacing"] = "trailing"
        settings["rescale_betas_zero_snr"] = True
    return SamplerRun(schedulers.scheduler(chosen.scheduler, settings, seed))


def _flow(
    noise: Noise, chosen: FlowScheduler, schedule: Schedule, seed: int, levels: Levels, mu: float | None
) -> SamplerRun:
    settings: dict[str, Any] = {**noise.settings, **chosen.settings, **_SIGMAS.get(schedule, {})}
    shift = settings.pop("shift", 1.0)
    if mu is None:
        settings[chosen.shift] = shift
    elif chosen.takes_levels:
        settings["use_dynamic_shifting"] = True
    else:
        # The same curve as a constant shift: exp(mu) / (exp(mu) + 1 / sigma - 1).
        settings[chosen.shift] = math.exp(mu)
    run = schedulers.scheduler(chosen.scheduler, settings, seed)
    last: float | None = settings.get("shift_terminal")
    if not chosen.takes_levels:
        return FlowSamplerRun(run, no_levels, None, last)
    if noise.spacing == "beta" and schedule == "default":
        return FlowSamplerRun(run, lambda steps: _beta_levels(levels(steps)), mu, last)
    return FlowSamplerRun(run, levels, mu, last)


def _stretch(scheduler: Any, last: float) -> None:
    """Stretch a scheduler's noise levels, as diffusers' ``stretch_shift_to_terminal``, in the classes that lack it.

    ``last``: the level at which the last step begins. The level 0 at the end stays.
    """
    levels: torch.Tensor = scheduler.sigmas[:-1]
    stretched = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - last))
    scheduler.sigmas = torch.cat([stretched, scheduler.sigmas[-1:]])
    scheduler.timesteps = (stretched * TIMESTEPS).to(scheduler.timesteps.device, scheduler.timesteps.dtype)


def _beta_levels(levels: Sequence[float] | None) -> Sequence[float]:
    assert levels is not None, "the family has no levels of its own"
    return beta_spacing.spread(levels)
