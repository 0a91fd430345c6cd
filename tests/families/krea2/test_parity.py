"""Krea 2's pixels equal those of diffusers' pipeline, bit for bit, on a CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support import krea2, memory
from support.scale import thinned

import safelight
from safelight.errors import RequestError
from safelight.families.krea2.model import MOST_TOKENS
from safelight.families.krea2.spec import KREA2, mu
from safelight.families.parts import qwen3_model
from safelight.families.parts.qwen_chat import BEGINNING, ENDING
from safelight.families.parts.sequences import pack, unpack
from safelight.models.bind import bind
from safelight.models.skeleton import SkeletonCache, SkeletonKey
from safelight.resolve.resolve import with_defaults
from safelight.weights.manifest import ComponentManifest
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "a red apple (fresh)"
NEGATIVE = "a blurred picture of many green pears"
TOKENS = 12
"""Tokens of an image of 64 by 48 pixels."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return krea2.pipeline(SEED, distilled=False)


@pytest.fixture(scope="module")
def turbo_pipe(pipe: Any) -> Any:
    return krea2.pipeline_of(pipe.components, distilled=True)


def theirs(pipe: Any, guidance_scale: float = 0.0, negative: str = "", steps: int = 3, **call: Any) -> bytes:
    """``guidance_scale``: in the pipeline's convention, one less than Safelight's."""
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        **{"prompt": PROMPT, "width": 64, "height": 48, **call},
        negative_prompt=negative,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    return image.tobytes()


def ask(path: Path, **changes: Any) -> safelight.Request:
    values = {"prompt": PROMPT, "steps": 3, "width": 64, "height": 48, "seed": 11, "cfg": 1.0, **changes}
    return safelight.Request(model=str(path), **values)


def ours(engine: LocalEngine, path: Path, **changes: Any) -> bytes:
    return next(engine.generate(ask(path, **changes))).pixels


def test_turbo(shared_engine: LocalEngine, turbo: Path, turbo_pipe: Any) -> None:
    assert ours(shared_engine, turbo) == theirs(turbo_pipe)
    model = shared_engine.library.find(str(turbo))
    found = with_defaults(ask(turbo, steps=None, cfg=None), model)
    assert (model.variant, found.steps, found.cfg) == ("turbo", 8, 1.0)


