"""Qwen-Image's pixels equal those of diffusers' pipelines, bit for bit, on a CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support import qwen_image
from support.scale import thinned

import safelight
from safelight.errors import RequestError
from safelight.families.family_model import PromptText, family_model
from safelight.families.parts import qwen25_model
from safelight.families.qwen_image.spec import QWEN_IMAGE, mu
from safelight.pipeline.noise import draw_seeded_noise
from safelight.resolve.resolve import with_defaults
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "a red apple (fresh)"
NEGATIVE = "a blurred picture of many green pears"
TOKENS = 12
"""Tokens of an image of 64 by 48 pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.write_folder(tmp_path_factory.mktemp("qwen-image") / "tiny", SEED)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return qwen_image.pipeline(SEED)


def theirs(pipe: Any, scale: float = 1.0, negative: str | None = None, steps: int = 3, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        **{"prompt": PROMPT, "width": 64, "height": 48, **call},
        negative_prompt=negative,
        num_inference_steps=steps,
        true_cfg_scale=scale,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    return image.tobytes()


def ask(path: Path, **changes: Any) -> safelight.Request:
    values = {"prompt": PROMPT, "steps": 3, "width": 64, "height": 48, "seed": 11, "cfg": 1.0, **changes}
    return safelight.Request(model=str(path), **values)


def ours(engine: LocalEngine, path: Path, **changes: Any) -> bytes:
    return next(engine.generate(ask(path, **changes))).pixels


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_text_to_image(prompt: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    assert ours(shared_engine, folder, prompt=prompt) == theirs(pipe, prompt=prompt)


def test_the_shift_follows_the_size(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    size = {"width": 128, "height": 192}
    assert ours(shared_engine, folder, **size) == theirs(pipe, **size)


def test_the_shift_of_a_distilled_adapter(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    """The published scheduler of Qwen-Image-Lightning."""
    levels = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(pipe.scheduler.config) | levels)
    right = theirs(type(pipe)(**{**pipe.components, "scheduler": scheduler}))
    assert ours(shared_engine, folder, shift=3.0) == right != ours(shared_engine, folder)


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_guidance_keeps_the_norm(negative: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    assert ours(shared_engine, folder, cfg=4.0, negative=negative) == theirs(pipe, 4.0, negative)


def test_a_long_prompt_is_cut_and_said(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    prompt = "apple " * 600 + "and a pear"
    image = next(shared_engine.generate(ask(folder, prompt=prompt)))
    [warning] = [one for one in image.warnings if "cut off" in one]
    assert warning.startswith("prompt: text_encoder takes no more tokens; cut off: ' apple apple")
    assert image.pixels == theirs(pipe, prompt=prompt)
    assert not next(shared_engine.generate(ask(folder))).warnings


def test_what_is_cut_off_is_the_end_of_the_prompt() -> None:
    pairs = [PromptText("prompt", "apple" + " apple" * (count - 1)) for count in (507, 512, 513)]
    inputs = family_model(QWEN_IMAGE).text_inputs(QWEN_IMAGE, "text_encoder", ask(Path("x")), pairs, {})
    # The five tokens of the template's ending are cut off first.
    assert inputs.cut == {pairs[2]: " apple"}


def test_defaults(shared_engine: LocalEngine, folder: Path) -> None:
    model = shared_engine.library.find(str(folder))
    found = with_defaults(ask(folder, steps=None, cfg=None), model)
    assert (model.base, model.variant, found.steps, found.cfg) == ("qwen-image", "text-to-image", 50, 4.0)


@pytest.mark.parametrize("strength", thinned([0.5, 0.34, 1.0]))
def test_image_to_image(strength: float, shared_engine: LocalEngine, folder: Path, picture: Path, pipe: Any) -> None:
    other = diffusers.QwenImageImg2ImgPipeline(**pipe.components)
    wanted = theirs(other, 4.0, NEGATIVE, 5, image=Image.open(picture), strength=strength)
    changes = {"cfg": 4.0, "negative": NEGATIVE, "steps": 5, "image": str(picture), "strength": strength}
    assert ours(shared_engine, folder, **changes) == wanted


@pytest.mark.parametrize("strength", thinned([0.6, 1.0]))
def test_inpainting(
    strength: float, shared_engine: LocalEngine, folder: Path, picture: Path, mask: Path, pipe: Any
) -> None:
    other = diffusers.QwenImageInpaintPipeline(**pipe.components)
    pictures = {"image": Image.open(picture), "mask_image": Image.open(mask)}
    found = theirs(other, 1.0, None, 4, strength=strength, **pictures)
    drawn = np.frombuffer(found, np.uint8).reshape(48, 64, 3)
    outside = np.asarray(Image.open(mask))[..., None] < 128
    wanted = np.where(outside, np.asarray(Image.open(picture)), drawn)
    changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": strength, "mask_blur": 0}
    assert ours(shared_engine, folder, **changes) == wanted.tobytes()


@pytest.mark.parametrize("schedule", thinned(["karras", "exponential"]))
def test_schedules(schedule: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    settings = {**qwen_image.SCHEDULER, f"use_{schedule}_sigmas": True}
    other = diffusers.QwenImagePipeline(
        **{**pipe.components, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings)}
    )
    assert ours(shared_engine, folder, steps=5, schedule=schedule) == theirs(other, steps=5)


@torch.no_grad()
def looped(pipe: Any, scheduler: Any, steps: int) -> bytes:
    """Draw with diffusers' modules and scheduler in a plain loop: the pipeline passes sigmas, which few take."""
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(11)
    hidden, _ = pipe.encode_prompt(PROMPT)
    latents = pipe.prepare_latents(1, 16, 48, 64, torch.float32, "cpu", generator)
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler | diffusers.FlowMatchLCMScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu(TOKENS, steps))
    else:
        scheduler.set_timesteps(steps)
    lcm = isinstance(scheduler, diffusers.FlowMatchLCMScheduler)
    for time in scheduler.timesteps:
        found = pipe.transformer(
            latents, hidden, timestep=time.expand(1) / 1000, img_shapes=[[(1, 3, 4)]], return_dict=False
        )[0]
        if lcm:
            # The order of the noise is that of unpacked latents.
            found, latents = (pipe._unpack_latents(one, 48, 64, 8)[:, :, 0] for one in (found, latents))
            latents = scheduler.step(found, time, latents, generator=generator, return_dict=False)[0]
            latents = pipe._pack_latents(latents, 1, 16, 6, 8)
        else:
            latents = scheduler.step(found, time, latents, return_dict=False)[0]
    mean, deviation = (torch.tensor(one)[:, None, None, None] for one in (
        pipe.vae.config.latents_mean, pipe.vae.config.latents_std
    ))  # fmt: skip
    latents = pipe._unpack_latents(latents, 48, 64, 8) / (1.0 / deviation) + mean
    decoded = pipe.vae.decode(latents, return_dict=False)[0][:, :, 0]
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0].tobytes()


def stretched(scheduler: Any) -> Any:
    """A scheduler that lacks ``shift_terminal``, with levels that diffusers' other class stretches."""
    begin, other = scheduler.set_timesteps, diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)

    def set_timesteps(*arguments: Any, **more: Any) -> None:
        begin(*arguments, **more)
        levels = other.stretch_shift_to_terminal(scheduler.sigmas[:-1])
        assert abs(float(levels[-1]) - 0.02) < 1e-6
        scheduler.sigmas[:-1] = levels
        scheduler.timesteps = (levels * 1000).to(scheduler.timesteps.dtype)

    scheduler.set_timesteps = set_timesteps
    return scheduler


@pytest.mark.parametrize("sampler", thinned(["heun", "lcm", "dpmpp_2m", "unipc"], 2))
def test_samplers_that_the_pipeline_lacks(sampler: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    shift = math.exp(mu(TOKENS, 4))
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler: Any = {
        "heun": lambda: stretched(diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)),
        "dpmpp_2m": lambda: stretched(diffusers.DPMSolverMultistepScheduler(**flow)),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow, shift_terminal=0.02),
        "lcm": lambda: diffusers.FlowMatchLCMScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    }[sampler]()
    assert ours(shared_engine, folder, sampler=sampler, steps=4) == looped(pipe, scheduler, 4)


def test_one_step(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    """diffusers stretches the levels to the last one, which for a single level gives NaN. It has none to stretch."""
    settings = {**qwen_image.SCHEDULER, "shift_terminal": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings)
    assert ours(shared_engine, folder, steps=1) == looped(pipe, scheduler, 1)


def test_bf16(tmp_path: Path, folder: Path) -> None:
    """The noise is drawn in fp32 for every dtype; diffusers draws it in bf16, so it is given the same noise."""
    pipe = qwen_image.loaded(folder, torch.bfloat16)
    noise = draw_seeded_noise((1, 16, 6, 8), 11, torch.bfloat16, torch.device("cpu"))
    wanted = theirs(pipe, 4.0, NEGATIVE, latents=pipe._pack_latents(noise, 1, 16, 6, 8))
    engine = safelight.open_engine(tmp_path / "root")
    assert ours(engine, folder, precision="bf16", cfg=4.0, negative=NEGATIVE) == wanted


TEXTS = ["", "a red apple", "  été\n<|im_end|> <think></tool_response> <tool_call> 你好 🍎 1234  ", "apple pear " * 900]


@pytest.mark.full
def test_the_tokenizer_is_that_of_qwen2_5() -> None:
    """transformers' Qwen2Tokenizer, with the tokens that Qwen2.5 has besides its vocabulary, and no others."""
    other = qwen_image.qwen2_tokenizer()
    assert len(other) == 151665
    for text in TEXTS:
        assert qwen25_model.tokenizer().encode(text, add_special_tokens=False).ids == other(text).input_ids


@pytest.mark.parametrize("prompt", TEXTS)
def test_token_ids(prompt: str, pipe: Any) -> None:
    pair = PromptText("prompt", prompt)
    inputs = family_model(QWEN_IMAGE).text_inputs(QWEN_IMAGE, "text_encoder", ask(Path("x")), [pair], {})
    text = pipe.prompt_template_encode.format(prompt)
    found = pipe.tokenizer(text, truncation=True, max_length=pipe.tokenizer_max_length + 34)
    assert inputs.each[pair].value == found.input_ids


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "a (red:1.3) apple"}, r"\(red:1.3\) has no meaning for"),
        ({"clip_skip": 1}, "asks for CLIP skip, which"),
        ({"guidance": 3.5}, "guidance=3.5: has no effect"),
        ({"prompt_syntax": "compel"}, "asks for compel's syntax, which"),
        ({"sampler": "ddim"}, "is not for qwen-image, which has: euler, heun, dpmpp_2m, unipc, lcm"),
        ({"width": 72}, "must be a multiple of 16 for qwen-image"),
        ({"seamless": "x"}, "asks for seamless images, which"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict[str, Any], says: str, shared_engine: LocalEngine, folder: Path
) -> None:
    with pytest.raises(RequestError, match=says):
        ours(shared_engine, folder, **changes)
