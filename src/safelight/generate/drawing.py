"""One image: its stages, one after another, each holding only what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from PIL import Image as PILImage
from torch import nn

from safelight.adapters import preprocess
from safelight.arch.diffusers_fence import pictures, sampling
from safelight.arch.diffusers_fence.steering import Conditions, Controlled
from safelight.errors import NotFiniteError
from safelight.formats.layout import BASES, CONTROLNET, LATENT_SCALE
from safelight.gates import latents
from safelight.generate import conditioning, enlarge, noise, samplers
from safelight.generate.bench import TORCH_DTYPES, Bench
from safelight.generate.canvas import canvas, shown
from safelight.generate.conditioning import Encoded, Prompts, Reading
from safelight.generate.sizes import enlarged
from safelight.generate.stages import Clock, Stages, Task
from safelight.library.chosen import Settled
from safelight.library.model import Model
from safelight.memory.lease import Lease
from safelight.request.results import OnProgress, Preview, Progress, Repair, Stage

MOST_CALLS_A_STEP = 2
"""Samplers of second order call the UNet twice in a step."""

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
    which ``done`` are computed. ``before``: steps that earlier passes computed."""

    width: int
    height: int
    start: sampling.Start | None
    steps: int
    done: int
    before: int = 0


class Drawing:
    """One image, by a model in the request's combination. ``asked``: the request for this image alone; ``index``: its
    number among the images of a job, which progress tells."""

    def __init__(self, asked: Settled, model: Model, bench: Bench, index: int, on_progress: OnProgress) -> None:
        request = asked.request
        self.asked = asked
        self.request = request
        self.model = model
        self.bench = bench
        self.seed = request.seed
        self._index = index
        self._on_progress = on_progress
        self.run = bench.run
        self.marks: list[str] = []
        self._stages = Stages(model, bench)
        self._device = bench.device.torch
        self._dtype = TORCH_DTYPES[bench.run.dtype]
        self.width = request.width or model.resolution
        self.height = request.height or model.resolution
        self._canvas = canvas(request, bench.inputs, self.width, self.height)
        self._vae = model.manifest.component("vae").digest
        large = enlarged(self.width, request.hires_scale), enlarged(self.height, request.hires_scale)
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
        given = self._canvas
        start = None if given is None else self._start(given.picture, given.mask, self.request.strength)
        conditions = self._encode()
        self._report("encode", 1, 1)
        first = Pass(self.width, self.height, start, self.request.steps, self.request.first_steps)
        denoised = self._denoise(conditions, first)
        if self.request.hires_scale > 1:
            denoised = self._denoise(conditions, self._again(denoised))
        self._report("decode", 0, 1)
        pixels = self._decode(denoised)
        self._report("decode", 1, 1)
        return pixels if given is None else given.put_back(pixels)

    def _again(self, denoised: torch.Tensor) -> Pass:
        """High-resolution fix: from what was drawn, enlarged."""
        request, (width, height) = self.request, self._final
        if request.hires_upscaler in enlarge.LATENT:
            larger = enlarge.latents(denoised, width // LATENT_SCALE, height // LATENT_SCALE, request.hires_upscaler)
            start = sampling.Start(larger, None, (), request.hires_strength)
        else:
            drawn = PILImage.fromarray(self._decode(denoised).numpy())
            picture = enlarge.picture(drawn, width, height, request.hires_upscaler)
            start = self._start(picture, None, request.hires_strength)
        steps = request.hires_steps or request.steps
        return Pass(width, height, start, steps, int(steps * request.hires_strength), request.steps)

    def _start(self, picture: Any, mask: Any | None, strength: float) -> sampling.Start:
        """A picture's latents."""

        def encoded(name: str) -> list[pictures.Encoded]:
            def compute(modules: list[nn.Module], _: list[Lease]) -> list[pictures.Encoded]:
                return pictures.encode_picture(modules[0], picture, mask, self._device, self.tile)

            passes = 1 + (mask is not None)
            task = self._vae_task("encode", picture.width * picture.height, "-encoder", passes, first=True)
            found = self._with_vae(task, name, compute)
            with self.clock.gates():
                for one in found:
                    latents.finite(one.numbers, "the VAE, encoding,", name)
            return found

        return sampling.Start(picture, mask, self._by_vae(encoded), strength)

    def _report(self, stage: Stage, step: int, steps: int, preview: Preview | None = None) -> None:
        memory = self.bench.report() if stage in ("switch", "encode") or step == 1 else None
        self._on_progress(Progress(stage, self._index, step, steps, memory, preview))

    def _encode(self) -> Conditions:
        prompts = Prompts.of(self.request)
        encoded: dict[str, Mapping[tuple[str, str], Encoded]] = {}
        for role in BASES[self.model.base].roles:
            if role.startswith("text_encoder"):
                encoded[role] = self._encoded(role, prompts)
        conditions = conditioning.assemble(self.model.base, encoded, prompts)
        with self.clock.gates():
            for told in conditions.each:
                for tensor in told.values():
                    latents.finite(tensor, "the text encoder", self.run.dtype)
        return conditions

    def _encoded(self, role: str, prompts: Prompts) -> dict[tuple[str, str], Encoded]:
        """What a text encoder makes of each text: what is kept of it, and the rest computed."""
        request, base, kept = self.request, self.model.base, self.bench.conditionings
        component = self.model.manifest.component(role)
        words = self.asked.words
        texts = conditioning.texts_of(base, role, request, prompts, words)
        among = tuple(text for _, text in texts) if request.prompt_syntax == "compel" else ()
        reading = Reading(base, role, component, self.run, request.clip_skip, words, request.prompt_syntax, among)
        keys = {pair: reading.key(text) for pair, text in texts.items()}
        found = {key: kept.get(key) for key in set(keys.values())}
        lacking = [key for key, one in found.items() if one is None]
        # Where each is made as long as the longest, all are made together.
        wanted = set(found) if among and lacking else set(lacking)
        missing = {keys[pair]: text for pair, text in texts.items() if keys[pair] in wanted}
        if missing:

            def compute(modules: list[nn.Module], _: list[Lease]) -> list[Encoded]:
                return reading.encoded(modules[0], list(missing.values()), self._device)

            passes = sum(len(text) if not isinstance(text, str) else 1 for text in missing.values())
            task = Task("encode", self.width * self.height, passes)
            made = self._stages.run(task, self.run, [(component, self._dtype)], compute)
            for key, one in zip(missing, made, strict=True):
                kept.put(key, one)
                found[key] = one
        moved: dict[tuple[str, str], Encoded] = {}
        for pair, key in keys.items():
            one = found[key]
            assert one is not None
            moved[pair] = one[0].to(self._device), None if one[1] is None else one[1].to(self._device)
        return moved

    def _denoise(self, conditions: Conditions, drawn: Pass) -> torch.Tensor:
        request, model = self.request, self.model
        shape = (1, 4, drawn.height // LATENT_SCALE, drawn.width // LATENT_SCALE)
        seen = [self._shown(number, drawn) for number in range(len(request.controls))]

        def compute(modules: list[nn.Module], leases: list[Lease]) -> torch.Tensor:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            start, vary = drawn.start, self._vary
            more: dict[str, Any] = {}
            if start is None:
                fresh = torch.randn(shape, generator=generator, dtype=torch.float32).to(self._dtype).to(self._device)
                more["latents"] = fresh if vary is None else vary(fresh)
            elif start.mask is not None and start.strength == 1 and vary is not None:
                # Nothing of the picture is under the noise, which the pipeline then does not add.
                more["latents"] = vary(noise.drawn(shape, self.seed, self._dtype, self._device))
                vary = None
            if start is None or start.mask is not None:
                more |= {"height": drawn.height, "width": drawn.width}
            scheduler = samplers.make(
                request.sampler, request.schedule, model.prediction_type, model.zero_terminal_snr, self.seed
            )

            def on_step(step: int, values: torch.Tensor) -> None:
                with self.clock.gates():
                    self._passed(step, values, sampling.sigma(scheduler))
                preview = self.bench.previews.of(self._vae, values) if self.bench.previews is not None else None
                at = drawn.before + min(step + 1, drawn.done)
                self._report("denoise", at, request.steps_done, preview)
                for lease in leases:
                    lease.adjust()

            return sampling.denoise(
                model.base,
                modules[0],
                scheduler,
                self._device,
                conditions.between(drawn.before, drawn.before + drawn.done),
                on_step,
                start,
                [self._control(number, net, seen[number]) for number, net in enumerate(modules[1:])],
                vary,
                num_inference_steps=drawn.steps,
                guidance_scale=request.cfg,
                generator=generator,
                **more,
            )

        task = Task("denoise", drawn.width * drawn.height, MOST_CALLS_A_STEP * drawn.done, seamless=request.seamless)
        nets = [part for part in model.manifest.components if part.role == CONTROLNET]
        parts = [(part, self._dtype) for part in (model.manifest.component("unet"), *nets)]
        return self._stages.run(task, self.run, parts, compute)

    def _shown(self, number: int, drawn: Pass) -> PILImage.Image:
        """What a ControlNet is shown, in the size that is drawn."""
        control = self.request.controls[number]
        picture = self.bench.inputs.open(control.image)
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
        highest = latents.finite(values, f"the UNet, at step {step + 1},", self.run.dtype)
        if highest > latents.allowed(sigma) and not self.marks:
            self.marks.append(
                f"latents of {highest:.0f} at step {step + 1}, where at most {latents.allowed(sigma):.0f} fit"
            )

    def _decode(self, values: torch.Tensor) -> torch.Tensor:
        decoded = self._by_vae(lambda name: self._decoded(values, name))
        pixels = pictures.to_pixels(decoded)[0]

        def again() -> torch.Tensor:
            return pictures.to_pixels(self._by_vae(lambda name: self._decoded(values, name)))[0]

        with self.clock.gates():
            self.marks += self.bench.looks.marks(self._vae, values, pixels, again)
        if self.bench.previews is not None:
            self.bench.previews.learn(self._vae, values, pixels)
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
            return pictures.decode(modules[0], values.to(TORCH_DTYPES[name]), self.tile)

        size = values.shape[-1] * values.shape[-2] * LATENT_SCALE**2
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
        vae = self.model.manifest.component("vae")
        return self._stages.run(task, self.run, [(vae, TORCH_DTYPES[name])], compute)