@pytest.mark.parametrize("negative", [NEGATIVE, *thinned([""], 0)])
def test_raw(negative: str, shared_engine: LocalEngine, raw: Path, pipe: Any) -> None:
    assert ours(shared_engine, raw, cfg=5.5, negative=negative) == theirs(pipe, 4.5, negative)
    model = shared_engine.library.find(str(raw))
    found = with_defaults(ask(raw, steps=None, cfg=None), model)
    assert (model.variant, found.steps, found.cfg) == ("raw", 28, 5.5)


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
    """Draw with diffusers' modules and scheduler in a plain loop: the pipeline has no pictures and one sampler."""
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(11)
    texts = [pipe.encode_prompt(text) for text in (PROMPT, NEGATIVE)]
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler | diffusers.FlowMatchLCMScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu(TOKENS, steps))
    else:
        scheduler.set_timesteps(steps)
    mean, std = (torch.tensor(pipe.vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    times, encoded = scheduler.timesteps, torch.zeros(1, 16, 6, 8)
    if picture is not None:
        times = times[int(max(steps - steps * strength, 0)) :]
        scheduler.set_begin_index(steps - len(times))
        shown = pipe.image_processor.preprocess(Image.open(picture)).unsqueeze(2)
        encoded = (pipe.vae.encode(shown).latent_dist.sample(generator)[:, :, 0] - mean) * (1.0 / std)
    latents = noise = torch.randn(1, 16, 6, 8, generator=generator)
    if picture is not None and (mask is None or strength < 1):
        latents = scheduler.scale_noise(encoded, times[:1], noise)
    free = torch.ones(1) if mask is None else torch.tensor(np.asarray(Image.open(mask))[::8, ::8] / 255).float()
    noisy = {"generator": generator} if isinstance(scheduler, diffusers.FlowMatchLCMScheduler) else {}
    places = pipe.prepare_position_ids(512, 3, 4, "cpu")
    for at, time in enumerate(times):
        call = {"hidden_states": pack(latents), "timestep": time[None] / 1000, "position_ids": places}
        found = [
            pipe.transformer(**call, encoder_hidden_states=one, encoder_attention_mask=real)[0] for one, real in texts
        ]
        velocity = found[0] + (cfg - 1) * (found[0] - found[1]) if cfg > 1 else found[0]
        latents = scheduler.step(unpack(velocity, 3, 4), time, latents, return_dict=False, **noisy)[0]
        if mask is not None:
            kept = encoded if at == len(times) - 1 else scheduler.scale_noise(encoded, times[at + 1][None], noise)
            latents = (1 - free) * kept + free * latents
    decoded = pipe.vae.decode((latents / (1.0 / std) + mean).unsqueeze(2)).sample[:, :, 0]
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0].tobytes()


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(krea2.SCHEDULER)


@pytest.mark.full
def test_the_loop_is_the_pipeline(pipe: Any) -> None:
    assert looped(pipe, euler(), 3, 5.5) == theirs(pipe, 4.5, NEGATIVE)


@pytest.mark.parametrize("sampler", thinned(["dpmpp_2m", "heun", "unipc", "lcm"]))
def test_samplers_that_the_pipeline_lacks(sampler: str, shared_engine: LocalEngine, raw: Path, pipe: Any) -> None:
    shift = math.exp(mu(TOKENS, 4))
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler: Any = {
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "lcm": lambda: diffusers.FlowMatchLCMScheduler(use_dynamic_shifting=True),
    }[sampler]()
    assert ours(shared_engine, raw, sampler=sampler, steps=4) == looped(pipe, scheduler, 4)


@pytest.mark.parametrize("schedule", thinned(["karras", "exponential"], 0))
def test_schedules(schedule: str, shared_engine: LocalEngine, raw: Path, pipe: Any) -> None:
    settings = {**krea2.SCHEDULER, f"use_{schedule}_sigmas": True}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings)
    assert ours(shared_engine, raw, steps=5, schedule=schedule) == looped(pipe, scheduler, 5)


@pytest.mark.parametrize("strength", thinned([0.5, 0.34, 1.0]))
def test_image_to_image(strength: float, shared_engine: LocalEngine, raw: Path, picture: Path, pipe: Any) -> None:
    changes = {"cfg": 5.5, "negative": NEGATIVE, "steps": 4, "image": str(picture), "strength": strength}
    assert ours(shared_engine, raw, **changes) == looped(pipe, euler(), 4, 5.5, picture, strength)


@pytest.mark.parametrize("strength", thinned([0.6, 1.0]))
def test_inpainting(
    strength: float, shared_engine: LocalEngine, raw: Path, picture: Path, mask: Path, pipe: Any
) -> None:
    found = looped(pipe, euler(), 4, 1.0, picture, strength, mask)
    drawn = np.frombuffer(found, np.uint8).reshape(48, 64, 3)
    outside = np.asarray(Image.open(mask))[..., None] < 128
    wanted = np.where(outside, np.asarray(Image.open(picture)), drawn)
    changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": strength, "mask_blur": 0}
    assert ours(shared_engine, raw, **changes) == wanted.tobytes()


def test_bf16(tmp_path: Path, raw: Path) -> None:
    """The norms stay in fp32. The noise of Safelight is drawn in fp32, so the pipeline is given that noise."""
    noise = torch.randn(1, 16, 6, 8, generator=torch.Generator("cpu").manual_seed(11)).bfloat16()
    engine = safelight.open_engine(tmp_path / "root")
    found = ours(engine, raw, precision="bf16", cfg=5.5, negative=NEGATIVE)
    pipe = krea2.loaded(raw, False, torch.bfloat16)
    assert pipe.transformer.txt_in.norm.weight.dtype == torch.float32
    assert found == theirs(pipe, 4.5, NEGATIVE, latents=pack(noise))


