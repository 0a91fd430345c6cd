"""The denoising loop: the same for every family, sampler and task.

Within a step the order is fixed: the prompts of the step, ControlNets, the denoiser, guidance, the sampler, the mask,
and last ``on_call`` (gates, previews, memory). The parity tests compare the latents bit for bit with those of
diffusers' pipelines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import nn

from safelight.boundary import pictures
from safelight.boundary.pictures import EncodedPicture
from safelight.families.family import MASK_CHANNELS, ExtraInputChannels, Family
from safelight.families.family_model import Call, ControlCall, FamilyModel, Tensors, change_each, scale_latents
from safelight.pipeline import noise
from safelight.pipeline.first_block_cache import FirstBlockCache
from safelight.pipeline.guidance import Condition, Guidance
from safelight.pipeline.samplers import WHOLE, SamplerRun


@dataclass(frozen=True, slots=True)
class ConditionsByStep:
    """The condition of each step of an image.

    ``distinct``: the distinct conditions.
    ``index_by_step``: the index into ``distinct`` for each step.
    """

    distinct: Sequence[Condition]
    index_by_step: Sequence[int] = (0,)

    def between(self, first: int, last: int) -> ConditionsByStep:
        """Return the conditions for the steps ``first`` (from 0) up to, not including, ``last``."""
        return ConditionsByStep(self.distinct, self.index_by_step[first:last])

    def index_at(self, share: float) -> int:
        """Return the index into ``distinct`` after ``share`` (0 to 1) of the steps.

        It takes a share, because a sampler may call the denoiser several times per step.
        """
        count = len(self.index_by_step)
        return self.index_by_step[min(count - 1, int(share * count + 1e-6))]


@dataclass(frozen=True, slots=True)
class Start:
    """What denoising starts from instead of noise alone.

    ``strength``: denoising strength, the share of the steps to run.
    ``latents``: (1, channels, h, w), or None for ``encoded``.
    ``encoded``: the encoded picture. With a mask, a second one follows: the masked image, diffusers' ``masked_image``.
    ``mask``: white where the picture is drawn again.
    """

    strength: float
    latents: torch.Tensor | None = None
    encoded: Sequence[EncodedPicture] = ()
    mask: PILImage.Image | None = None


@dataclass(frozen=True, slots=True)
class Denoised:
    """The result of the loop, and what another model needs to compute the steps after it.

    ``latents``: (1, channels, h, w).
    ``mask``: the mask, if the loop kept the input picture where the mask is black; else None.
    ``generator_state``: the state of the generator of noise.
    ``skipped``: how many of the denoiser's calls :class:`FirstBlockCache` cut short.
    """

    latents: torch.Tensor
    mask: LatentMask | None
    generator_state: torch.Tensor
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class BoundControlNet:
    """A bound ControlNet and its picture.

    ``picture``: of the image's size; encoded for a ControlNet that reads latents.
    ``weight``: factor of its output.
    ``start``, ``end``: the shares of the steps between which it is used.
    ``guess_mode``, ``union_type``: see :class:`safelight.families.family_model.ControlCall`.
    ``prompt_only``: do not use it for the negative prompt.
    """

    net: nn.Module
    picture: PILImage.Image | EncodedPicture
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False
    prompt_only: bool = False
    union_type: str = ""


@dataclass(frozen=True, slots=True)
class DenoiseInputs:
    """Everything that the loop works with.

    ``denoiser``: bound.
    ``shape``: of the latents, (1, channels, h, w).
    ``guidance``: the rows of each call of the denoiser, and how their predictions become one.
    ``extra_input_channels``: what the denoiser has as inputs besides the latents.
    ``image``: the encoded picture whose latents the denoiser has as inputs; None if it has no such inputs.
    ``references``: the encoded reference images.
    ``variation``: changes the noise, for variations of a seed.
    ``denoising_range``: the range of noise levels to run; see :meth:`safelight.pipeline.samplers.SamplerRun.begin`.
    ``total_denoiser_calls``: denoiser calls of model and refiner together. A ControlNet's ``start`` and ``end`` are
    fractions of this number. 0: use this loop's own number of calls.
    ``first_block_cache``: the threshold of :class:`FirstBlockCache`; 0 to compute each call as a whole.
    ``on_call``: called after each call of the denoiser with its index (from 0) and the latents. It may raise to stop.
    """

    family: Family
    model: FamilyModel
    denoiser: nn.Module
    sampler: SamplerRun
    conditions: ConditionsByStep
    guidance: Guidance
    steps: int
    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    on_call: Callable[[int, torch.Tensor], None]
    start: Start | Denoised | None = None
    controls: Sequence[BoundControlNet] = ()
    extra_input_channels: ExtraInputChannels = ""
    image: EncodedPicture | None = None
    references: Sequence[EncodedPicture] = ()
    variation: Callable[[torch.Tensor], torch.Tensor] | None = None
    denoising_range: tuple[float, float] = WHOLE
    total_denoiser_calls: int = 0
    first_block_cache: float = 0.0

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser has the mask and the masked picture as inputs (a checkpoint for inpainting)."""
        return self.extra_input_channels in MASK_CHANNELS


