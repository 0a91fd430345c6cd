"""FLUX.2 klein's pixels equal those of diffusers' pipeline, bit for bit, on a CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support import flux2
from support.scale import thinned

import safelight
from safelight.families.flux2.spec import mu
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "a red apple (fresh)"
NEGATIVE = "a blurred picture of many green pears"
TOKENS = 12
"""Tokens of an image of 64 by 48 pixels."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux2.pipeline(SEED, distilled=False)


def theirs(pipe: Any, guidance_scale: float = 1.0, negative: str = "", steps: int = 3, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        prompt=PROMPT,
        negative_prompt_embeds=pipe.encode_prompt(negative)[0],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(11),
        **{"width": 64, "height": 48, **call},
    ).images[0]
    return image.tobytes()


def ask(path: Path, **changes: Any) -> safelight.Request:
    values = {"prompt": PROMPT, "steps": 3, "width": 64, "height": 48, "seed": 11, "cfg": 1.0, **changes}
    return safelight.Request(model=str(path), **values)


def ours(engine: LocalEngine, path: Path, **changes: Any) -> bytes:
    return next(engine.generate(ask(path, **changes))).pixels


def test_text_to_image_distilled(shared_engine: LocalEngine, distilled: Path) -> None:
    assert ours(shared_engine, distilled) == theirs(flux2.pipeline(SEED, distilled=True), 1.0)


@pytest.mark.parametrize("steps", thinned([3, 12]))
@pytest.mark.parametrize("negative", thinned([NEGATIVE, ""]))
def test_text_to_image_base(negative: str, steps: int, shared_engine: LocalEngine, base: Path, pipe: Any) -> None:
    found = ours(shared_engine, base, cfg=4.0, negative=negative, steps=steps)
    assert found == theirs(pipe, 4.0, negative, steps)


def test_base_without_guidance(shared_engine: LocalEngine, base: Path, pipe: Any) -> None:
    assert ours(shared_engine, base) == theirs(pipe)


def test_long_prompts_are_cut_off(shared_engine: LocalEngine, base: Path, pipe: Any) -> None:
    long = "apple pear " * 400
    found = ours(shared_engine, base, cfg=4.0, negative=long)
    assert found == theirs(pipe, 4.0, long)


@torch.no_grad()
def looped(
    pipe: Any,
    scheduler: Any,
    steps: int,
    cfg: float = 1.0,
    picture: Path | None = None,
    strength: float = 1.0,
    mask: Path | None = None,
) -> bytes:
    """Draw with diffusers' modules and scheduler in a plain loop: the pipeline lacks other samplers and strengths."""
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(11)
    (text, text_ids), (negative, _) = pipe.encode_prompt(PROMPT), pipe.encode_prompt(NEGATIVE)
    noise = latents = torch.randn(1, 128, 3, 4, generator=generator)
    takes_sigmas = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler | diffusers.FlowMatchLCMScheduler)
    if takes_sigmas:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu(TOKENS, steps))
    else:
        scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    encoded = latents
    if picture is not None:
        first = int(max(steps - steps * strength, 0))
        scheduler.set_begin_index(first)
        times = times[first:]
        encoded = pipe._encode_vae_image(pipe.image_processor.preprocess(Image.open(picture)), generator)
        latents = scheduler.scale_noise(encoded, times[:1], noise)
    free = torch.ones(1) if mask is None else torch.tensor(np.asarray(Image.open(mask))[::16, ::16] / 255).float()
    noisy = {"generator": generator} if isinstance(scheduler, diffusers.FlowMatchLCMScheduler) else {}
    for at, time in enumerate(times):
        call = {"timestep": time.expand(1) / 1000, "img_ids": pipe._prepare_latent_ids(latents), "txt_ids": text_ids}
        call |= {"hidden_states": pipe._pack_latents(latents), "return_dict": False}
        found = pipe.transformer(encoder_hidden_states=text, **call)[0]
        if cfg > 1:
            without = pipe.transformer(encoder_hidden_states=negative, **call)[0]
            found = without + cfg * (found - without)
        velocity = found.permute(0, 2, 1).reshape(latents.shape)
        latents = scheduler.step(velocity, time, latents, return_dict=False, **noisy)[0]
        if mask is not None:
            kept = encoded if at == len(times) - 1 else scheduler.scale_noise(encoded, times[at + 1][None], noise)
            latents = (1 - free) * kept + free * latents
    norm = pipe.vae.bn
    latents = latents * torch.sqrt(norm.running_var + 1e-4)[:, None, None] + norm.running_mean[:, None, None]
    decoded = pipe.vae.decode(pipe._unpatchify_latents(latents)).sample
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0].tobytes()


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(flux2.SCHEDULER)


@pytest.mark.full
def test_the_loop_is_the_pipeline(pipe: Any) -> None:
    assert looped(pipe, euler(), 3, 4.0) == theirs(pipe, 4.0, NEGATIVE)


@pytest.mark.parametrize("sampler", thinned(["heun", "dpmpp_2m", "unipc", "lcm"]))
def test_samplers_that_the_pipeline_lacks(sampler: str, shared_engine: LocalEngine, base: Path, pipe: Any) -> None:
    shift = math.exp(mu(TOKENS, 4))
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler: Any = {
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "lcm": lambda: diffusers.FlowMatchLCMScheduler(use_dynamic_shifting=True),
    }[sampler]()
    assert ours(shared_engine, base, sampler=sampler, steps=4) == looped(pipe, scheduler, 4)


@pytest.mark.parametrize("schedule", thinned(["karras", "exponential"]))
def test_schedules(schedule: str, shared_engine: LocalEngine, base: Path) -> None:
    pipe = flux2.pipeline(SEED, distilled=False)
    settings = {**flux2.SCHEDULER, f"use_{schedule}_sigmas": True}
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings)
    assert ours(shared_engine, base, steps=5, schedule=schedule) == theirs(pipe, steps=5)


@pytest.mark.parametrize("strength", thinned([0.5, 0.34, 1.0]))
def test_image_to_image(strength: float, shared_engine: LocalEngine, base: Path, picture: Path, pipe: Any) -> None:
    changes = {"cfg": 4.0, "negative": NEGATIVE, "steps": 5, "image": str(picture), "strength": strength}
    assert ours(shared_engine, base, **changes) == looped(pipe, euler(), 5, 4.0, picture, strength)


@pytest.mark.parametrize("strength", thinned([0.6, 1.0]))
def test_inpainting(
    strength: float, shared_engine: LocalEngine, base: Path, picture: Path, mask: Path, pipe: Any
) -> None:
    """diffusers' pipeline for inpainting also shows the picture to the transformer, as a reference image."""
    found = looped(pipe, euler(), 4, 1.0, picture, strength, mask)
    drawn = np.frombuffer(found, np.uint8).reshape(48, 64, 3)
    outside = np.asarray(Image.open(mask))[..., None] < 128
    wanted = np.where(outside, np.asarray(Image.open(picture)), drawn)
    changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": strength, "mask_blur": 0}
    assert ours(shared_engine, base, **changes) == wanted.tobytes()


def test_bf16(tmp_path: Path, base: Path) -> None:
    """The noise of Safelight is drawn in fp32, whatever the dtype, so the pipeline is given that noise."""
    noise = torch.randn(1, 128, 3, 4, generator=torch.Generator("cpu").manual_seed(11)).bfloat16()
    engine = safelight.open_engine(tmp_path / "root")
    found = ours(engine, base, precision="bf16", cfg=4.0, negative=NEGATIVE)
    assert found == theirs(flux2.loaded(base, False, torch.bfloat16), 4.0, NEGATIVE, latents=noise)
