"""Other programs' names of samplers and schedules.

- InvokeAI: ``SCHEDULER_MAP`` in invokeai/backend/stable_diffusion/schedulers/schedulers.py; ``_k`` means Karras. Its
  ``dpmpp_3m`` and ``dpmpp_2s`` have no counterpart here.
- ComfyUI, SwarmUI, Fooocus: ``SAMPLER_NAMES`` and ``SCHEDULER_NAMES`` in comfy/samplers.py
- NovelAI: ``k_`` stands before k-diffusion's names
- AUTOMATIC1111, Forge, Draw Things: labels such as ``DPM++ 2M Karras``
"""

from __future__ import annotations

from collections.abc import Mapping

from safelight.request.samplers import SAMPLERS, SCHEDULE_LABELS, Schedule, sampler_by_name, underscored

INVOKE: Mapping[str, str] = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "deis": "deis",
    "lms": "lms",
    "pndm": "pndm",
    "heun": "heun",
    "euler": "euler",
    "euler_a": "euler_a",
    "kdpm_2": "dpm2",
    "kdpm_2_a": "dpm2_a",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_sde": "dpmpp_sde",
    "unipc": "unipc",
    "lcm": "lcm",
    "tcd": "tcd",
}

COMFY: Mapping[str, str] = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "deis": "deis",
    "lms": "lms",
    "heun": "heun",
    "euler": "euler",
    "euler_ancestral": "euler_a",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "dpmpp_sde": "dpmpp_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "uni_pc": "unipc",
    "lcm": "lcm",
    "tcd": "tcd",
}

_COMFY_SCHEDULES: Mapping[str, Schedule] = {
    "": "default",
    "normal": "default",
    "simple": "default",
    "karras": "karras",
    "exponential": "exponential",
    "sgm_uniform": "sgm_uniform",
}
"""``normal`` and ``simple`` spread the steps evenly, though not exactly as the default does."""

EVENLY = ("normal", "simple")

_LABELS: Mapping[str, str] = {
    "euler ancestral": "euler_a",
    "pndm": "pndm",
    "plms": "pndm",
    "unipc": "unipc",
}


def of_invoke(name: str) -> tuple[str, Schedule] | None:
    """Return sampler and schedule for InvokeAI's name of a scheduler; None if Safelight has no such sampler."""
    if name.startswith("k_"):
        # Version 2 wrote k-diffusion's names.
        return of_comfy(name.removeprefix("k_"), "")
    sampler = INVOKE.get(name.removesuffix("_k"))
    schedule: Schedule = "karras" if name.endswith("_k") else "default"
    return None if sampler is None else (sampler, schedule)


def of_comfy(name: str, schedule: str) -> tuple[str, Schedule] | None:
    """Return sampler and schedule for ComfyUI's names; None if Safelight lacks one of them."""
    sampler, found = COMFY.get(name), _COMFY_SCHEDULES.get(schedule)
    return None if sampler is None or found is None else (sampler, found)


def of_label(name: str, schedule: str) -> tuple[str, Schedule] | None:
    """Return sampler and schedule for AUTOMATIC1111's labels; None if Safelight lacks one of them."""
    known = _LABELS.get(name.strip().lower())
    found: tuple[str, Schedule | None] | None = (known, None) if known else sampler_by_name(name)
    if found is None:
        return None
    label = underscored(schedule)
    labels: dict[str, Schedule] = {underscored(text): ours for ours, text in SCHEDULE_LABELS.items()}
    if label in ("", "automatic"):
        return found[0], found[1] or SAMPLERS[found[0]].automatic
    if label in EVENLY:
        return found[0], "default"
    chosen = labels.get(label)
    return None if chosen is None else (found[0], chosen)
