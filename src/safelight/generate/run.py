"""One generation: encode, denoise, decode, each stage holding only what it needs."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

from safelight.arch import diffusers_fence
from safelight.arch.bind import bound
from safelight.arch.skeleton import SkeletonCache, SkeletonKey
from safelight.devices.failures import translated
from safelight.errors import NotFiniteError, RequestError
from safelight.formats.layout import BASES
from safelight.generate import conditioning, numerics, samplers
from safelight.library.model import Model
from safelight.memory.residency import Residency
from safelight.types import Image, OnProgress, Progress, Request, RunSettings, Seconds

METADATA_VERSION = 1

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LATENT_SCALE = 8
"""Pixels to a latent, in each direction."""


@dataclass(frozen=True)
class Bench:
    """What a generation works with: residency, skeletons, and the run settings that were decided for it."""

    residency: Residency
    skeletons: SkeletonCache
    run: RunSettings


class _Clock:
    """Adds up a stage's seconds, apart from those spent on making weights resident and binding them."""

    def __init__(self) -> None:
        self.spent = {"switch": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0}

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        start = time.perf_counter()
        switched = self.spent["switch"]
        try:
            yield
        finally:
            self.spent[name] += time.perf_counter() - start - (self.spent["switch"] - switched)

    def seconds(self) -> Seconds:
        return Seconds(**self.spent)


def check(request: Request, model: Model) -> None:
    """Raise RequestError when this model cannot do what is asked."""
    if model.base == "sdxl-refiner":
        raise RequestError("model", model.name, "is a refiner: it works on images, and cannot start from text")
    if model.variant != "text-to-image":
        raise RequestError("model", model.name, f"is a checkpoint for {model.variant}: it needs an image to work on")
    layers = min(getattr(c.config, "layers", 99) for c in model.manifest.components)
    if request.clip_skip >= layers:
        raise RequestError("clip_skip", request.clip_skip, f"{model.name}'s text encoder has only {layers} layers")


def images(request: Request, model: Model, bench: Bench, on_progress: OnProgress) -> Iterator[Image]:
    """The request's images, one after another. Image k is that of the same request with seed + k and count 1.

    ``on_progress`` may raise to stop; nothing stays bound then. Raises RequestError for what the model cannot do.
    """
    check(request, model)
    for index in range(request.count):
        clock = _Clock()
        seed = request.seed + index
        with translated(f"An image by {model.name}"), numerics.fixed(bench.run.threads, seed):
            pixels = _image(request, model, bench, seed, index, clock, on_progress)
        yield _finished(request, model, bench.run, seed, pixels, clock)


def _image(
    request: Request, model: Model, bench: Bench, seed: int, index: int, clock: _Clock, on_progress: OnProgress
) -> torch.Tensor:
    """Pixels of one image: uint8 (h, w, 3)."""
    device = torch.device(bench.run.device)
    dtype = TORCH_DTYPES[bench.run.dtype]
    width, height = request.width or model.resolution, request.height or model.resolution

    def report(stage: str, step: int, steps: int) -> None:
        on_progress(Progress(stage, index, step, steps))  # pyright: ignore[reportArgumentType]

    report("switch", 0, 1)
    with clock.stage("encode"):
        encoded = {}
        for role in BASES[model.base].roles:
            if role.startswith("text_encoder"):
                texts = (request.prompt, request.negative)
                with _component(bench, model, role, dtype, clock) as encoder:
                    encoded[role] = conditioning.encode_role(
                        model.base, role, encoder, texts, request.clip_skip, device
                    )
        embeddings = conditioning.assemble(model.base, encoded, not request.negative)
        for tensor in embeddings.values():
            _finite(tensor, "the text encoder", bench.run.dtype)
    report("encode", 1, 1)

    with clock.stage("denoise"):
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, 4, height // LATENT_SCALE, width // LATENT_SCALE)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)
        scheduler = samplers.make(
            request.sampler, request.schedule, model.prediction_type, model.zero_terminal_snr, seed
        )
        with _component(bench, model, "unet", dtype, clock) as unet:
            latents = diffusers_fence.denoise(
                model.base,
                unet,
                scheduler,
                device,
                embeddings,
                lambda step, _: report("denoise", min(step + 1, request.steps), request.steps),
                height=height,
                width=width,
                num_inference_steps=request.steps,
                guidance_scale=request.cfg,
                generator=generator,
                latents=noise,
            )

    _finite(latents, "the UNet", bench.run.dtype)
    report("decode", 0, 1)
    with clock.stage("decode"):
        vae_dtype = TORCH_DTYPES[bench.run.vae_dtype]
        with _component(bench, model, "vae", vae_dtype, clock) as vae:
            decoded = diffusers_fence.decode(vae, latents.to(vae_dtype))
        _finite(decoded, "the VAE", bench.run.vae_dtype)
        pixels = diffusers_fence.to_pixels(decoded)[0]
    report("decode", 1, 1)
    return pixels


def _finite(values: torch.Tensor, stage: str, dtype: str) -> None:
    if not torch.isfinite(values).all():
        raise NotFiniteError(stage, dtype)


@contextlib.contextmanager
def _component(bench: Bench, model: Model, role: str, dtype: torch.dtype, clock: _Clock) -> Generator[nn.Module]:
    """A component, leased and bound. The time until it is bound counts as switching."""
    start = time.perf_counter()
    component = model.manifest.component(role)
    key = SkeletonKey(model.base, role, component.config, dtype, bench.run.attention)
    with (
        bench.residency.lease(component, dtype) as weights,
        bound(bench.skeletons, key, weights) as module,
    ):
        clock.spent["switch"] += time.perf_counter() - start
        yield module


def _finished(
    request: Request, model: Model, run: RunSettings, seed: int, pixels: torch.Tensor, clock: _Clock
) -> Image:
    height, width, _ = pixels.shape
    raw = pixels.contiguous().numpy().tobytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    asked = asdict(request) | {"seed": seed, "count": 1, "width": width, "height": height, "model": model.name}
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
        "run": asdict(run),
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
        seconds=clock.seconds(),
        host_peak_bytes=peak_bytes(),
        metadata=metadata,
    )


def peak_bytes() -> int:
    """The largest resident set of this process so far, in bytes (the system counts in other units on Linux)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
