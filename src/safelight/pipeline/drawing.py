"""One image: its stages, one after another, each holding only what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image as PILImage
from torch import nn

from safelight.boundary import pictures
from safelight.boundary.pictures import EncodedPicture
from safelight.catalog.model import Model
from safelight.errors import NotFiniteError
from safelight.families.computing import PromptField, Tensors, computing
from safelight.families.family import CONTROLNET
from safelight.memory.lease import Lease
from safelight.pipeline import conditioning, guidance, noise, preprocess, samplers, upscale
from safelight.pipeline.canvas import canvas, shown
from safelight.pipeline.checks import added, latents
from safelight.pipeline.conditioning import Prompts, Reading
from safelight.pipeline.denoise import Conditions, Controlled, Denoising, Start, denoise
from safelight.pipeline.resources import TORCH_DTYPES, Resources
from safelight.pipeline.sizes import enlarged
from safelight.pipeline.stages import Clock, Stages, Task
from safelight.request.job import Job
from safelight.request.results import OnProgress, Preview, Progress, Repair, Stage
from safelight.resolve.check import as_computed

MOST_CALLS_A_STEP = 2
"""Samplers of second order call the UNet twice in a step."""

USUAL_ROWS = 2
"""Rows of a denoiser's call for which its memory is estimated. More rows count as more pixels."""

WIDER = {"fp16": "fp32", "bf16": "fp32"}
"""The dtype in which a VAE decodes again after NaN or infinity."""

