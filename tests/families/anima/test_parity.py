"""Anima's pixels equal those of diffusers' modular pipeline, bit for bit, on a CPU.

The pipeline takes no masks and has one sampler. A loop of the test over diffusers' scheduler and modules is the oracle
for the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.anima.encoders import encode_vae_image
from PIL import Image
from support import anima
from support.scale import thinned

import safelight
from safelight.errors import RequestError
from safelight.families.anima.spec import ANIMA
from safelight.families.family_model import PromptText, family_model
from safelight.resolve.resolve import with_defaults
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "a red apple (fresh)"
NEGATIVE = "a blurred picture of many green pears"
CFG = 3.0


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def pipe(tokenizers: Path) -> Any:
    return anima.pipeline(SEED, tokenizers)


def theirs(pipe: Any, cfg: float = CFG, steps: int = 3, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=cfg))
    image = pipe(
        **{"prompt": PROMPT, "negative_prompt": NEGATIVE, "width": 64, "height": 48, **call},
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    return image.tobytes()


def ask(path: Path, **changes: Any) -> safelight.Request:
    size = {"width": 64, "height": 48, "seed": 11}
    values = {"prompt": PROMPT, "negative": NEGATIVE, "steps": 3, "cfg": CFG, **size, **changes}
    return safelight.Request(model=str(path), **values)


def ours(engine: LocalEngine, path: Path, **changes: Any) -> bytes:
    return next(engine.generate(ask(path, **changes))).pixels


@pytest.mark.parametrize("prompt", thinned([PROMPT, "", "  été 你好 🍎 \n " * 60], 2))
def test_text_to_image(prompt: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    assert ours(shared_engine, folder, prompt=prompt) == theirs(pipe, prompt=prompt)


def test_without_guidance(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    assert ours(shared_engine, folder, cfg=1.0, negative="") == theirs(pipe, 1.0)
    model = shared_engine.library.find(str(folder))
    found = with_defaults(ask(folder, steps=None, cfg=None), model)
    assert (model.variant, found.steps, found.cfg) == ("text-to-image", 30, 4.0)


def test_an_empty_negative_prompt(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    """diffusers gives the text encoder one token that is hidden, and replaces what it returns with zeros."""
    assert ours(shared_engine, folder, negative="") == theirs(pipe, negative_prompt=None)


@pytest.mark.parametrize("strength", thinned([0.5, 0.34, 1.0], 2))
def test_image_to_image(strength: float, shared_engine: LocalEngine, folder: Path, picture: Path, pipe: Any) -> None:
    wanted = theirs(pipe, steps=4, image=Image.open(picture), strength=strength)
    assert ours(shared_engine, folder, steps=4, image=str(picture), strength=strength) == wanted


def test_bf16(tmp_path: Path, folder: Path, tokenizers: Path) -> None:
    """The noise of Safelight is drawn in fp32 and rounded, so the pipeline is given that noise."""
    noise = torch.randn(1, 16, 6, 8, generator=torch.Generator("cpu").manual_seed(11)).bfloat16()
    found = ours(safelight.open_engine(tmp_path / "root"), folder, precision="bf16")
    pipe = anima.loaded(folder, tokenizers, torch.bfloat16)
    assert pipe.text_conditioner.rotary_emb.inv_freq.dtype == torch.float32
    assert found == theirs(pipe, latents=noise.unsqueeze(2))


def velocity(pipe: Any, latents: torch.Tensor, time: torch.Tensor, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Call the transformer for both prompts."""
    call = {"timestep": time[None] / 1000, "padding_mask": torch.zeros(1, 1, 48, 64), "return_dict": False}
    right, wrong = (
        pipe.transformer(latents, encoder_hidden_states=texts[f"{which}prompt_embeds"], **call)[0]
        for which in ("", "negative_")
    )
    return wrong + CFG * (right - wrong)


