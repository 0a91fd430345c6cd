"""diffusers' own pipelines around a bound UNet, and its schedulers."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from safelight.arch.diffusers_fence.pictures import Encoded
from safelight.arch.diffusers_fence.steering import Conditions, Controlled, Steered
from safelight.errors import BindingError
from safelight.formats.layout import BASES, LATENT_LEVELS


@dataclass(frozen=True)
class Start:
    """What a generation starts from: a picture (PIL, of the size that is drawn) or latents (1, 4, h, w), perhaps a mask
    (PIL), and what the VAE made of the picture and, with a mask, of the picture where the mask is black. ``strength``:
    the share of the steps that is done."""

    picture: Any
    mask: Any | None
    encoded: Sequence[Encoded]
    strength: float


class _Encoder:
    """Stands for the VAE in a pipeline that only encodes: gives what was encoded before of what it is shown."""

    def __init__(self, base: str, encoded: Sequence[Encoded]) -> None:
        self.config = SimpleNamespace(
            latent_channels=4,
            scaling_factor=BASES[base].scaling_factor,
            block_out_channels=(0,) * LATENT_LEVELS,
            force_upcast=False,
        )
        self._known = encoded

    def encode(self, shown: torch.Tensor) -> SimpleNamespace:
        for known in self._known:
            if torch.equal(known.shown.to(shown.dtype), shown):
                return SimpleNamespace(latent_dist=known.distribution)
        raise BindingError("a pipeline asked for the latents of a picture that was not encoded")


def denoise(
    base: str,
    unet: nn.Module,
    scheduler: Any,
    device: torch.device,
    conditions: Conditions,
    on_step: Callable[[int, torch.Tensor], None],
    start: Start | None = None,
    controls: Sequence[Controlled] = (),
    vary: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **call: Any,
) -> torch.Tensor:
    """Latents from the base's own diffusers pipeline, made for this call around a bound UNet.

    ``on_step`` is told of each step's number (from 0) and latents, and may raise to stop. ``start``: what it starts
    from, None for ``latents`` among ``call``, which are further arguments of the pipeline. ``controls``: ControlNets
    beside the UNet. ``vary`` makes of the noise that is added to a picture the noise that is meant.
    """
    steered = Steered(unet, conditions, controls)

    def callback(_: Any, step: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steered.passed(step + 1)
        on_step(step, values["latents"])
        return {}

    parts: dict[str, Any] = dict(_empty_parts(base))
    if start is not None:
        parts["vae"] = _Encoder(base, start.encoded)
        call |= {"image": start.picture, "strength": start.strength}
    if start is not None and start.mask is not None:
        call["mask_image"] = start.mask
    if vary is not None:
        _varied(scheduler, vary)
    task = "text" if start is None else "image" if start.mask is None else "mask"
    pipeline = pipeline_class(base, task)(**parts, unet=steered, scheduler=scheduler, **_no_extras(base))
    pipeline.told_device = device
    steered.pipeline = pipeline
    pipeline.set_progress_bar_config(disable=True)
    try:
        result = pipeline(
            **conditions.first,
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents"],
            **call,
        )
    finally:
        steered.forget()
    return result.images


def _varied(scheduler: Any, vary: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The scheduler belongs to one image: each noise that it adds to a picture is varied first."""
    add = scheduler.add_noise

    def add_noise(picture: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return add(picture, vary(noise), steps)

    scheduler.add_noise = add_noise


def _empty_parts(base: str) -> dict[str, None]:
    parts = ["vae", "text_encoder", "tokenizer"]
    return dict.fromkeys([*parts, "text_encoder_2", "tokenizer_2"] if base == "sdxl" else parts)


def _no_extras(base: str) -> dict[str, Any]:
    if base == "sdxl":
        return {"add_watermarker": False}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


_PIPELINES = {"text": "", "image": "Img2Img", "mask": "Inpaint"}


def pipeline_class(base: str, task: str = "text") -> Any:
    """The class of a base's pipeline for a task: ``text``, ``image`` or ``mask``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pipelines import most of diffusers: a second that only a generation should pay.
        family = "stable_diffusion_xl" if base == "sdxl" else "stable_diffusion"
        kind = _PIPELINES[task]
        module = f"pipeline_{family}_{kind.lower()}" if kind else f"pipeline_{family}"
        found = importlib.import_module(f"diffusers.pipelines.{family}.{module}")
        Pipeline = getattr(found, f"StableDiffusion{'XL' if base == 'sdxl' else ''}{kind}Pipeline")  # noqa: N806

    class Told(Pipeline):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        """A pipeline whose device is told; diffusers infers it from wherever the first parameter happens to be."""

        told_device: torch.device

        @property
        def _execution_device(self) -> torch.device:
            return self.told_device

    Told.__name__ = Pipeline.__name__
    return Told


def pipeline_name(base: str) -> str:
    """The class of a base's pipeline."""
    return pipeline_class(base).__name__


def sigma(scheduler: Any) -> float:
    """The noise level of the latents after the last step, in the sampler's own scale; 1 where it keeps the variance."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    return 1.0 if sigmas is None or index is None else float(sigmas[min(index, len(sigmas) - 1)])


SPACING = frozenset({"timestep_spacing", "steps_offset"})
"""How steps are spread over those of training: some classes have one way only."""


def scheduler(name: str, settings: Mapping[str, Any], seed: int) -> Any:
    """A fresh scheduler of diffusers' class ``name``; of the settings that the class does not have,
    :data:`SPACING` are left out. Raises TypeError for others.

    ``dpmpp_sde`` ignores the generator it is given: its noise tree is seeded with ``seed`` instead.
    """
    from diffusers import schedulers

    kind = getattr(schedulers, name)
    known = inspect.signature(kind.__init__).parameters
    chosen = {key: value for key, value in settings.items() if key in known or key not in SPACING}
    if "noise_sampler_seed" in known:
        chosen["noise_sampler_seed"] = seed
    return kind(**chosen)