def denoise(work: DenoiseInputs) -> Denoised:
    """Run the loop."""
    cache = FirstBlockCache(work.denoiser, work.first_block_cache) if work.first_block_cache else None
    with torch.no_grad(), contextlib.nullcontext() if cache is None else cache.applied():
        generator = torch.Generator("cpu").manual_seed(work.seed)
        strength = work.start.strength if isinstance(work.start, Start) else None
        timesteps = work.sampler.begin(work.steps, work.device, strength, work.denoising_range)
        # What ControlNets read of their pictures is drawn first, as in diffusers' pipelines.
        controls = [(control, _control_call(control, work, generator)) for control in work.controls]
        latents, mask = _first_latents(work, timesteps, generator)
        guidance = work.guidance
        extra = guidance.batch_extra_channels(_inputs(work, mask))
        references = [guidance.repeat_latents(_scaled(one.distribution.mode(), work)) for one in work.references]
        calls = work.total_denoiser_calls or len(timesteps)
        for index, timestep in enumerate(timesteps):
            condition = work.conditions.distinct[work.conditions.index_at(index / len(timesteps))]
            rows = work.sampler.scale_input(guidance.repeat_latents(latents), timestep)
            joined = work.model.join_conditions(guidance.conditions_of_rows(condition))
            call = Call(rows, timestep, joined, extra, guidance=guidance.scale, references=references)
            for control, how in controls:
                if control.start <= index / calls and (index + 1) / calls <= control.end:
                    call = replace(call, control=_add_outputs(call.control, _control_outputs(work, control, how, call)))
            parts: list[torch.Tensor] = []
            for number, each in enumerate(_calls_of(work, call)):
                if cache is not None:
                    cache.begin_row(number)
                parts.append(work.model.predict(work.denoiser, each))
            prediction = guidance.combine(torch.cat(parts) if len(parts) > 1 else parts[0])
            latents = work.sampler.step(prediction, timestep, latents, generator)
            if mask is not None and not work.takes_mask:
                following = timesteps[index + 1] if index < len(timesteps) - 1 else None
                latents = mask.blend(latents, work.sampler, following)
            work.on_call(index, latents)
        skipped = 0 if cache is None else cache.skipped
        return Denoised(latents, None if work.takes_mask else mask, generator.get_state(), skipped)


@dataclass(frozen=True, slots=True)
class LatentMask:
    """A mask in latents.

    ``mask``: 1 where the picture is drawn again, (1, 1, h, w); with the input channels ``pixel_mask`` (1, n, h, w).
    ``masked_image_latents``: latents of the masked image.
    ``image_latents``: latents of the picture; None for an inpainting checkpoint at denoising strength 1.
    ``noise``: the noise that denoising started from.
    """

    mask: torch.Tensor
    masked_image_latents: torch.Tensor
    image_latents: torch.Tensor | None
    noise: torch.Tensor

    def blend(self, latents: torch.Tensor, sampler: SamplerRun, following: torch.Tensor | None) -> torch.Tensor:
        """Restore the image latents where the mask is black, noised to timestep ``following``.

        ``following``: None after the last step: no noise.
        """
        assert self.image_latents is not None
        image_latents = self.image_latents
        if following is not None:
            image_latents = sampler.add_noise(image_latents, self.noise, torch.tensor([following]))
        return (1 - self.mask) * image_latents + self.mask * latents


def _calls_of(work: DenoiseInputs, call: Call) -> list[Call]:
    """Return the calls of the denoiser in which the rows of a call are computed: one, or one for each row."""
    if work.family.rows_together or len(call.latents) == 1:
        return [call]
    return [_row_of(call, slice(at, at + 1)) for at in range(len(call.latents))]


def _row_of(call: Call, row: slice) -> Call:
    """Return the call that computes one row of a call."""
    return replace(
        call,
        latents=call.latents[row],
        condition={name: tensor[row] for name, tensor in call.condition.items()},
        extra=tuple(one[row] for one in call.extra),
        references=tuple(one[row] for one in call.references),
        control={name: tensor[row] for name, tensor in call.control.items()},
    )