TILED_ABOVE = 1536 * 1536
TILE = 768
"""Images of more pixels than that are decoded by squares of so many pixels a side, unless it is asked for otherwise:
by size, never by the memory that happens to be free."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Pass:
    """Denoising once: an image of ``width`` by ``height`` pixels from ``start`` (None: from noise), in ``steps`` of
    which ``done`` are computed. ``before``: steps that earlier passes computed. ``image``: the picture whose latents
    are inputs of the denoiser."""

    width: int
    height: int
    start: Start | None
    steps: int
    done: int
    before: int = 0
    image: EncodedPicture | None = None


class Drawing:
    """One image, by a model in the request's combination. ``asked``: the request for this image alone; ``index``: its
    number among the images of a job, which progress tells."""

    def __init__(self, job: Job, model: Model, resources: Resources, index: int, on_progress: OnProgress) -> None:
        request = job.request
        self.job = job
        self.request = request
        self.model = model
        self.resources = resources
        self.seed = request.seed
        self._index = index
        self._on_progress = on_progress
        self.run = resources.run
        self.marks: list[str] = []
        self._stages = Stages(model, resources)
        self._device = resources.device.torch
        self._family = model.family
        self._computing = computing(model.family)
        self._inputs = model.family.variants[model.variant].inputs
        kind = model.family.guidance_of(model.variant)
        self._guidance = guidance.of(kind, request.cfg, request.image_cfg)
        self._negative_too = guidance.READS_NEGATIVE[kind]
        # The recorded request stays as it was asked.
        self._computed = as_computed(request, model)
        self._dtype = TORCH_DTYPES[resources.run.dtype]
        self.width = request.width or model.resolution
        self.height = request.height or model.resolution
        self._canvas = canvas(request, resources.inputs, self.width, self.height)
        self._vae = model.manifest.component(model.family.vae).digest
        multiple = model.family.latents.multiple
        large = (
            enlarged(self.width, request.hires_scale, multiple),
            enlarged(self.height, request.hires_scale, multiple),
        )
        self._final = large if request.hires_scale > 1 else (self.width, self.height)
        large_enough = self._final[0] * self._final[1] > TILED_ABOVE
        by_rule = TILE if large_enough and not request.seamless else 0
        self.tile = by_rule if request.tile is None else request.tile
        self._vary: noise.Variation | None = None
        if request.variation_strength:
            self._vary = noise.Variation(request.variation_seed, request.variation_strength)

    @property
    def clock(self) -> Clock:
        return self._stages.clock

    @property
    def repairs(self) -> list[Repair]:
        return self._stages.repairs

    def pixels(self) -> torch.Tensor:
        """uint8 (h, w, 3), in host memory."""
        self._report("switch", 0, 1)
        first = self._first()
        prompts = Prompts.of(self._computed, self._family)
        encoded: dict[str, dict[PromptField, Tensors]] = {}
        for role in self._family.text_encoders:
            encoded[role] = self._encode(role, prompts)
        conditions = self._conditions(encoded, prompts)
        self._report("encode", 1, 1)
        denoised = self._denoise(conditions, first)
        if self.request.hires_scale > 1:
            denoised = self._denoise(conditions, self._again(denoised))
        self._report("decode", 0, 1)
        pixels = self._decode(denoised)
        self._report("decode", 1, 1)
        return pixels if self._canvas is None else self._canvas.put_back(pixels)

    def _first(self) -> Pass:
        given, steps = self._canvas, self._computed.first_steps
        from_noise = Pass(self.width, self.height, None, self.request.steps, steps)
        if given is None:
            return from_noise
        start = self._start(given.picture, given.mask, self.request.strength)
        if self._inputs == "image":
            return replace(from_noise, image=start.encoded[0])
        return replace(from_noise, start=start)

    def _again(self, denoised: torch.Tensor) -> Pass:
        """High-resolution fix: from what was drawn, enlarged."""
        request, (width, height) = self.request, self._final
        if request.hires_upscaler in upscale.LATENT:
            scale = self._family.latents.scale
            larger = upscale.latents(denoised, width // scale, height // scale, request.hires_upscaler)
            start = Start(request.hires_strength, latents=larger)
        else:
            drawn = PILImage.fromarray(self._decode(denoised).numpy())
            picture = upscale.picture(drawn, width, height, request.hires_upscaler)
            start = self._start(picture, None, request.hires_strength)
        steps = request.hires_steps or request.steps
        return Pass(width, height, start, steps, int(steps * request.hires_strength), request.steps)

    def _start(self, picture: Any, mask: Any | None, strength: float) -> Start:
        """A picture's latents."""

        def encoded(name: str) -> list[EncodedPicture]:
            def compute(modules: list[nn.Module], _: list[Lease]) -> list[EncodedPicture]:
                form = self._family.latents
                return self._computing.encode_picture(form, modules[0], picture, mask, self._device, self.tile)

            passes = 1 + (mask is not None)
            task = self._vae_task("encode", picture.width * picture.height, "-encoder", passes, first=True)
            found = self._with_vae(task, name, compute)
            with self.clock.gates():
                for one in found:
                    latents.finite(one.numbers, "the VAE, encoding,", name)
            return found

        return Start(strength, encoded=self._by_vae(encoded), mask=mask)

    def _report(self, stage: Stage, step: int, steps: int, preview: Preview | None = None) -> None:
        memory = self.resources.report() if stage in ("switch", "encode") or step == 1 else None
        self._on_progress(Progress(stage, self._index, step, steps, memory, preview))

    def _conditions(self, encoded: Mapping[str, Mapping[PromptField, Tensors]], prompts: Prompts) -> Conditions:
        """Join what the text encoders returned; all of it must be finite."""
        conditions = conditioning.conditions(self._family, encoded, prompts, self._negative_too)
        with self.clock.gates():
            for one in conditions.each:
                for tensor in (*one.positive.values(), *(one.negative or {}).values()):
                    latents.finite(tensor, "the text encoder", self.run.dtype)
        return conditions

    def _encode(self, role: str, prompts: Prompts) -> dict[PromptField, Tensors]:
        """Return what a text encoder makes of each text: from the cache, or computed."""
        cache = self.resources.conditionings
        component = self.model.manifest.component(role)
        reading = Reading(self._family, role, component, self.run, self.request, self.job.words or {})
        texts = prompts.texts
        if not self._negative_too:
            texts = [pair for pair in texts if pair[0] == "prompt"]
        inputs = reading.inputs(texts)
        keys = {pair: reading.key(one) for pair, one in inputs.each.items()}
        found = {key: cache.get(key) for key in set(keys.values())}
        lacking = {key for key, one in found.items() if one is None}
        if inputs.together and lacking:
            lacking = set(found)
        missing = {keys[pair]: one for pair, one in inputs.each.items() if keys[pair] in lacking}
        if missing:
            compute = partial(reading.encode, list(missing.values()), self._device)
            task = Task("encode", self.width * self.height, sum(one.passes for one in missing.values()))
            encoded = self._stages.run(task, self.run, [(component, self._dtype)], compute)
            for key, one in zip(missing, encoded, strict=True):
                cache.put(key, one)
                found[key] = one
        return {pair: self._on_device(found[key]) for pair, key in keys.items()}

    def _on_device(self, encoded: Tensors | None) -> Tensors:
        assert encoded is not None
        return {name: tensor.to(self._device) for name, tensor in encoded.items()}

    def _denoise(self, conditions: Conditions, drawn: Pass) -> torch.Tensor:
        request, model, form = self.request, self.model, self._family.latents
        shown = [self._shown(number, drawn) for number in range(len(request.controls))]

        def compute(modules: list[nn.Module], leases: list[Lease]) -> torch.Tensor:
            schedule = samplers.make(
                self._family,
                request.sampler,
                request.schedule,
                model.prediction_type,
                model.zero_terminal_snr,
                self.seed,
            )

            def on_step(step: int, values: torch.Tensor) -> None:
                with self.clock.gates():
                    self._passed(step, values, schedule.sigma)
                previews = self.resources.previews
                preview = None if previews is None else previews.of(self._vae, values, form.colours)
                at = drawn.before + min(step + 1, drawn.done)
                self._report("denoise", at, self._computed.steps_done, preview)
                for lease in leases:
                    lease.adjust()

            return denoise(
                Denoising(
                    self._family,
                    self._computing,
                    modules[0],
                    schedule,
                    conditions.between(drawn.before, drawn.before + drawn.done),
                    self._guidance,
                    drawn.steps,
                    self.seed,
                    (1, form.channels, drawn.height // form.scale, drawn.width // form.scale),
                    self._dtype,
                    self._device,
                    on_step,
                    drawn.start,
                    [self._control(number, net, shown[number]) for number, net in enumerate(modules[1:])],
                    self._inputs == "mask",
                    drawn.image,
                    self._vary,
                )
            )

        task = self._denoise_task(drawn)
        nets = [part for part in model.manifest.components if part.role == CONTROLNET]
        parts = [(part, self._dtype) for part in (model.manifest.component(self._family.denoiser), *nets)]
        return self._stages.run(task, self.run, parts, compute)

    def _denoise_task(self, drawn: Pass) -> Task:
        pixels, rows, what = drawn.width * drawn.height, len(self._guidance.rows), ""
        if rows > USUAL_ROWS:
            pixels, what = pixels * rows // USUAL_ROWS, f"-{rows}rows"
        return Task("denoise", pixels, MOST_CALLS_A_STEP * drawn.done, what, seamless=self.request.seamless)

    def _shown(self, number: int, drawn: Pass) -> PILImage.Image:
        """What a ControlNet is shown, in the size that is drawn."""
        control = self.request.controls[number]
        picture = self.resources.inputs.open(control.image)
        picture = picture if self._canvas is None else self._canvas.part(picture)
        return preprocess.made(shown(picture, (drawn.width, drawn.height), control.resize_mode), control)

    def _control(self, number: int, net: nn.Module, picture: PILImage.Image) -> Controlled:
        control = self.request.controls[number]
        return Controlled(
            net,
            picture,
            control.weight,
            control.start,
            control.end,
            soft=control.mode in ("more_prompt", "more_control"),
            prompt_only=control.mode in ("more_control", "unbalanced"),
        )

    def _passed(self, step: int, values: torch.Tensor, sigma: float) -> None:
        """The gate of a step: finite, else nothing more is computed; larger than noise can be, it is marked."""
        highest = latents.finite(values, f"the denoiser, at step {step + 1},", self.run.dtype)
        allowed = latents.allowed(sigma, self._family.latents.largest)
        if highest > allowed and not self.marks:
            self.marks.append(f"latents of {highest:.0f} at step {step + 1}, where at most {allowed:.0f} fit")

    def _decode(self, values: torch.Tensor) -> torch.Tensor:
        decoded = self._by_vae(lambda name: self._decoded(values, name))
        pixels = pictures.to_pixels(decoded)[0]

        def again() -> torch.Tensor:
            return pictures.to_pixels(self._by_vae(lambda name: self._decoded(values, name)))[0]

        with self.clock.gates():
            self.marks += self.resources.looks.marks(self._vae, values, pixels, again)
            self.marks += added.marks(values, pixels)
        if self.resources.previews is not None:
            self.resources.previews.learn(self._vae, values, pixels)
        return pixels

    def _by_vae(self, made: Callable[[str], Result]) -> Result:
        """What the VAE makes in its dtype; when that is not finite, in a wider one."""
        try:
            return made(self.run.vae_dtype)
        except NotFiniteError as error:
            if self.run.vae_dtype not in WIDER:
                raise
            # A half-precision VAE overflows on some images (ATTENTION 06); a wider dtype has the room.
            wider = WIDER[self.run.vae_dtype]
            found = made(wider)
            self.repairs.append(Repair("numbers", str(error), f"decoded in {wider}"))
            self.run = replace(self.run, vae_dtype=wider)
            return found

    def _decoded(self, values: torch.Tensor, name: str) -> torch.Tensor:
        def compute(modules: list[nn.Module], _: list[Lease]) -> torch.Tensor:
            form = self._family.latents
            return self._computing.decode(form, modules[0], values.to(TORCH_DTYPES[name]), self.tile)

        size = values.shape[-1] * values.shape[-2] * self._family.latents.scale**2
        decoded = self._with_vae(self._vae_task("decode", size, "", 1), name, compute)
        with self.clock.gates():
            latents.finite(decoded, "the VAE", name)
        return decoded

    def _vae_task(self, name: str, size: int, what: str, passes: int, first: bool = False) -> Task:
        """Of ``size`` pixels; by squares it is shown one at a time."""
        pixels = min(size, self.tile**2) if self.tile else size
        what += f"-by{self.tile}" if self.tile else ""
        return Task(name, pixels, passes, what, first, self.request.seamless)

    def _with_vae(self, task: Task, name: str, compute: Callable[[list[nn.Module], list[Lease]], Result]) -> Result:
        vae = self.model.manifest.component(self._family.vae)
        return self._stages.run(task, self.run, [(vae, TORCH_DTYPES[name])], compute)
