"""Draws one image: runs its stages in order. Each stage leases only the components that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image as PILImage
from torch import nn

from safelight.boundary import pictures
from safelight.boundary.pictures import EncodedPicture, PointDistribution
from safelight.catalog.model import Model
from safelight.errors import NotFiniteError
from safelight.families.family_model import Reference
from safelight.memory.lease import Lease
from safelight.pipeline import noise, preprocess, upscale
from safelight.pipeline.canvas import make_canvas, resize_for_control
from safelight.pipeline.checks import added as extension_checks
from safelight.pipeline.checks import latents as latent_checks
from safelight.pipeline.components import component_keys
from safelight.pipeline.denoise import Denoised, Start
from safelight.pipeline.model_stages import ControlPicture, ModelStages, Pass
from safelight.pipeline.resources import TORCH_DTYPES, Resources
from safelight.pipeline.sizes import enlarged
from safelight.pipeline.stages import Clock, Task
from safelight.request.adapters import Control
from safelight.request.job import Job
from safelight.request.results import OnProgress, Preview, Progress, Repair, Stage
from safelight.request.steps import computed_steps
from safelight.resolve.check import with_effective_strength

WIDER = {"fp16": "fp32", "bf16": "fp32"}
"""The dtype in which a VAE computes again after NaN or infinity."""

TILED_ABOVE = 1536 * 1536
"""An image with more pixels is decoded in tiles, unless the request sets ``tile``. Free memory has no influence."""

TILE = 768
"""Pixels per side of such a tile."""

Result = TypeVar("Result")


class ImagePipeline:
    """Draws one image of a job.

    ``model``: the job's model with its adapters, ControlNets and replaced components.
    ``refiner``: the model that computes the last steps; None without one.
    ``index``: the number of the image in its job, for progress.

    :meth:`draw` draws. Afterwards, the attributes ``marks``, ``warnings`` and ``repairs`` contain what was noticed, and
    ``run_settings`` the settings that were used.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        refiner: Model | None,
        resources: Resources,
        index: int,
        on_progress: OnProgress,
    ) -> None:
        request = job.request
        self.job = job
        self.request = request
        self.model = model
        self.resources = resources
        self.run_settings = resources.run_settings
        self.marks: list[str] = []
        self.warnings: list[str] = []
        self.repairs: list[Repair] = []
        self.clock = Clock()
        self._index = index
        self._on_progress = on_progress
        self._denoised: Denoised | None = None
        self.skipped_calls = 0
        self._refiner_stages: ModelStages | None = None
        if refiner is not None:
            refiner = _with_vae_of(model, refiner)
            self._refiner_stages = ModelStages(job, refiner, resources, self.clock, self.repairs)
            resources = replace(
                resources, upcoming=(*component_keys(refiner, resources.run_settings), *resources.upcoming)
            )
        self._model_stages = ModelStages(job, model, resources, self.clock, self.repairs)
        self._device = resources.device.torch
        self._family = model.family
        # The metadata records the user's request, not this computed one.
        self._effective_request = with_effective_strength(request, model)
        self.width = request.width or model.resolution
        self.height = request.height or model.resolution
        self._canvas = make_canvas(request, resources.inputs, self.width, self.height)
        self._references = [Reference(digest, resources.inputs.open(digest)) for digest in request.references]
        self._vae_digest = model.manifest.component(model.family.vae).digest
        multiple = model.family.latents.multiple
        large = (
            enlarged(self.width, request.hires_scale, multiple),
            enlarged(self.height, request.hires_scale, multiple),
        )
        self._final = large if request.hires_scale > 1 else (self.width, self.height)
        large_enough = self._final[0] * self._final[1] > TILED_ABOVE
        by_rule = TILE if large_enough and not request.seamless else 0
        self.tile = by_rule if request.tile is None else request.tile
        self._variation: noise.Variation | None = None
        if request.variation_strength:
            self._variation = noise.Variation(request.variation_seed, request.variation_strength)

    def draw(self) -> torch.Tensor:
        """Make the image. Returns uint8 (h, w, 3), in host memory."""
        self._report("switch", 0, 1)
        first, size = self._first_pass(), self.width * self.height
        conditions = self._model_stages.conditions(size, self._references)
        self.warnings += self._model_stages.warnings
        refiner_conditions = conditions
        if self._refiner_stages is not None:
            refiner_conditions = self._refiner_stages.conditions(size, self._references)
        self._report("encode", 1, 1)
        for this_pass in self._passes(first):
            model = self._refiner_stages if this_pass.refines else self._model_stages
            assert model is not None
            controls = () if this_pass.refines else self._control_pictures(this_pass)
            variation = self._variation if not isinstance(this_pass.start, Denoised) else None
            on_call = partial(self._after_call, this_pass)
            self._denoised = model.denoise(
                this_pass, refiner_conditions if this_pass.refines else conditions, controls, variation, on_call
            )
            self.skipped_calls += self._denoised.skipped
        self._report("decode", 0, 1)
        pixels = self._decode_and_check(self._result().latents)
        self._report("decode", 1, 1)
        return pixels if self._canvas is None else self._canvas.paste(pixels)

    def _passes(self, first: Pass) -> Iterator[Pass]:
        """Return the runs of the denoising loop, in order. A run may start from the result of the run before."""
        last = first
        if self.request.hires_scale > 1:
            yield first
            last = self._hires_pass(self._result().latents, first)
        if self._refiner_stages is None:
            yield last
            return
        share, total_calls = self.request.refiner_start, self._model_stages.count_denoiser_calls(last)
        calls_before_refiner = self._model_stages.count_denoiser_calls(replace(last, denoising_range=(0.0, share)))
        if calls_before_refiner == total_calls:
            self.warnings.append(f"refiner_start {share:g} leaves no step for the refiner; it was not used")
            yield last
        elif not calls_before_refiner:
            # The picture has less noise than the refiner starts with: all steps are the refiner's.
            yield replace(last, refines=True)
        else:
            share_of_calls = calls_before_refiner / total_calls
            model_steps = max(1, min(last.steps_to_run - 1, round(share_of_calls * last.steps_to_run)))
            refiner_steps = max(1, last.steps_to_run - model_steps)
            yield replace(
                last, denoising_range=(0.0, share), steps_to_run=model_steps, total_denoiser_calls=total_calls
            )
            first_refiner_step = last.earlier_steps + last.steps_to_run - refiner_steps
            denoising_range = (share, 1.0)
            yield replace(
                last,
                start=self._result(),
                denoising_range=denoising_range,
                steps_to_run=refiner_steps,
                earlier_steps=first_refiner_step,
                refines=True,
            )

    def _result(self) -> Denoised:
        """Return the result of the last run of the loop."""
        assert self._denoised is not None
        return self._denoised

    def _first_pass(self) -> Pass:
        given, steps = self._canvas, self._effective_request.first_pass_steps
        from_noise = Pass(
            self.width,
            self.height,
            None,
            self.request.step_count,
            steps,
            references=self._encoded_references(),
        )
        if given is None:
            return from_noise
        start = self._start(given.picture, given.mask, self.request.strength, self.model.roles)
        if self._model_stages.extra_input_channels == "image":
            return replace(from_noise, image=start.encoded[0])
        return replace(from_noise, start=start)

    def _encoded_references(self) -> list[EncodedPicture]:
        """Encode the reference images, and warn about those that the model does not see in their own size."""
        how = self._family.references_of(self.model.variant)
        if how is None or not self._references:
            return []
        prepared: list[Any] = []
        for number, (_, picture) in enumerate(self._references, 1):
            prepared.append(self._model_stages.family_model.prepare_reference(picture, how.size(picture.size)))
            if prepared[-1].size != picture.size:
                sizes = [f"{width}x{height}" for width, height in (prepared[-1].size, picture.size)]
                self.warnings.append(f"references: the model sees picture {number} at {sizes[0]}, not {sizes[1]}")
        encode = self._model_stages.family_model.encode_reference
        return self._encode_each(prepared, self.model.roles, encode)

    def _hires_pass(self, denoised: torch.Tensor, first: Pass) -> Pass:
        """Return the second pass of the hires fix, which starts from the enlarged result of the first."""
        request, (width, height) = self.request, self._final
        if request.hires_upscaler in upscale.LATENT:
            scale, patch = self._family.latents.vae_scale_factor, self._family.latents.patch
            larger = upscale.resize_latents(denoised, width // scale, height // scale, request.hires_upscaler, patch)
            start = Start(request.hires_strength, latents=larger)
        else:
            drawn = PILImage.fromarray(self._decode_and_check(denoised).numpy())
            picture = upscale.resize_picture(drawn, width, height, request.hires_upscaler)
            following = self._from_denoiser()
            start = self._start(picture, None, request.hires_strength, following)
        steps = request.hires_steps or request.step_count
        return replace(
            first,
            width=width,
            height=height,
            start=start,
            steps=steps,
            steps_to_run=int(steps * request.hires_strength),
            earlier_steps=request.step_count,
        )

    def _start(self, picture: Any, mask: Any | None, strength: float, following: tuple[str, ...]) -> Start:
        """Encode a picture, and the masked picture if there is a mask, as the start of a pass.

        ``following``: see :class:`safelight.pipeline.stages.Task`.
        """

        def encode(vae: nn.Module) -> list[EncodedPicture]:
            model = self._model_stages.family_model
            return model.encode_picture(self._family.latents, vae, picture, mask, self._device, self.tile)

        forward_passes = 1 + (mask is not None)
        encoded = self._encode(encode, picture.width * picture.height, forward_passes, following)
        return Start(strength, encoded=encoded, mask=mask)

    def _encode_each(
        self, given: Sequence[Any], following: tuple[str, ...], encode: Callable[..., EncodedPicture]
    ) -> list[EncodedPicture]:
        """Encode pictures. ``encode``: a method of the family's model. ``following``: as in :meth:`_encode`."""

        def encode_all(vae: nn.Module) -> list[EncodedPicture]:
            return [encode(self._family.latents, vae, picture, self._device, self.tile) for picture in given]

        largest = max(picture.width * picture.height for picture in given)
        return self._encode(encode_all, largest, len(given), following)

    def _encode(
        self,
        encode: Callable[[nn.Module], list[EncodedPicture]],
        pixels: int,
        forward_passes: int,
        following: tuple[str, ...],
    ) -> list[EncodedPicture]:
        """Encode pictures with the VAE.

        ``encode``: encodes them with the bound VAE.
        ``pixels``: of the largest picture.
        ``following``: see :class:`safelight.pipeline.stages.Task`.
        """

        def encode_in(dtype_name: str) -> list[EncodedPicture]:
            task = self._vae_task("encode", pixels, "-encoder", forward_passes, following)
            found = self._with_vae(task, dtype_name, lambda modules, _: encode(modules[0]))
            with self.clock.gates():
                for one in found:
                    latent_checks.require_finite(one.values, "the VAE, encoding,", dtype_name)
            return found

        found = self._run_vae_with_fp32_fallback(encode_in)
        if self._family.variants[self.model.variant].draws_latents:
            return found
        return [replace(one, distribution=PointDistribution(one.distribution.mode())) for one in found]

    def _from_denoiser(self) -> tuple[str, ...]:
        """Return the roles of the denoiser and of the components after it."""
        return self.model.roles[self.model.roles.index(self._family.denoiser) :]

    def _report(self, stage: Stage, step: int, steps: int, preview: Preview | None = None) -> None:
        memory = self.resources.report() if stage in ("switch", "encode") or step == 1 else None
        self._on_progress(Progress(stage, self._index, step, steps, memory, preview))

    def _control_pictures(self, this_pass: Pass) -> list[tuple[Control, ControlPicture]]:
        """Return the ControlNets, each with its picture.

        Each picture is cropped, resized to the size of the pass, preprocessed, and encoded for a ControlNet that reads
        latents.
        """

        def prepared(control: Control) -> PILImage.Image:
            picture = self.resources.inputs.open(control.image)
            picture = picture if self._canvas is None else self._canvas.crop(picture)
            return preprocess.preprocess(
                resize_for_control(picture, (this_pass.width, this_pass.height), control.resize_mode), control
            )

        shown: list[ControlPicture] = [prepared(control) for control in self.request.controls]
        of_latents = [at for at, net in enumerate(self._model_stages.nets) if net.config.reads_latents]
        if of_latents:
            following = self._from_denoiser()
            encode = self._model_stages.family_model.encode_control_picture
            encoded = self._encode_each([shown[at] for at in of_latents], following, encode)
            for at, picture in zip(of_latents, encoded, strict=True):
                shown[at] = picture
        return list(zip(self.request.controls, shown, strict=True))

    def _after_call(self, this_pass: Pass, call: int, calls: int, values: torch.Tensor, sigma: float) -> None:
        """Check the latents after call number ``call`` (from 0) of the denoiser, and report progress.

        ``calls``: the number of calls in this pass. It is larger than the number of steps if the sampler calls the
        denoiser twice in a step.
        Raises NotFiniteError for NaN or infinity. Marks the image if latents are larger than noise can be.
        """
        step = this_pass.earlier_steps + call * this_pass.steps_to_run // calls + 1
        latent_format = self._family.latents
        with self.clock.gates():
            highest = latent_checks.require_finite(values, f"the denoiser, at step {step},", self.run_settings.dtype)
            allowed = latent_checks.largest_allowed(sigma, latent_format.suspicious_above)
            if highest > allowed and not self.marks:
                self.marks.append(f"latents reached {highest:.0f} at step {step}; at most {allowed:.0f} is plausible")
        previews = self.resources.previews
        shown = upscale.lay_out_patches(values, latent_format.patch)
        preview = None if previews is None else previews.of(self._vae_digest, shown, latent_format.latent_rgb_factors)
        self._report("denoise", step, computed_steps(self._effective_request), preview)

    def _decode_and_check(self, values: torch.Tensor) -> torch.Tensor:
        decoded = self._run_vae_with_fp32_fallback(lambda dtype_name: self._decode_latents(values, dtype_name))
        pixels = pictures.to_pixels(decoded)[0]

        def again() -> torch.Tensor:
            return pictures.to_pixels(
                self._run_vae_with_fp32_fallback(lambda dtype_name: self._decode_latents(values, dtype_name))
            )[0]

        # Check and previews fit maps from the channels to colours, which grow with the square of their number.
        plain = upscale.lay_out_patches(values, self._family.latents.patch)
        with self.clock.gates():
            self.marks += self.resources.appearance_check.marks(self._vae_digest, plain, pixels, again)
            self.marks += extension_checks.marks(values, pixels)
        if self.resources.previews is not None:
            self.resources.previews.learn(self._vae_digest, plain, pixels)
        return pixels

    def _run_vae_with_fp32_fallback(self, compute: Callable[[str], Result]) -> Result:
        """Run the VAE in its dtype. If the result is not finite, run it again in fp32."""
        try:
            return compute(self.run_settings.vae_dtype)
        except NotFiniteError as error:
            if self.run_settings.vae_dtype not in WIDER:
                raise
            # A half-precision VAE overflows on some images (row ATTENTION 06 of docs/corruption.md).
            wider = WIDER[self.run_settings.vae_dtype]
            found = compute(wider)
            self.repairs.append(Repair("numbers", str(error), f"the VAE computed in {wider}"))
            self.run_settings = replace(self.run_settings, vae_dtype=wider)
            return found

    def _decode_latents(self, values: torch.Tensor, dtype_name: str) -> torch.Tensor:
        def compute(modules: list[nn.Module], _: list[Lease]) -> torch.Tensor:
            latent_format, decode = self._family.latents, self._model_stages.family_model.decode
            return decode(latent_format, modules[0], values.to(TORCH_DTYPES[dtype_name]), self.tile)

        size = values.shape[-1] * values.shape[-2] * self._family.latents.vae_scale_factor**2
        decoded = self._with_vae(self._vae_task("decode", size, "", 1), dtype_name, compute)
        with self.clock.gates():
            latent_checks.require_finite(decoded, "the VAE", dtype_name)
        return decoded

    def _vae_task(
        self, name: str, size: int, variant: str, forward_passes: int, following: tuple[str, ...] | None = None
    ) -> Task:
        """Return the task of a VAE call on ``size`` pixels. With tiling, the VAE sees one tile at a time."""
        pixels = min(size, self.tile**2) if self.tile else size
        variant += f"-by{self.tile}" if self.tile else ""
        # It pads copies of what its convolutions read.
        variant += "-seamless" if self.request.seamless else ""
        return Task(name, pixels, forward_passes, variant, following, self.request.seamless)

    def _with_vae(
        self, task: Task, dtype_name: str, compute: Callable[[list[nn.Module], list[Lease]], Result]
    ) -> Result:
        vae = self.model.manifest.component(self._family.vae)
        return self._model_stages.stages.run(task, self.run_settings, [(vae, TORCH_DTYPES[dtype_name])], compute)


def _with_vae_of(model: Model, refiner: Model) -> Model:
    """Return the refiner with the model's VAE, because only that one decodes."""
    vae = model.manifest.component(model.family.vae)
    parts = refiner.manifest.components
    own = refiner.family.vae
    components = tuple(replace(vae, role=own) if part.role == own else part for part in parts)
    return replace(refiner, manifest=replace(refiner.manifest, components=components))
