"""The stages of one model in an image: its text encoders, and its denoiser. An image with a refiner has two models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image as PILImage
from torch import nn

from safelight.boundary.pictures import EncodedPicture, resize
from safelight.catalog.model import Model
from safelight.families.family import CONTROLNET, ExtraInputChannels
from safelight.families.family_model import PromptText, Reference, Tensors, TextInput, family_model
from safelight.memory.lease import Lease
from safelight.pipeline import conditioning, guidance, noise, samplers
from safelight.pipeline.checks import latents as latent_checks
from safelight.pipeline.conditioning import Prompts, TextEncoderCall, TextOutputs
from safelight.pipeline.denoise import BoundControlNet, ConditionsByStep, Denoised, DenoiseInputs, Start, denoise
from safelight.pipeline.resources import Resources, dtype_of
from safelight.pipeline.samplers import WHOLE, SamplerRun
from safelight.pipeline.stages import Clock, Stages, Task
from safelight.request.adapters import Control, Purpose
from safelight.request.job import Job
from safelight.request.results import Repair
from safelight.resolve.check import with_effective_strength
from safelight.weights.manifest import ComponentManifest

MAX_CALLS_PER_STEP = 2
"""Samplers of second order call the denoiser twice in a step."""

ASSUMED_ROWS = 2
"""Rows per denoiser call that the memory estimate assumes. A call with more rows is estimated as proportionally more
pixels."""

TOKENS_MEASURED = 256
"""The memory of a text with reference images is measured for multiples of this many tokens."""

MOST_CUT_SHOWN = 80
"""Characters of the part of a prompt that was cut off that a warning shows."""

ControlPicture = PILImage.Image | EncodedPicture
"""A ControlNet's picture; encoded for one that reads latents."""

OnCall = Callable[[int, int, torch.Tensor, float], None]
"""Called after each call of the denoiser with its index (from 0), the number of calls, the latents, and the noise
level."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the denoising loop.

    ``width``, ``height``: pixels.
    ``start``: what it starts from; None for noise.
    ``steps``: length of the schedule.
    ``steps_to_run``: how many of these steps this pass runs.
    ``earlier_steps``: steps of the image that earlier passes ran.
    ``denoising_range``: the range of noise levels; see :meth:`safelight.pipeline.samplers.SamplerRun.begin`.
    ``total_denoiser_calls``: denoiser calls of model and refiner together. A ControlNet's ``start`` and ``end`` are
    fractions of this number. 0 (no refiner follows): use this pass's own number of calls. The refiner's pass has no
    ControlNets.
    ``image``: the picture whose latents are inputs of the denoiser.
    ``references``: the encoded reference images.
    ``refines``: the refiner computes it.
    """

    width: int
    height: int
    start: Start | Denoised | None
    steps: int
    steps_to_run: int
    earlier_steps: int = 0
    denoising_range: tuple[float, float] = WHOLE
    total_denoiser_calls: int = 0
    image: EncodedPicture | None = None
    references: Sequence[EncodedPicture] = ()
    refines: bool = False