def encoded(pipe: Any, picture: Path) -> torch.Tensor:
    mean, std = (torch.tensor(pipe.vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    shown = pipe.image_processor.preprocess(Image.open(picture)).unsqueeze(2)
    return (pipe.vae.encode(shown).latent_dist.mode() - mean) / std


@torch.no_grad()
def looped(
    pipe: Any, scheduler: Any, steps: int, picture: Path | None = None, mask: Path | None = None, strength: float = 1.0
) -> bytes:
    """Denoise with diffusers' scheduler and modules, as its pipelines for flows do with pictures and masks."""
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(11)
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=CFG))
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "width": 64, "height": 48, "num_inference_steps": 1}
    names = ["prompt_embeds", "negative_prompt_embeds"]
    texts = pipe(**call, output=names)
    takes = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler | diffusers.FlowMatchLCMScheduler)
    levels = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    scheduler.set_timesteps(**(levels if takes else {"num_inference_steps": steps}))
    first = int(max(steps - min(steps * strength, steps), 0)) * scheduler.order
    times = scheduler.timesteps[first:]
    scheduler.set_begin_index(first)
    whole = None if picture is None else encoded(pipe, picture)
    noise = torch.randn(1, 16, 1, 6, 8, generator=generator)
    latents = noise if whole is None or strength == 1 else scheduler.scale_noise(whole, times[:1], noise)
    free = torch.ones(1) if mask is None else torch.tensor(np.asarray(Image.open(mask))[::8, ::8] / 255).float()
    more = {"generator": generator} if isinstance(scheduler, diffusers.FlowMatchLCMScheduler) else {}
    for at, time in enumerate(times):
        found = velocity(pipe, latents, time, texts)
        latents = scheduler.step(found, time, latents, return_dict=False, **more)[0]
        if mask is not None:
            kept = whole if at + 1 == len(times) else scheduler.scale_noise(whole, times[at + 1 : at + 2], noise)
            latents = (1 - free) * kept + free * latents
    mean, std = (torch.tensor(pipe.vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    shown = pipe.vae.decode(latents / (1.0 / std) + mean).sample[:, :, 0]
    return pipe.image_processor.postprocess(shown, output_type="pil")[0].tobytes()


def euler(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=anima.SHIFT, **settings)


@pytest.mark.full
def test_the_loop_is_the_pipeline(pipe: Any) -> None:
    assert looped(pipe, euler(), 3) == theirs(pipe)


@pytest.mark.parametrize("schedule", thinned(["karras", "exponential"], 0))
def test_schedules(schedule: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    wanted = looped(pipe, euler(**{f"use_{schedule}_sigmas": True}), 4)
    assert ours(shared_engine, folder, steps=4, schedule=schedule) == wanted


@pytest.mark.parametrize("strength", thinned([0.6, 1.0]))
def test_inpainting(
    strength: float, shared_engine: LocalEngine, folder: Path, picture: Path, mask: Path, pipe: Any
) -> None:
    found = looped(pipe, euler(), 4, picture, mask, strength)
    drawn = np.frombuffer(found, np.uint8).reshape(48, 64, 3)
    outside = np.asarray(Image.open(mask))[..., None] < 128
    wanted = np.where(outside, np.asarray(Image.open(picture)), drawn)
    changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": strength, "mask_blur": 0}
    assert ours(shared_engine, folder, **changes) == wanted.tobytes()


@pytest.mark.parametrize("sampler", thinned(["dpmpp_2m", "heun", "unipc", "lcm"]))
def test_samplers_that_the_pipeline_lacks(sampler: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": anima.SHIFT}
    scheduler: Any = {
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=anima.SHIFT),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=anima.SHIFT),
    }[sampler]()
    assert ours(shared_engine, folder, sampler=sampler, steps=4) == looped(pipe, scheduler, 4)


@pytest.mark.parametrize("prompt", ["", "a red apple", "\n  été\n<|im_end|> </s> 你好 🍎 1234  ", "apple " * 600])
def test_token_ids(prompt: str, pipe: Any) -> None:
    pair = PromptText("prompt", prompt)
    model = family_model(ANIMA)
    for role, tokenizer in (("text_encoder", pipe.tokenizer), ("text_conditioner", pipe.t5_tokenizer)):
        found = model.text_inputs(ANIMA, role, ask(Path("m")), [pair], {}).each[pair].value
        assert found == tokenizer(prompt, truncation=True, max_length=512).input_ids, role


def test_a_long_prompt_is_cut_and_said(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    prompt = "apple " * 600
    image = next(shared_engine.generate(ask(folder, prompt=prompt, steps=1)))
    said = [one for one in image.warnings if "cut off" in one]
    assert ["text_encoder takes" in said[0], "text_conditioner takes" in said[1]] == [True, True]
    assert image.pixels == theirs(pipe, steps=1, prompt=prompt)


def test_another_text_encoder_is_another_condition(root: Path, folder: Path, tmp_path: Path, pipe: Any) -> None:
    """STATE 13: what the text conditioner returned is not taken for the same text with another text encoder."""
    other = anima.write_folder(tmp_path / "other", SEED, text_encoder_seed=6)
    engine: Any = safelight.open_engine(root)
    one, two = (engine.library.add(path, path.name) for path in (folder, other))
    assert one.manifest.component("text_conditioner").digest == two.manifest.component("text_conditioner").digest
    right = ours(engine, Path(one.name))
    assert right == theirs(pipe)
    assert ours(engine, Path(two.name)) != right
    assert ours(engine, Path(one.name)) == right


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "a (red:1.3) apple"}, r"\(red:1.3\) has no meaning for"),
        ({"guidance": 3.0}, "guidance"),
        ({"clip_skip": 1}, "asks for CLIP skip, which"),
        ({"sampler": "ddim"}, "is not for anima, which has: euler, heun, dpmpp_2m, unipc, lcm"),
        ({"width": 72}, "must be a multiple of 16 for anima"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict[str, Any], says: str, shared_engine: LocalEngine, folder: Path
) -> None:
    with pytest.raises(RequestError, match=says):
        ours(shared_engine, folder, **changes)


def test_a_run_leaves_the_skeletons_as_they_were(shared_engine: LocalEngine, folder: Path) -> None:
    right = ours(shared_engine, folder)
    for changes in ({"width": 80, "tile": 64}, {"hires_scale": 1.5}):
        image = next(shared_engine.generate(ask(folder, **changes)))
        assert len(set(image.pixels)) > 100
    skeletons = shared_engine.resources.skeletons
    assert {key.role for key in skeletons._free if key.base == "anima"} == set(ANIMA.roles)
    assert skeletons.check() == []
    assert ours(shared_engine, folder) == right


def test_an_image_may_be_larger_than_the_published_settings_say(shared_engine: LocalEngine, folder: Path) -> None:
    """diffusers' model has positions for 2,048 pixels; the published settings name 1,920."""
    assert len(ours(shared_engine, folder, width=2064, height=16, steps=1)) == 2064 * 16 * 3


def test_texts_with_the_same_tokens_of_t5_have_keys_of_their_own() -> None:
    """T5's tokenizer joins spaces, and Qwen3's does not: the text conditioner reads other states then."""
    model, pairs = family_model(ANIMA), [PromptText("prompt", text) for text in ("a red apple", "a  red apple")]
    one, other = model.text_inputs(ANIMA, "text_conditioner", ask(Path("m")), pairs, {}).each.values()
    assert one.value == other.value
    assert one.key != other.key


def test_a_picture_s_latents_are_those_of_diffusers_to_the_last_bit(picture: Path, pipe: Any) -> None:
    """Anima's pipeline divides by the deviation. Others multiply by its inverse, which pixels do not always show."""
    torch.set_num_threads(1)
    with torch.no_grad():
        [found] = family_model(ANIMA).encode_picture(
            ANIMA.latents, pipe.vae, Image.open(picture), None, torch.device("cpu"), 0
        )
        shown = pipe.image_processor.preprocess(Image.open(picture))
        args = (shown, pipe.vae, torch.Generator(), torch.device("cpu"), torch.float32)
        assert torch.equal(found.distribution.mode(), encode_vae_image(*args).squeeze(2))