def _inputs(work: DenoiseInputs, mask: LatentMask | None) -> tuple[torch.Tensor, ...]:
    """Return the inputs of the denoiser besides the latents, each with one row."""
    if work.image is not None:
        return (work.image.distribution.mode().to(work.dtype),)
    return (mask.mask, mask.masked_image_latents) if mask is not None and work.takes_mask else ()


def _first_latents(
    work: DenoiseInputs, timesteps: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, LatentMask | None]:
    """Return the latents of the first step. Random numbers are drawn in the order of diffusers' pipelines."""
    start, variation = work.start, work.variation or _identity
    if isinstance(start, Denoised):
        generator.set_state(start.generator_state)
        return start.latents, start.mask
    if start is None:
        drawn = torch.randn(work.shape, generator=generator, dtype=torch.float32).to(work.dtype).to(work.device)
        return work.sampler.initial_latents(variation(drawn)), None
    if start.mask is None:
        image_latents = (
            start.latents if start.latents is not None else _sample_latents(start.encoded[0], generator, work)
        )
        drawn = variation(_draw_from_generator(work, generator))
        return work.sampler.add_noise(image_latents, drawn, timesteps[:1]), None
    image_latents = None
    full_strength = start.strength == 1
    if work.extra_input_channels != "mask" or not full_strength:
        # Contiguous, as diffusers has them here: convolutions compute other bits for channels-last latents.
        image_latents = _sample_latents(start.encoded[0], generator, work).contiguous()
    if full_strength and work.variation is not None:
        # At full strength nothing of the picture remains. With a variation, a new generator draws the noise, as for
        # text-to-image. Without one, diffusers' order applies: the generator may have drawn the picture's latents.
        fresh = variation(noise.draw_seeded_noise(work.shape, work.seed, work.dtype, work.device))
    else:
        fresh = variation(_draw_from_generator(work, generator))
    latents = work.sampler.initial_latents(fresh)
    if not full_strength:
        assert image_latents is not None
        latents = work.sampler.add_noise(image_latents, fresh, timesteps[:1])
    scale = work.family.latents.vae_scale_factor
    mask = pictures.binary_mask(start.mask, scale)
    per_pixel = work.extra_input_channels == "pixel_mask"
    mask = F.pixel_unshuffle(mask, scale) if per_pixel else F.interpolate(mask, size=work.shape[-2:])
    masked = _sample_latents(start.encoded[1], generator, work)
    return latents, LatentMask(mask.to(device=work.device, dtype=work.dtype), masked, image_latents, fresh)


def _identity(values: torch.Tensor) -> torch.Tensor:
    return values


def _draw_from_generator(work: DenoiseInputs, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(work.shape, generator=generator, dtype=work.dtype).to(work.device)


def _sample_latents(encoded: EncodedPicture, generator: torch.Generator, work: DenoiseInputs) -> torch.Tensor:
    """Draw a picture's latents from the distribution that the VAE returned."""
    return _scaled(encoded.distribution.sample(generator), work)


def _scaled(latents: torch.Tensor, work: DenoiseInputs) -> torch.Tensor:
    """Return latents as the denoiser sees them, from those of the VAE."""
    latent_format = work.family.latents
    if latent_format.cast_first:
        latents = latents.to(work.dtype)
    return scale_latents(latent_format, latents).to(work.dtype)


def _control_call(control: BoundControlNet, work: DenoiseInputs, generator: torch.Generator) -> ControlCall:
    shown = work.model.control_input(work.family.latents, control.picture, generator)
    return ControlCall(shown.to(work.device), control.weight, control.guess_mode, control.union_type)


def _control_outputs(work: DenoiseInputs, control: BoundControlNet, how: ControlCall, call: Call) -> Tensors:
    """Return what a ControlNet adds in this call."""
    call = replace(call, control={}, extra=(), references=())
    if not control.prompt_only and not work.family.control_reads_prompt_only:
        return work.model.control(control.net, work.denoiser, call, how)
    added = work.model.control(control.net, work.denoiser, _row_of(call, work.guidance.prompt_row), how)
    return change_each(added, work.guidance.pad_to_rows if control.prompt_only else work.guidance.repeat_latents)


def _add_outputs(one: Tensors, other: Tensors) -> Tensors:
    """Return the sums of what ControlNets add in each place. Places that share a tensor share the sum."""
    sums: dict[tuple[int, int], torch.Tensor] = {}
    out = dict(one)
    for name, added in other.items():
        before = one.get(name)
        if before is None:
            out[name] = added
            continue
        pair = id(before), id(added)
        if pair not in sums:
            sums[pair] = before + added
        out[name] = sums[pair]
    return out