@pytest.mark.parametrize("prompt", ["", "a red apple", "\n  été\n<|im_end|> <think> 你好 🍎 1234  ", "apple " * 600])
def test_token_ids(prompt: str, pipe: Any) -> None:
    found = pipe.tokenizer(BEGINNING + prompt, truncation=True, max_length=MOST_TOKENS).input_ids
    assert pipe.prompt_template_encode_prefix == BEGINNING
    assert pipe.prompt_template_encode_suffix == ENDING
    assert qwen3_model.tokens_of(BEGINNING + prompt, MOST_TOKENS, qwen3_model.tokenizer())[0] == found


def test_a_long_prompt_is_cut_and_said(shared_engine: LocalEngine, turbo: Path, turbo_pipe: Any) -> None:
    prompt = "apple " * 600 + "and a pear"
    image = next(shared_engine.generate(ask(turbo, prompt=prompt, steps=1)))
    [warning] = [one for one in image.warnings if "cut off" in one]
    assert warning.startswith("prompt: text_encoder takes no more tokens; cut off: ' apple apple")
    assert image.pixels == theirs(turbo_pipe, steps=1, prompt=prompt)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "a (red:1.3) apple"}, r"prompt='a \(red:1.3\) apple…': \(red:1.3\) has no meaning for"),
        ({"guidance": 3.0}, "guidance"),
        ({"clip_skip": 1}, "asks for CLIP skip, which"),
        ({"sampler": "ddim"}, "is not for krea-2, which has: euler, heun, dpmpp_2m, unipc, lcm"),
        ({"width": 72}, "must be a multiple of 16 for krea-2"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict[str, Any], says: str, shared_engine: LocalEngine, raw: Path
) -> None:
    with pytest.raises(RequestError, match=says):
        ours(shared_engine, raw, **changes)


def called(component: ComponentManifest, budget: int) -> tuple[torch.Tensor, bool]:
    """Call the transformer in bf16. Returns its output, and whether weights were streamed. ``budget``: bytes."""
    residency = memory.host(budget)
    key = SkeletonKey("krea-2", component.role, component.config, torch.bfloat16, "torch-sdp")
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 512, 2, 32, generator=generator).bfloat16()
    tokens = torch.randn(1, TOKENS, 64, generator=generator).bfloat16()
    places = torch.zeros(512 + TOKENS, 3)
    with (
        torch.no_grad(),
        residency.lease(component, torch.bfloat16) as lease,
        bind(SkeletonCache(), key, lease) as module,
    ):
        found = module(tokens, states, torch.ones(1).bfloat16(), places, return_dict=False)[0]
        return found, lease.ring is not None


def test_streamed_norms_stay_in_fp32(shared_engine: LocalEngine, raw: Path) -> None:
    component = shared_engine.library.find(str(raw)).manifest.component("transformer")
    (right, streamed), (found, streamed_with_little) = called(component, 1 << 30), called(component, 180_000)
    assert (streamed, streamed_with_little) == (False, True)
    assert torch.equal(right, found)


def test_a_run_leaves_the_skeletons_as_they_were(shared_engine: LocalEngine, turbo: Path) -> None:
    right = ours(shared_engine, turbo)
    for changes in ({"width": 80, "tile": 64}, {"hires_scale": 1.5}):
        image = next(shared_engine.generate(ask(turbo, **changes)))
        assert len(set(image.pixels)) > 100
    skeletons = shared_engine.resources.skeletons
    assert {key.role for key in skeletons._free if key.base == "krea-2"} == set(KREA2.roles)
    assert skeletons.check() == []
    assert ours(shared_engine, turbo) == right
