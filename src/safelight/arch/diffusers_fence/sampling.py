"""Runs diffusers' own pipelines with a bound UNet, and creates its schedulers."""

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
    """The start of a generation from a picture.

    ``picture``: PIL, of the image's size, or latents (1, 4, h, w).
    ``mask``: PIL, or None.
    ``encoded``: the encoded picture and, with a mask, the encoded picture where the mask is black.
    ``strength``: denoising strength, the share of the steps to run.
    """

    picture: Any
    mask: Any | None
    encoded: Sequence[Encoded]
    strength: float


class _Encoder:
    """Replaces the VAE in a pipeline that only encodes. It looks up the latents that were encoded before."""

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
        raise BindingError("a pipeline requested the latents of a picture that was not encoded")


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
    """Run the base's own diffusers pipeline with a bound UNet, and return the latents.

    ``on_step``: called with each step's index (from 0) and latents. It may raise to stop.
    ``start``: the start picture, None to start from ``latents`` in ``call``.
    ``controls``: bound ControlNets.
    ``vary``: changes the noise before it is added to a picture.
    ``call``: further arguments of the pipeline.
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
        _vary_noise(scheduler, vary)
    task = "text" if start is None else "image" if start.mask is None else "mask"
    pipeline = pipeline_class(base, task)(**parts, unet=steered, scheduler=scheduler, **_no_extras(base))
    pipeline.fixed_device = device
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


def _vary_noise(scheduler: Any, vary: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply ``vary`` to all noise that the scheduler adds. Nothing is restored: the scheduler belongs to one image."""
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
    """Return the class of a base's pipeline for a task: ``text``, ``image`` or ``mask``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pipelines import most of diffusers. This takes a second, so it happens only for a generation.
        family = "stable_diffusion_xl" if base == "sdxl" else "stable_diffusion"
        kind = _PIPELINES[task]
        module = f"pipeline_{family}_{kind.lower()}" if kind else f"pipeline_{family}"
        found = importlib.import_module(f"diffusers.pipelines.{family}.{module}")
        Pipeline = getattr(found, f"StableDiffusion{'XL' if base == 'sdxl' else ''}{kind}Pipeline")  # noqa: N806

    class FixedDevice(Pipeline):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        """A pipeline with an explicit device. diffusers would infer it from the device of some first parameter."""

        fixed_device: torch.device

        @property
        def _execution_device(self) -> torch.device:
            return self.fixed_device

    FixedDevice.__name__ = Pipeline.__name__
    return FixedDevice


def pipeline_name(base: str) -> str:
    """Return the class name of a base's pipeline."""
    return pipeline_class(base).__name__


def sigma(scheduler: Any) -> float:
    """Return the noise level after the last step, in the sampler's scale. It is 1 for variance-preserving samplers."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    return 1.0 if sigmas is None or index is None else float(sigmas[min(index, len(sigmas) - 1)])


SPACING = frozenset({"timestep_spacing", "steps_offset"})
"""Settings that spread the steps over the training steps. Some scheduler classes support only one way."""


def scheduler(name: str, settings: Mapping[str, Any], seed: int) -> Any:
    """Create a scheduler of diffusers' class ``name``.

    ``settings``: its arguments. Those in :data:`SPACING` are left out if the class does not have them.
    ``seed``: seed of ``dpmpp_sde``'s noise tree, because that class ignores the pipeline's generator.

    Raises TypeError if the class does not have another setting.
    """
    from diffusers import schedulers

    kind = getattr(schedulers, name)
    known = inspect.signature(kind.__init__).parameters
    chosen = {key: value for key, value in settings.items() if key in known or key not in SPACING}
    if "noise_sampler_seed" in known:
        chosen["noise_sampler_seed"] = seed
    return kind(**chosen)
