"""Z-Image's pixels equal those of diffusers' pipelines, bit for bit, on a CPU in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support import zimage
from support.scale import thinned

import safelight
from safelight.errors import RequestError
from safelight.families.parts import qwen3_model
from safelight.resolve.resolve import with_defaults
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "a red apple (fresh)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zimage.write_folder(tmp_path_factory.mktemp("zimage") / "tiny", SEED)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return zimage.pipeline(SEED)


def theirs(pipe: Any, guidance_scale: float = 0.0, negative: str = "", steps: int = 3, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(11),
        **{"width": 64, "height": 48, **call},
    ).images[0]
    return image.tobytes()


def ask(path: Path, **changes: Any) -> safelight.Request:
    values = {"prompt": PROMPT, "steps": 3, "width": 64, "height": 48, "seed": 11, **changes}
    return safelight.Request(model=str(path), **values)


def ours(engine: LocalEngine, path: Path, **changes: Any) -> bytes:
    return next(engine.generate(ask(path, **changes))).pixels


def test_text_to_image(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    assert ours(shared_engine, folder) == theirs(pipe)


def test_another_shift(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(pipe.scheduler.config) | {"shift": 5.0})
    right = theirs(type(pipe)(**{**pipe.components, "scheduler": scheduler}))
    assert ours(shared_engine, folder, shift=5.0) == right != ours(shared_engine, folder)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_a_shift_with_which_the_first_timesteps_are_equal(
    sampler: str, shared_engine: LocalEngine, folder: Path
) -> None:
    """These schedulers round timesteps, and would look for the second of two that are equal."""
    few, many = (ours(shared_engine, folder, steps=12, shift=shift, sampler=sampler) for shift in (3.0, 100.0))
    assert few != many


@pytest.mark.parametrize("negative", ["", "a blurred picture of many green pears"])
def test_classifier_free_guidance(negative: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    assert ours(shared_engine, folder, cfg=3.5, negative=negative) == theirs(pipe, 2.5, negative)


def test_base_has_its_own_shift_and_defaults(shared_engine: LocalEngine, tmp_path: Path) -> None:
    path = zimage.write_folder(tmp_path / "base", SEED, "base")
    image = next(shared_engine.generate(ask(path, steps=3, cfg=5.0)))
    assert image.pixels == theirs(zimage.pipeline(SEED, variant="base"), 4.0)
    model = shared_engine.library.find(str(path))
    assert model.variant == "base"
    assert (with_defaults(ask(path, steps=None), model).steps, with_defaults(ask(path), model).cfg) == (50, 5.0)


def test_turbo_has_eight_steps_and_no_guidance(shared_engine: LocalEngine, folder: Path) -> None:
    found = with_defaults(ask(folder, steps=None), shared_engine.library.find(str(folder)))
    assert (found.steps, found.cfg) == (8, 1.0)


@pytest.mark.parametrize("strength", thinned([0.5, 0.34, 1.0]))
def test_image_to_image(strength: float, shared_engine: LocalEngine, folder: Path, picture: Path, pipe: Any) -> None:
    other = diffusers.ZImageImg2ImgPipeline(**pipe.components)
    wanted = theirs(other, 2.5, "green", 5, image=Image.open(picture), strength=strength)
    changes = {"cfg": 3.5, "negative": "green", "steps": 5, "image": str(picture), "strength": strength}
    assert ours(shared_engine, folder, **changes) == wanted


@pytest.mark.parametrize("strength", thinned([0.6, 1.0]))
def test_inpainting(
    strength: float, shared_engine: LocalEngine, folder: Path, picture: Path, mask: Path, pipe: Any
) -> None:
    other = diffusers.ZImageInpaintPipeline(**pipe.components)
    pictures = {"image": Image.open(picture), "mask_image": Image.open(mask)}
    drawn = np.frombuffer(theirs(other, 0.0, "", 4, strength=strength, **pictures), np.uint8).reshape(48, 64, 3)
    outside = np.asarray(Image.open(mask))[..., None] < 128
    wanted = np.where(outside, np.asarray(Image.open(picture)), drawn)
    changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": strength, "mask_blur": 0}
    assert ours(shared_engine, folder, **changes) == wanted.tobytes()


@pytest.mark.parametrize("schedule", thinned(["karras", "exponential"]))
def test_schedules(schedule: str, shared_engine: LocalEngine, folder: Path) -> None:
    pipe = zimage.pipeline(SEED)
    settings = {"shift": 3.0, f"use_{schedule}_sigmas": True}
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    assert ours(shared_engine, folder, steps=5, schedule=schedule) == theirs(pipe, steps=5)


@pytest.mark.parametrize("sampler", thinned(["heun", "dpmpp_2m", "unipc", "lcm"]))
def test_samplers_that_the_pipeline_lacks(sampler: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    """The oracle is a loop over diffusers' scheduler and model: the pipeline passes sigmas, which few take."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler: Any = {
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
    }[sampler]()
    assert ours(shared_engine, folder, sampler=sampler, steps=4) == looped(pipe, scheduler, 4)


