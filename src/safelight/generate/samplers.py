"""Creates diffusers' schedulers by the names of samplers.

All bases use the noise schedule of Stable Diffusion (scaled linear, 0.00085 to 0.012, 1,000 steps).
"""

from __future__ import annotations

from typing import Any

from safelight.arch.diffusers_fence import sampling
from safelight.request.samplers import SAMPLERS, Schedule


def make(sampler: str, schedule: Schedule, prediction_type: str, zero_terminal_snr: bool, seed: int) -> Any:
    """Create a scheduler for one image. A scheduler counts its own steps, so it is never used twice.

    ``seed``: for samplers that draw noise from their own Brownian tree (``dpmpp_sde``) instead of the generator.
    """
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        **SAMPLERS[sampler].settings,
    }
    if schedule == "karras":
        settings["use_karras_sigmas"] = True
    elif schedule == "exponential":
        settings["use_exponential_sigmas"] = True
    elif schedule == "sgm_uniform":
        settings["timestep_spacing"] = "trailing"
    if zero_terminal_snr:
        settings["timestep_spacing"] = "trailing"
        settings["rescale_betas_zero_snr"] = True
    return sampling.scheduler(SAMPLERS[sampler].scheduler, settings, seed)