class ModelStages:
    """Runs the text encoders and the denoiser of one model.

    ``repairs``: the image's list, to which repairs are added.

    The attribute ``extra_input_channels`` says what the denoiser reads besides the latents. ``warnings`` says which
    ends of prompts were cut off.
    """

    def __init__(self, job: Job, model: Model, resources: Resources, clock: Clock, repairs: list[Repair]) -> None:
        request = job.request
        self.model = model
        self.family = model.family
        self.stages = Stages(model, resources, clock, repairs)
        self.family_model = family_model(model.family)
        self.extra_input_channels: ExtraInputChannels = model.family.variants[model.variant].extra_input_channels
        self._job = job
        self._request = request
        self._resources = resources
        self._run_settings = resources.run_settings
        self._dtype = dtype_of(resources.run_settings, model.family, model.family.denoiser)
        self._device = resources.device.torch
        kind = model.family.guidance_of(model.variant)
        self._guidance = guidance.make_guidance(
            kind, request.guidance_scale, request.image_cfg, request.guidance, model.family.latents.token_patch
        )
        self._negative_too = guidance.READS_NEGATIVE[kind]
        self.warnings: list[str] = []

    @property
    def nets(self) -> list[ComponentManifest]:
        """The ControlNets of the model, in the order of the request."""
        return [part for part in self.model.manifest.components if part.role == CONTROLNET]

    def conditions(self, pixels: int, references: Sequence[Reference] = ()) -> ConditionsByStep:
        """Encode the prompts of all steps.

        ``pixels``: of the image, for the estimate of the working memory.
        ``references``: the reference images, which some text encoders see.
        Raises NotFiniteError if an embedding has NaN or infinity.
        """
        prompts = Prompts.of(with_effective_strength(self._request, self.model), self.family)
        texts = [text for text in prompts.texts if text.field == "prompt" or self._negative_too]
        encoded: dict[str, dict[PromptText, Tensors]] = {}
        for role in self.family.text_encoders:
            call = self._text_encoder_call(role, self._shown(references))
            outputs = TextOutputs(call, texts, self._resources.embedding_cache)
            self.warnings += [
                f"{field}: {role} takes no more tokens; cut off: {cut[:MOST_CUT_SHOWN]!r}"
                for (field, _), cut in outputs.cut.items()
            ]
            if outputs.missing:
                inputs = list(outputs.missing.values())
                read = [encoded[call.source.role][text] for text in outputs.missing_texts] if call.source else []
                compute = partial(call.encode, inputs, self._device, self._see(call), read)
                parts = [(call.component, dtype_of(self._run_settings, self.family, role))]
                outputs.add(self.stages.run(_text_task(call, inputs, pixels), self._run_settings, parts, compute))
            encoded[role] = outputs.on(self._device)
        found = conditioning.conditions(self.family, encoded, prompts, self._negative_too)
        with self.stages.clock.gates():
            for one in found.distinct:
                for tensor in (*one.positive.values(), *(one.negative or {}).values()):
                    latent_checks.require_finite(tensor, "the text encoder", self._run_settings.dtype)
        return found

    def _shown(self, references: Sequence[Reference]) -> list[Reference]:
        """Return the reference images as the vision encoder sees them; none if there is no vision encoder."""
        how = self.family.references_of(self.model.variant)
        if how is None or how.vision_size is None:
            return []
        return [Reference(digest, resize(one, how.vision_size(one.size))) for digest, one in references]

    def _text_encoder_call(self, role: str, shown: Sequence[Reference]) -> TextEncoderCall:
        """Return the call of a text encoder. ``shown``: the reference images that the vision encoder sees for it."""
        model = self.model
        eyes = [one for one in model.roles if self.family.purpose(one) is Purpose.VISION_ENCODER]
        source = self.family.component(role).reads
        return TextEncoderCall(
            self.family,
            model.variant,
            role,
            model.manifest.component(role),
            self._run_settings,
            self._request,
            self._job.words or {},
            shown,
            model.manifest.component(eyes[0]) if shown else None,
            model.manifest.component(source) if source else None,
        )

    def _see(self, call: TextEncoderCall) -> Tensors:
        """Run the vision encoder for a call of a text encoder. Returns nothing if it sees no reference images."""
        if call.vision is None:
            return {}
        task = Task("encode", sum(picture.width * picture.height for _, picture in call.references), 1)
        parts = [(call.vision, dtype_of(self._run_settings, self.family, call.vision.role))]
        return self.stages.run(task, self._run_settings, parts, partial(call.see, self._device))

    def count_denoiser_calls(self, this_pass: Pass) -> int:
        """Return how often a pass calls the denoiser."""
        strength = this_pass.start.strength if isinstance(this_pass.start, Start) else None
        sampler = self._sampler_run(this_pass)
        return len(sampler.begin(this_pass.steps, torch.device("cpu"), strength, this_pass.denoising_range))

    def denoise(
        self,
        this_pass: Pass,
        conditions: ConditionsByStep,
        controls: Sequence[tuple[Control, ControlPicture]],
        variation: noise.Variation | None,
        on_call: OnCall,
    ) -> Denoised:
        """Run the denoising loop. ``controls``: the ControlNets of the model, each with its picture."""
        latent_format = self.family.latents

        def compute(modules: list[nn.Module], leases: list[Lease]) -> Denoised:
            sampler = self._sampler_run(this_pass)

            def after(call: int, values: torch.Tensor) -> None:
                on_call(call, sampler.calls, values, sampler.sigma)
                for lease in leases:
                    lease.adjust()

            return denoise(
                DenoiseInputs(
                    self.family,
                    self.family_model,
                    modules[0],
                    sampler,
                    conditions.between(this_pass.earlier_steps, this_pass.earlier_steps + this_pass.steps_to_run),
                    self._guidance,
                    this_pass.steps,
                    self._request.seed,
                    (
                        1,
                        latent_format.channels,
                        this_pass.height // latent_format.vae_scale_factor,
                        this_pass.width // latent_format.vae_scale_factor,
                    ),
                    torch.float32 if latent_format.fp32 else self._dtype,
                    self._device,
                    after,
                    this_pass.start,
                    [_bound_control_net(net, *each) for net, each in zip(modules[1:], controls, strict=True)],
                    self.extra_input_channels,
                    this_pass.image,
                    this_pass.references,
                    variation,
                    this_pass.denoising_range,
                    this_pass.total_denoiser_calls,
                    self._request.first_block_cache,
                )
            )

        parts = [(part, self._dtype) for part in (self.model.manifest.component(self.family.denoiser), *self.nets)]
        return self.stages.run(self._task(this_pass), self._run_settings, parts, compute)

    def _sampler_run(self, this_pass: Pass) -> SamplerRun:
        request, model = self._request, self.model
        noise = self.family.noise_of(model.variant).with_shift(request.shift)
        multiple = self.family.latents.multiple
        tokens = (this_pass.width // multiple) * (this_pass.height // multiple)
        return samplers.make(
            noise,
            request.sampler_name,
            request.schedule_name,
            model.prediction_type,
            model.zero_terminal_snr,
            request.seed,
            self.family_model.flow_levels,
            None if noise.mu is None else noise.mu(tokens, this_pass.steps),
        )

    def _task(self, this_pass: Pass) -> Task:
        pixels, rows, variant = this_pass.width * this_pass.height, len(self._guidance.rows), ""
        pixels += sum(one.shown.shape[-1] * one.shown.shape[-2] for one in this_pass.references)
        if rows > ASSUMED_ROWS:
            pixels, variant = pixels * rows // ASSUMED_ROWS, f"-{rows}rows"
        # Both need memory of their own.
        variant += "-seamless" if self._request.seamless else ""
        variant += "-cached" if self._request.first_block_cache else ""
        return Task(
            "denoise", pixels, MAX_CALLS_PER_STEP * this_pass.steps_to_run, variant, seamless=self._request.seamless
        )


def _text_task(call: TextEncoderCall, inputs: Sequence[TextInput], pixels: int) -> Task:
    """Return the task of running a text encoder on each input. ``pixels``: of the image."""
    tokens = -(-max(one.tokens for one in inputs) // TOKENS_MEASURED) * TOKENS_MEASURED
    passes = sum(one.forward_passes for one in inputs)
    return Task("encode", pixels, passes, "-references" if call.references else "", tokens=tokens)


def _bound_control_net(net: nn.Module, control: Control, picture: ControlPicture) -> BoundControlNet:
    return BoundControlNet(
        net,
        picture,
        control.weight,
        control.start,
        control.end,
        guess_mode=control.mode in ("more_prompt", "more_control"),
        prompt_only=control.mode in ("more_control", "unbalanced"),
        union_type=control.union_type,
    )