@torch.no_grad()
def looped(pipe: Any, scheduler: Any, steps: int) -> bytes:
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(11)
    texts, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    latents = torch.randn(1, 16, 6, 8, generator=generator)
    if isinstance(scheduler, diffusers.FlowMatchLCMScheduler):
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)
    noisy = {"generator": generator} if isinstance(scheduler, diffusers.FlowMatchLCMScheduler) else {}
    for time in scheduler.timesteps:
        found = pipe.transformer([latents[0].unsqueeze(1)], ((1000 - time) / 1000).reshape(1), texts, return_dict=False)
        latents = scheduler.step(-found[0][0].squeeze(1)[None], time, latents, return_dict=False, **noisy)[0]
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")[0].tobytes()


def test_bf16(tmp_path: Path, folder: Path) -> None:
    """The norms of the time embedding, the rotary frequencies and the latents stay in fp32."""
    engine = safelight.open_engine(tmp_path / "root")
    assert ours(engine, folder, precision="bf16", cfg=3.5, negative="green") == theirs(
        zimage.loaded(folder, torch.bfloat16), 2.5, "green"
    )


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("prompt", ["", "a red apple", "  été\n<|im_end|> <think> 你好 🍎 1234  "])
def test_token_ids(prompt: str, thinking: bool) -> None:
    messages = [{"role": "user", "content": prompt}]
    other = zimage.tokenizer()
    text = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    assert qwen3_model.chat(prompt, thinking) == text
    assert qwen3_model.tokens_of(text, 512, qwen3_model.tokenizer()) == (other(text).input_ids, "")


def test_a_long_prompt_is_cut_and_said(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    prompt = "apple " * 600 + "and a pear"
    image = next(shared_engine.generate(ask(folder, prompt=prompt)))
    [warning] = [one for one in image.warnings if "cut off" in one]
    assert warning.startswith("prompt: text_encoder takes no more tokens; cut off: ' apple apple")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(11)
    made = pipe(prompt, num_inference_steps=3, guidance_scale=0.0, generator=generator, width=64, height=48)
    assert image.pixels == made.images[0].tobytes()
    assert not next(shared_engine.generate(ask(folder))).warnings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "a (red:1.3) apple"}, r"prompt='a \(red:1.3\) apple…': \(red:1.3\) has no meaning for"),
        ({"negative": "[cat:dog:0.5]"}, r"negative=.*: \[cat:dog:0.5\] has no meaning for"),
        ({"prompt": "[cat|dog]"}, r"\[cat\|dog\] has no meaning for"),
        ({"clip_skip": 1}, "asks for CLIP skip, which"),
        ({"prompt_syntax": "compel"}, "asks for compel's syntax, which"),
        ({"sampler": "ddim"}, "is not for z-image, which has: euler, heun, dpmpp_2m, unipc, lcm"),
        ({"sampler": "heun", "schedule": "karras"}, "for z-image, the sampler heun has default"),
        ({"width": 72}, "must be a multiple of 16 for z-image"),
        ({"seamless": "x"}, "asks for seamless images, which"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict[str, Any], says: str, shared_engine: LocalEngine, folder: Path
) -> None:
    with pytest.raises(RequestError, match=says):
        ours(shared_engine, folder, **changes)


@pytest.mark.parametrize("prompt", ["a photo (16:9) of [two] cats", "(plain:1.0) text", "see [10:30] | left"])
def test_brackets_of_sentences_are_text(prompt: str, shared_engine: LocalEngine, folder: Path) -> None:
    assert not next(shared_engine.generate(ask(folder, prompt=prompt))).warnings
