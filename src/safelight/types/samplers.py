"""Samplers and noise schedules, by the names that requests use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Schedule = Literal["default", "karras", "exponential", "sgm_uniform"]
"""How a sampler's noise levels are spread over its steps."""

SCHEDULES: tuple[Schedule, ...] = ("default", "karras", "exponential", "sgm_uniform")


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler: diffusers' scheduler class, its settings, the schedules that apply, and A1111's name for it."""

    scheduler: str
    a1111: str
    schedules: tuple[Schedule, ...] = SCHEDULES
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


_SPACED: tuple[Schedule, ...] = ("default", "sgm_uniform")

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", "DDIM", _SPACED, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": Sampler("DDPMScheduler", "DDPM", _SPACED, {"clip_sample": False}),
    "pndm": Sampler("PNDMScheduler", "PLMS", _SPACED, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a", _SPACED),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2"),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "dpmpp_2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpmpp_2m_sde": Sampler(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE", settings={"algorithm_type": "sde-dpmsolver++"}
    ),
    "dpmpp_sde": Sampler("DPMSolverSDEScheduler", "DPM++ SDE"),
    "dpmpp_3m_sde": Sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        settings={"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
    "deis": Sampler("DEISMultistepScheduler", "DEIS"),
    "lcm": Sampler("LCMScheduler", "LCM", _SPACED, {"clip_sample": False}),
    "tcd": Sampler("TCDScheduler", "TCD", _SPACED, {"clip_sample": False}),
}
