"""One generation: encode, denoise, decode, each stage holding only what it needs."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import structlog
import torch
from torch import nn

from safelight.arch.bind import bound
from safelight.arch.diffusers_fence import pictures, sampling
from safelight.arch.skeleton import SkeletonCache, SkeletonKey
from safelight.devices import machine
from safelight.devices.base import Device
from safelight.devices.failures import translated
from safelight.devices.verification import Verification
from safelight.errors import IntegrityError, NotFiniteError, OutOfMemoryError, StateLeftError
from safelight.formats.layout import BASES
from safelight.gates import latents
from safelight.gates.appearance import Looks
from safelight.generate import conditioning, numerics, samplers, workload
from safelight.generate.canvas import Canvas, canvas
from safelight.generate.check import check
from safelight.generate.preview import Previews
from safelight.library.inputs import Inputs
from safelight.library.model import Model
from safelight.memory.plan import Refusal
from safelight.memory.residency import Lease, Residency, Use
from safelight.memory.segments import component_key
from safelight.memory.working import Work, WorkingMemory, watched
from safelight.prompts.tokens import Chunk
from safelight.types import Image, OnProgress, Preview, Progress, Repair, Request, RunSettings, Seconds, Stage
from safelight.weights.overlay import Adapted

_log = structlog.get_logger(__name__)

METADATA_VERSION = 1

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LATENT_SCALE = 8
"""Pixels to a latent, in each direction."""

MOST_CALLS_A_STEP = 2
"""Samplers of second order call the UNet twice in a step."""

WIDER = {"fp16": "fp32", "bf16": "fp32"}
"""The dtype in which a VAE decodes again after NaN or infinity."""

Result = TypeVar("Result")

ATTEMPTS = 3
"""Of a stage, when memory runs out or weights were spoiled."""


@dataclass(frozen=True)
class Bench:
    """What a generation works with. ``upcoming``: components that the queue will want next, for planning.

    ``working``: what computing takes beside weights; ``computing``: bytes that it takes now, for measuring.
    ``promised``: bytes to promise to computing instead of what was measured, None to go by that.
    ``verification``: which uses of resident weights are followed by summing them again. ``inputs``: the images that
    requests start from. ``previews``: draws unfinished images, None to draw none. ``looks``: marks images whose look is
    suspicious.
    """

    device: Device
    residency: Residency
    skeletons: SkeletonCache
    working: WorkingMemory
    computing: Callable[[], int]
    run: RunSettings
    verification: Verification
    inputs: Inputs
    promised: int | None = None
    upcoming: tuple[str, ...] = ()
    previews: Previews | None = None
    looks: Looks = field(default_factory=Looks)
    report: Callable[[], Mapping[str, Any]] = dict[str, Any]


class _Clock:
    """Adds up a stage's seconds, apart from those spent on making weights resident and binding them."""

    def __init__(self) -> None:
        self.spent = {"switch": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self.in_gates = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        start = time.perf_counter()
        switched = self.spent["switch"]
        try:
            yield
        finally:
            self.spent[name] += time.perf_counter() - start - (self.spent["switch"] - switched)

    @contextlib.contextmanager
    def gates(self) -> Generator[None]:
        """The time within is that of gates, which is part of the stages'."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.in_gates += time.perf_counter() - start

    def seconds(self) -> Seconds:
        return Seconds(**self.spent, gates=self.in_gates)


def images(request: Request, model: Model, bench: Bench, on_progress: OnProgress) -> Iterator[Image]:
    """The request's images, one after another: see :func:`image`. Raises RequestError for what the model cannot do."""
    check(request, model)
    for index in range(request.count):
        yield image(request, model, bench, index, on_progress)


def image(request: Request, model: Model, bench: Bench, index: int, on_progress: OnProgress) -> Image:
    """The request's image number ``index``: that of the same request with the seed + index and a count of 1.

    ``on_progress`` may raise to stop; nothing stays bound then. Raises NotFiniteError for what no gate lets pass.
    """
    job = _Job(request, model, bench, request.seed + index, index, on_progress)
    with numerics.fixed(bench.run.threads, job.seed):
        pixels = job.pixels()
    return _finished(request, model, job, pixels)


class _Job:
    """One image: its stages, one after another, each holding only what it needs."""

    def __init__(
        self, request: Request, model: Model, bench: Bench, seed: int, index: int, on_progress: OnProgress
    ) -> None:
        self.request = request
        self.model = model
        self.bench = bench
        self.seed = seed
        self.clock = _Clock()
        self._index = index
        self._on_progress = on_progress
        self.run = bench.run
        self.repairs: list[Repair] = []
        self.marks: list[str] = []
        self._device = bench.device.torch
        self._dtype = TORCH_DTYPES[bench.run.dtype]
        self.width = request.width or model.resolution
        self.height = request.height or model.resolution
        self._canvas = canvas(request, bench.inputs, self.width, self.height)
        self._vae = model.manifest.component("vae").digest

    def pixels(self) -> torch.Tensor:
        """uint8 (h, w, 3), in host memory."""
        self._report("switch", 0, 1)
        start = None if self._canvas is None else self._start(self._canvas)
        embeddings = self._encode()
        self._report("encode", 1, 1)
        denoised = self._denoise(embeddings, start)
        self._report("decode", 0, 1)
        pixels = self._decode(denoised)
        self._report("decode", 1, 1)
        return pixels if self._canvas is None else self._canvas.put_back(pixels)

    def _start(self, given: Canvas) -> sampling.Start:
        """The picture's latents."""

        def encoded(name: str) -> list[pictures.Encoded]:
            def stage(vae: nn.Module, _: Lease) -> list[pictures.Encoded]:
                return pictures.encode_picture(vae, given.picture, given.mask, self._device)

            found: list[pictures.Encoded] = self._staged(
                "encode", "vae", TORCH_DTYPES[name], 1 + (given.mask is not None), stage, first=True
            )
            with self.clock.gates():
                for one in found:
                    latents.finite(one.numbers, "the VAE, encoding,", name)
            return found

        return sampling.Start(given.picture, given.mask, self._by_vae(encoded), self.request.strength)

    def _report(self, stage: Stage, step: int, steps: int, preview: Preview | None = None) -> None:
        memory = self.bench.report() if stage in ("switch", "encode") or step == 1 else None
        self._on_progress(Progress(stage, self._index, step, steps, memory, preview))

    def _encode(self) -> dict[str, torch.Tensor]:
        base = self.model.base
        encoded: dict[str, list[conditioning.Encoded]] = {}
        for role in BASES[base].roles:
            if role.startswith("text_encoder"):
                prompts = conditioning.prompts_of(base, role, self.request)
                passes = sum(len(prompt) for prompt in prompts)

                def stage(
                    encoder: nn.Module, _: Lease, role: str = role, prompts: tuple[list[Chunk], ...] = prompts
                ) -> list[conditioning.Encoded]:
                    return conditioning.encode_role(base, role, encoder, prompts, self.request.clip_skip, self._device)

                encoded[role] = self._staged("encode", role, self._dtype, passes, stage)
        embeddings = conditioning.assemble(base, encoded, not self.request.negative)
        with self.clock.gates():
            for tensor in embeddings.values():
                latents.finite(tensor, "the text encoder", self.run.dtype)
        return embeddings

    def _denoise(self, embeddings: Mapping[str, torch.Tensor], start: sampling.Start | None) -> torch.Tensor:
        request, model = self.request, self.model
        shape = (1, 4, self.height // LATENT_SCALE, self.width // LATENT_SCALE)

        def stage(unet: nn.Module, lease: Lease) -> torch.Tensor:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            more: dict[str, Any] = {}
            if start is None:
                noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(self._dtype).to(self._device)
                more["latents"] = noise
            if start is None or start.mask is not None:
                more |= {"height": self.height, "width": self.width}
            scheduler = samplers.make(
                request.sampler, request.schedule, model.prediction_type, model.zero_terminal_snr, self.seed
            )

            def on_step(step: int, values: torch.Tensor) -> None:
                with self.clock.gates():
                    self._passed(step, values, sampling.sigma(scheduler))
                preview = self.bench.previews.of(self._vae, values) if self.bench.previews is not None else None
                self._report("denoise", min(step + 1, request.steps_done), request.steps_done, preview)
                lease.adjust()

            return sampling.denoise(
                model.base,
                unet,
                scheduler,
                self._device,
                embeddings,
                on_step,
                start,
                num_inference_steps=request.steps,
                guidance_scale=request.cfg,
                generator=generator,
                **more,
            )

        return self._staged("denoise", "unet", self._dtype, MOST_CALLS_A_STEP * request.steps_done, stage)

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
        with self.clock.gates():
            self.marks += self.bench.looks.marks(self._vae, values, pixels)
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
        dtype = TORCH_DTYPES[name]

        def stage(vae: nn.Module, _: Lease) -> torch.Tensor:
            return pictures.decode(vae, values.to(dtype))

        decoded = self._staged("decode", "vae", dtype, 1, stage)
        with self.clock.gates():
            latents.finite(decoded, "the VAE", name)
        return decoded

    def _staged(
        self,
        name: str,
        role: str,
        dtype: torch.dtype,
        passes: int,
        stage: Callable[[nn.Module, Lease], Any],
        first: bool = False,
    ) -> Any:
        """Run a stage; ``first``: the one before all others. When memory runs out: leave the handler, let go of its
        frames, drop what nobody holds, promise more to computing, and try again; when weights turn out to be spoiled,
        read them again and try again; when something was left on the module, try again with one that is built anew."""
        for attempt in range(ATTEMPTS):
            try:
                with self.clock.stage(name), translated(f"The memory for {self.model.name}'s {role}"):
                    return self._once(role, dtype, passes, stage, first)
            except OutOfMemoryError as error:
                if error.final or attempt == ATTEMPTS - 1:
                    raise
                why = let_go(error)
            except _SpoiledWeights as error:
                if attempt == ATTEMPTS - 1:
                    raise IntegrityError(self.model.path, error.labels[0], "was spoiled in memory, again") from error
                why = let_go(error)
                self.repairs.append(Repair("memory", why, "read again"))
            except StateLeftError as error:
                if attempt == ATTEMPTS - 1:
                    raise
                why = let_go(error)
                self.repairs.append(Repair("state", why, "computed with a model built anew"))
            _log.warning("a stage is done again", stage=name, role=role, why=why)
            self.bench.residency.drop()
            machine.give_back()
        raise AssertionError

    def _once(
        self, role: str, dtype: torch.dtype, passes: int, stage: Callable[[nn.Module, Lease], Any], first: bool
    ) -> Any:
        bench, run, component = self.bench, self.run, self.model.manifest.component(role)
        start = time.perf_counter()
        key = _skeleton(self.model, role, dtype, bench)
        pixels, task = self.width * self.height, "-encoder" if first else ""
        work = work_of(self.model, role, dtype, run, pixels, task)
        use = use_of(self.model, role, bench, dtype, pixels, passes, task)
        with bench.residency.lease(component, dtype, use) as lease:
            with bound(bench.skeletons, key, lease) as module:
                self.clock.spent["switch"] += time.perf_counter() - start
                with watched(bench.computing) as most, self._translated(work):
                    result = stage(module, lease)
                    used = most()
            if lease.written:
                raise _SpoiledWeights(["written while they were bound"])
            bench.verification.worked(time.perf_counter() - start)
            if bench.verification.due(lease.key):
                with bench.verification.timed():
                    wrong = lease.verify()
                if wrong:
                    bench.verification.found_wrong()
                    raise _SpoiledWeights(wrong)
        bench.working.learn(work, used)
        machine.give_back()
        return result

    @contextlib.contextmanager
    def _translated(self, work: Work) -> Generator[None]:
        try:
            with translated(f"Computing an image by {self.model.name}"):
                yield
        except OutOfMemoryError as error:
            # What failed to get a slab says how large; what failed within an operation does not.
            if not error.needed:
                self.bench.working.too_little(work)
            raise


def dtype_of(settings: RunSettings, role: str) -> torch.dtype:
    """The dtype in which a component computes."""
    return TORCH_DTYPES[settings.vae_dtype if role == "vae" else settings.dtype]


def work_of(model: Model, role: str, dtype: torch.dtype, settings: RunSettings, pixels: int, task: str = "") -> Work:
    """What a component computes in ``dtype`` for an image of ``pixels`` pixels; ``task`` tells a VAE's two."""
    return workload.of(model.manifest.component(role), dtype, settings, pixels, task)


def use_of(model: Model, role: str, bench: Bench, dtype: torch.dtype, pixels: int, passes: int, task: str = "") -> Use:
    """How a generation uses a component; what it will want next is the rest of the job, then what the queue wants.
    With a ``task`` it comes before all others."""
    roles = BASES[model.base].roles
    after = roles if task else roles[roles.index(role) + 1 :]
    rest = [component_key(model.manifest.component(r), dtype_of(bench.run, r)) for r in after]
    work = work_of(model, role, dtype, bench.run, pixels, task)
    promised = bench.working.estimate(work) if bench.promised is None else bench.promised
    component = model.manifest.component(role)
    if isinstance(component, Adapted):
        # What lies over weights is computed before they are used, never at the same time.
        promised = max(promised, component.working)
    return Use(passes, promised, (*rest, *bench.upcoming))


def component_keys(model: Model, settings: RunSettings) -> tuple[str, ...]:
    """A model's components as the planner names them, in the order of use."""
    roles = BASES[model.base].roles
    return tuple(component_key(model.manifest.component(role), dtype_of(settings, role)) for role in roles)


def prefetch(model: Model, bench: Bench) -> bool:
    """Bring a model's components as far as there is room beside all that is there; whether all of it is there now."""
    for role in BASES[model.base].roles:
        component, dtype = model.manifest.component(role), dtype_of(bench.run, role)
        planned = bench.residency.planned(component, dtype)
        if isinstance(planned, Refusal) or planned.pieces("drop") or planned.pieces("stream"):
            return False
        if planned.pieces("load"):
            with bench.residency.lease(component, dtype):
                pass
    return True


def pinned(model: Model, bench: Bench) -> contextlib.ExitStack:
    """Leases of a model's components, whole and held until they are closed. Raises OutOfMemoryError."""
    with contextlib.ExitStack() as stack:
        for role in BASES[model.base].roles:
            component, dtype = model.manifest.component(role), dtype_of(bench.run, role)
            lease = stack.enter_context(bench.residency.lease(component, dtype))
            if lease.ring is not None:
                hint = "Held, it would leave no room for others."
                raise OutOfMemoryError(f"The whole {role}", 0, 0, hint, final=True)
        return stack.pop_all()


def prepare(model: Model, bench: Bench) -> None:
    """Build a model's skeletons, so that the first image need not."""
    for role in BASES[model.base].roles:
        bench.skeletons.give(bench.skeletons.take(_skeleton(model, role, dtype_of(bench.run, role), bench)))


def _skeleton(model: Model, role: str, dtype: torch.dtype, bench: Bench) -> SkeletonKey:
    run, config = bench.run, model.manifest.component(role).config
    return SkeletonKey(model.base, role, config, dtype, run.attention, bench.device.torch, run.attention_slice_size)


def preload(model: Model, bench: Bench) -> None:
    """Make a model's components resident, the UNet last, without computing."""
    for role in sorted(BASES[model.base].roles, key=lambda role: role == "unet"):
        with bench.residency.lease(model.manifest.component(role), dtype_of(bench.run, role)):
            pass


def let_go(error: BaseException) -> str:
    """What it says, after its frames let go of their values: until then the tensors in them live."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    return str(error)


class _SpoiledWeights(Exception):
    """Resident weights are not what was produced; ``labels`` names the segments."""

    def __init__(self, labels: list[str]) -> None:
        super().__init__(f"weights were changed in memory: {', '.join(labels)}")
        self.labels = labels


def _finished(request: Request, model: Model, job: _Job, pixels: torch.Tensor) -> Image:
    seed = job.seed
    height, width, _ = pixels.shape
    raw = pixels.contiguous().numpy().tobytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    warnings = (
        *(f"marked: {mark}; it can be right all the same" for mark in job.marks),
        *(f"repaired: {repair.wrong}; {repair.helped}" for repair in job.repairs),
    )
    # What was drawn, which with a part of a picture is another size than the picture's.
    drawn = {"width": job.width, "height": job.height}
    asked: dict[str, Any] = asdict(request) | {"seed": seed, "count": 1, "model": model.name, **drawn}
    # As JSON has them.
    asked["loras"] = [{**lora, "blocks": list(lora["blocks"])} for lora in asked["loras"]]
    # Who made it does not change what it is.
    del asked["isolate"]
    metadata = {
        "version": METADATA_VERSION,
        "request": asked,
        "model": {
            "name": model.name,
            "digest": model.digest,
            "base": model.base,
            "prediction_type": model.prediction_type,
            "zero_terminal_snr": model.zero_terminal_snr,
            "components": {component.role: component.digest for component in model.manifest.components},
        },
        "run": asdict(job.run),
        "marks": list(job.marks),
        "repairs": [asdict(repair) for repair in job.repairs],
        "pixels_sha256": sha256,
    }
    return Image(
        pixels=raw,
        width=width,
        height=height,
        seed=seed,
        model=model.name,
        model_digest=model.digest,
        pixels_sha256=sha256,
        seconds=job.clock.seconds(),
        host_peak_bytes=peak_bytes(),
        metadata=metadata,
        warnings=warnings,
    )


def peak_bytes() -> int:
    """The largest resident set of this process so far, in bytes (the system counts in other units on Linux)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
