"""Samplers and noise schedules, by the names that requests use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from safelight.errors import ExtensionError, RequestError
from safelight.extensions import Extensible, instance_of
from safelight.request import checks

Schedule = Literal["default", "karras", "exponential", "sgm_uniform"]
"""How a sampler's noise levels are spread over its steps."""

NoiseKind = Literal["discrete", "flow"]
"""``discrete``: DDPM's steps (Ho et al. 2020). ``flow``: rectified flow (Liu et al. 2022)."""

SCHEDULES: tuple[Schedule, ...] = ("default", "karras", "exponential", "sgm_uniform")
MOST_STEPS = 999
"""One less than ``num_train_timesteps``: with ``steps_offset=1``, 1000 steps would start at timestep 1000, which was
never trained."""


@dataclass(frozen=True, slots=True)
class FlowScheduler:
    """How a sampler computes a rectified flow.

    ``scheduler``: the name of a class of diffusers, or ``package.module:Class``.
    ``settings``: arguments of that class.
    ``shift``: the name of the argument that shifts the noise levels.
    ``takes_levels``: whether ``set_timesteps`` takes ``sigmas`` and ``mu``.
    ``schedules``: the schedules that apply.
    """

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shift: str = "shift"
    takes_levels: bool = False
    schedules: tuple[Schedule, ...] = ("default",)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler: its scheduler class, its settings, the schedules that apply, and A1111's name for it.

    ``scheduler``: the name of a class of diffusers, or ``package.module:Class`` for one with the same interface.
    ``most_steps``: the most steps that it supports.
    ``supports_zero_terminal_snr``: whether it can start from pure noise, as checkpoints with a terminal
    signal-to-noise ratio of zero need it (Lin et al. 2024).
    ``automatic``: the schedule that A1111's "Automatic" selects.
    ``flow``: the scheduler for rectified flows, None if there is none.
    ``extra``: the extra of Safelight that it needs, "" if none.
    """

    scheduler: str
    a1111: str
    schedules: tuple[Schedule, ...] = SCHEDULES
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    most_steps: int = MOST_STEPS
    supports_zero_terminal_snr: bool = False
    automatic: Schedule = "default"
    flow: FlowScheduler | None = None
    extra: str = ""

    def schedules_for(self, kind: NoiseKind) -> tuple[Schedule, ...]:
        """Return the schedules that apply to a kind of noise; () if the sampler is not for it."""
        if kind == "discrete":
            return self.schedules
        return () if self.flow is None else self.flow.schedules


SCHEDULE_LABELS: Mapping[Schedule, str] = {
    "default": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
}
"""AUTOMATIC1111's schedule types by ours."""

_WITHOUT_SIGMA_SCHEDULES: tuple[Schedule, ...] = ("default", "sgm_uniform")
_DISTILLED_STEPS = 50
"""Steps that LCM (Luo et al. 2023) and TCD (trajectory consistency distillation, Zheng et al. 2024) were distilled
with: diffusers' ``original_inference_steps``."""

_SIGMA_SCHEDULES: tuple[Schedule, ...] = ("default", "karras", "exponential")
_FLOW_SIGMAS: Mapping[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

_BUILTIN: Mapping[str, Sampler] = {
    "ddim": Sampler(
        "DDIMScheduler",
        "DDIM",
        _WITHOUT_SIGMA_SCHEDULES,
        {"clip_sample": False, "set_alpha_to_one": False},
        supports_zero_terminal_snr=True,
    ),
    "ddpm": Sampler(
        "DDPMScheduler", "DDPM", _WITHOUT_SIGMA_SCHEDULES, {"clip_sample": False}, supports_zero_terminal_snr=True
    ),
    "pndm": Sampler(
        "PNDMScheduler", "PLMS", _WITHOUT_SIGMA_SCHEDULES, {"skip_prk_steps": True, "set_alpha_to_one": False}
    ),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "euler": Sampler(
        "EulerDiscreteScheduler",
        "Euler",
        supports_zero_terminal_snr=True,
        flow=FlowScheduler("FlowMatchEulerDiscreteScheduler", takes_levels=True, schedules=_SIGMA_SCHEDULES),
    ),
    "euler_a": Sampler(
        "EulerAncestralDiscreteScheduler", "Euler a", _WITHOUT_SIGMA_SCHEDULES, supports_zero_terminal_snr=True
    ),
    "heun": Sampler("HeunDiscreteScheduler", "Heun", flow=FlowScheduler("FlowMatchHeunDiscreteScheduler")),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2", automatic="karras"),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a", automatic="karras"),
    "dpmpp_2m": Sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        supports_zero_terminal_snr=True,
        automatic="karras",
        flow=FlowScheduler("DPMSolverMultistepScheduler", _FLOW_SIGMAS, "flow_shift"),
    ),
    "dpmpp_2m_sde": Sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        settings={"algorithm_type": "sde-dpmsolver++"},
        supports_zero_terminal_snr=True,
        automatic="exponential",
    ),
    "dpmpp_sde": Sampler("DPMSolverSDEScheduler", "DPM++ SDE", automatic="karras", extra="samplers"),
    "dpmpp_3m_sde": Sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        settings={"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        supports_zero_terminal_snr=True,
        automatic="exponential",
    ),
    "unipc": Sampler(
        "UniPCMultistepScheduler",
        "UniPC",
        supports_zero_terminal_snr=True,
        flow=FlowScheduler("UniPCMultistepScheduler", _FLOW_SIGMAS, "flow_shift"),
    ),
    "deis": Sampler("DEISMultistepScheduler", "DEIS"),
    "lcm": Sampler(
        "LCMScheduler",
        "LCM",
        ("default",),
        {"clip_sample": False},
        most_steps=_DISTILLED_STEPS,
        supports_zero_terminal_snr=True,
        flow=FlowScheduler("FlowMatchLCMScheduler", takes_levels=True),
    ),
    "tcd": Sampler(
        "TCDScheduler",
        "TCD",
        ("default",),
        {"clip_sample": False},
        most_steps=_DISTILLED_STEPS,
        supports_zero_terminal_snr=True,
    ),
}

SAMPLERS: Extensible[Sampler] = Extensible(_BUILTIN, "safelight.samplers", instance_of(Sampler))
"""All samplers: the built-in ones, and those of installed packages."""


def describe_few_schedules() -> str:
    """Return which built-in samplers have only some schedules, as a sentence."""
    few: dict[tuple[Schedule, ...], list[str]] = {}
    for name, sampler in SAMPLERS.builtin.items():
        if len(sampler.schedules) < len(SCHEDULES):
            few.setdefault(sampler.schedules, []).append(name)
    parts = (
        f"{', '.join(names[:-1])} and {names[-1]} have only {' and '.join(schedules)}"
        for schedules, names in few.items()
    )
    return "; ".join(parts) + "."


def a1111_name(name: str) -> str:
    """Return AUTOMATIC1111's name of a sampler. A sampler that is not installed, or does not load, keeps its name."""
    try:
        return SAMPLERS[name].a1111
    except (KeyError, ExtensionError):
        return name


def sampler_by_name(name: str) -> tuple[str, Schedule | None] | None:
    """Parse a sampler's name, ours or A1111's, ignoring upper and lower case: ``Euler-A``, ``DPM++ 2M Karras``.

    Return (sampler, schedule suffix or None); None if the sampler is unknown.
    """
    found = _sampler(name)
    if found is not None:
        return found, None
    for schedule, label in SCHEDULE_LABELS.items():
        if schedule != "default" and name.lower().endswith(f" {label.lower()}"):
            found = _sampler(name[: -len(label) - 1])
            return None if found is None else (found, schedule)
    return None


def parse_sampler_and_schedule(name: str | None, schedule: str | None) -> tuple[str | None, Schedule | None]:
    """Parse the names of a sampler and a schedule, Safelight's or AUTOMATIC1111's. Return (sampler, schedule).

    The sampler's name may end with the schedule, as in ``DPM++ 2M Karras``. None stays None.
    Raises RequestError.
    """
    asked: Any = None
    if schedule is not None:
        labels = {underscored(label): ours for ours, label in SCHEDULE_LABELS.items()}
        asked = labels.get(underscored(schedule), underscored(schedule))
    if name is None:
        return None, asked
    found = sampler_by_name(name)
    if found is None:
        checks.one_of("sampler", name, SAMPLERS)
        raise AssertionError(name)
    if found[1] is not None and asked not in (None, "default", found[1]):
        raise RequestError("schedule", schedule, f"the sampler's name says {found[1]}")
    return found[0], found[1] or asked


def underscored(value: str) -> str:
    """``SGM Uniform`` as ``sgm_uniform``."""
    return value.lower().replace("-", "_").replace(" ", "_")


def _sampler(name: str) -> str | None:
    lower = name.strip().lower()
    ours = lower.replace("-", "_").replace(" ", "_")
    return next((own for own, one in SAMPLERS.usable() if own in (lower, ours) or one.a1111.lower() == lower), None)
