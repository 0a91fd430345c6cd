"""Chroma's pixels equal those of diffusers' pipelines, bit for bit, on a CPU in fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support import chroma
from support.scale import thinned

import safelight
from safelight.errors import RequestError
from safelight.families.parts import t5_model
from safelight.pipeline import beta_spacing
from safelight.pipeline.noise import draw_seeded_noise
from safelight.resolve.resolve import with_defaults
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "a red apple (fresh)"
NEGATIVE = "blurry, a worm"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chroma")
    first = chroma.write_folder(root / "hd", SEED)
    return {variant: first if variant == "hd" else chroma.as_variant(first, variant) for variant in chroma.SCHEDULERS}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return chroma.pipeline(SEED)


def inpainting(pipe: Any) -> Any:
    """diffusers' pipeline for masks reads a setting that only the published ``config.json`` has, not the class."""
    pipe.transformer.register_to_config(guidance_embeds=False)
    return diffusers.ChromaInpaintPipeline(**_components(pipe))


def theirs(pipe: Any, steps: int = 3, prompt: str = PROMPT, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(11),
        # The default of the pipeline for masks is 256.
        max_sequence_length=512,
        **{"width": 64, "height": 48, "guidance_scale": 3.0, "negative_prompt": NEGATIVE, **call},
    ).images[0]
    return image.tobytes()


def ask(path: Path, **changes: Any) -> safelight.Request:
    values = {"prompt": PROMPT, "negative": NEGATIVE, "steps": 3, "width": 64, "height": 48, "seed": 11, **changes}
    return safelight.Request(model=str(path), **values)


def ours(engine: LocalEngine, path: Path, **changes: Any) -> bytes:
    return next(engine.generate(ask(path, **{"cfg": 3.0, **changes}))).pixels


@pytest.mark.parametrize("prompt", thinned([PROMPT, "", "word " * 600], 2))
def test_text_to_image(prompt: str, shared_engine: LocalEngine, folders: dict[str, Path], pipe: Any) -> None:
    assert ours(shared_engine, folders["hd"], prompt=prompt) == theirs(pipe, prompt=prompt)


@pytest.mark.parametrize("scale", thinned([1.0, 7.5]))
def test_guidance(scale: float, shared_engine: LocalEngine, folders: dict[str, Path], pipe: Any) -> None:
    changes = {"negative": NEGATIVE if scale > 1 else ""}
    assert ours(shared_engine, folders["hd"], cfg=scale, **changes) == theirs(pipe, guidance_scale=scale)


@pytest.mark.parametrize("variant", ["flash", "base", "unlocked"])
def test_noise_levels_of_the_variants(variant: str, shared_engine: LocalEngine, folders: dict[str, Path]) -> None:
    if variant == "base":
        pytest.importorskip("scipy")
    size = {"width": 128, "height": 64}
    drawn = ours(shared_engine, folders[variant], steps=4, cfg=1.0, negative="", **size)
    assert drawn == theirs(chroma.pipeline(SEED, variant), 4, guidance_scale=1.0, **size)


def test_the_beta_distribution_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count in (1, 2, 3, 28, 50):
        levels = np.linspace(1.0, 1 / count, count).tolist()
        last = float(np.float32(levels[-1]))
        right = [last + stats.beta.ppf(share, 0.6, 0.6) * (1 - last) for share in 1 - np.linspace(0, 1, count)]
        assert np.array_equal(np.float32(beta_spacing.spread(levels)), np.float32(right))


@pytest.mark.parametrize(
    ("variant", "wanted"), [("hd", (40, 3.0)), ("base", (40, 3.0)), ("flash", (16, 1.0)), ("unlocked", (35, 5.0))]
)
def test_the_variant_of_a_folder_and_its_defaults(
    variant: str, wanted: tuple[object, ...], shared_engine: LocalEngine, folders: dict[str, Path]
) -> None:
    model = shared_engine.library.find(str(folders[variant]))
    found = with_defaults(ask(folders[variant], steps=None), model)
    assert model.variant == variant
    assert (found.steps, found.cfg, found.guidance) == (*wanted, None)


@pytest.mark.parametrize("strength", thinned([0.5, 0.34, 1.0]))
def test_image_to_image(
    strength: float, shared_engine: LocalEngine, folders: dict[str, Path], picture: Path, pipe: Any
) -> None:
    other = diffusers.ChromaImg2ImgPipeline(**_components(pipe))
    wanted = theirs(other, 5, image=Image.open(picture), strength=strength)
    assert ours(shared_engine, folders["hd"], steps=5, image=str(picture), strength=strength) == wanted


def _components(pipe: Any) -> dict[str, Any]:
    return {name: one for name, one in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}


@pytest.mark.parametrize("strength", thinned([0.6, 1.0]))
def test_inpainting(
    strength: float, shared_engine: LocalEngine, folders: dict[str, Path], picture: Path, mask: Path, pipe: Any
) -> None:
    other = inpainting(pipe)
    pictures = {"image": Image.open(picture), "mask_image": Image.open(mask)}
    drawn = np.frombuffer(theirs(other, 4, strength=strength, **pictures), np.uint8).reshape(48, 64, 3)
    outside = np.asarray(Image.open(mask))[..., None] < 128
    wanted = np.where(outside, np.asarray(Image.open(picture)), drawn)
    changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": strength, "mask_blur": 0}
    assert ours(shared_engine, folders["hd"], **changes) == wanted.tobytes()


def test_outpainting_leaves_the_picture(shared_engine: LocalEngine, folders: dict[str, Path], picture: Path) -> None:
    image = next(
        shared_engine.generate(ask(folders["hd"], image=str(picture), outpaint=(32, 0, 0, 0), width=None, height=None))
    )
    drawn = np.frombuffer(image.pixels, np.uint8).reshape(48, 96, 3)
    assert np.array_equal(drawn[:, 64:], np.asarray(Image.open(picture))[:, 32:])


@pytest.mark.parametrize("schedule", thinned(["karras", "exponential"]))
def test_schedules(schedule: str, shared_engine: LocalEngine, folders: dict[str, Path]) -> None:
    pipe = chroma.pipeline(SEED, **{f"use_{schedule}_sigmas": True})
    assert ours(shared_engine, folders["hd"], steps=4, schedule=schedule) == theirs(pipe, 4)


@pytest.mark.parametrize("sampler", thinned(["heun", "lcm", "dpmpp_2m", "unipc"], 2))
@pytest.mark.parametrize("variant", thinned(["hd", "unlocked"]))
def test_samplers_that_the_pipeline_lacks(
    variant: str, sampler: str, shared_engine: LocalEngine, folders: dict[str, Path], pipe: Any
) -> None:
    """The oracle is a loop over diffusers' scheduler and model: the pipeline passes sigmas, which few take."""
    mu = 0.5 + (12 - 256) * (1.15 - 0.5) / (4096 - 256)
    shift = 3.0 if variant == "hd" else math.exp(mu)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler: Any = {
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0, use_dynamic_shifting=variant == "unlocked"),
    }[sampler]()
    changes = {"sampler": sampler, "steps": 4, "cfg": 1.0, "negative": ""}
    assert ours(shared_engine, folders[variant], **changes) == looped(pipe, scheduler, 4, mu)


@torch.no_grad()
def looped(pipe: Any, scheduler: Any, steps: int, mu: float) -> bytes:
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(11)
    hidden, places, mask, *_ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    latents, positions = pipe.prepare_latents(1, 16, 48, 64, torch.float32, "cpu", generator)
    mask = pipe._prepare_attention_mask(1, latents.shape[1], torch.float32, mask)
    lcm = isinstance(scheduler, diffusers.FlowMatchLCMScheduler)
    levels = {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist(), "mu": mu}
    scheduler.set_timesteps(**(levels if lcm else {"num_inference_steps": steps}))
    for time in scheduler.timesteps:
        found = pipe.transformer(
            latents, hidden, time.expand(1) / 1000, positions, places, attention_mask=mask, return_dict=False
        )[0]
        if lcm:
            # The order of the noise is that of unpacked latents.
            found, latents = (pipe._unpack_latents(one, 48, 64, 8) for one in (found, latents))
            latents = scheduler.step(found, time, latents, generator=generator, return_dict=False)[0]
            latents = pipe._pack_latents(latents, 1, 16, 6, 8)
        else:
            latents = scheduler.step(found, time, latents, return_dict=False)[0]
    latents = pipe._unpack_latents(latents, 48, 64, 8) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")[0].tobytes()


@pytest.mark.parametrize("task", thinned(["text", "mask"]))
def test_bf16(task: str, tmp_path: Path, folders: dict[str, Path], picture: Path, mask: Path) -> None:
    """The noise is drawn in fp32 for every dtype; diffusers draws it in bf16, so it is given the same noise."""
    pipe = chroma.loaded(folders["hd"], torch.bfloat16)
    engine = safelight.open_engine(tmp_path / "root")
    noise = draw_seeded_noise((1, 16, 6, 8), 11, torch.bfloat16, torch.device("cpu"))
    if task == "text":
        wanted = theirs(pipe, latents=pipe._pack_latents(noise, 1, 16, 6, 8))
        assert ours(engine, folders["hd"], precision="bf16") == wanted
    else:
        other = inpainting(pipe)
        pictures = {"image": Image.open(picture), "mask_image": Image.open(mask)}
        drawn = np.frombuffer(theirs(other, 4, strength=0.6, **pictures), np.uint8).reshape(48, 64, 3)
        outside = np.asarray(Image.open(mask))[..., None] < 128
        wanted = np.where(outside, np.asarray(Image.open(picture)), drawn).tobytes()
        changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": 0.6, "mask_blur": 0}
        assert ours(engine, folders["hd"], precision="bf16", **changes) == wanted


@pytest.mark.parametrize("prompt", ["", "a red apple", "<pad> a <pad>", "word " * 600])
def test_token_ids_and_masks(prompt: str, pipe: Any) -> None:
    found = pipe.tokenizer(prompt, padding="max_length", max_length=512, truncation=True)
    ids, _ = t5_model.tokens_of(prompt, 512)
    assert ids == found.input_ids
    assert t5_model.mask_of(ids, torch.device("cpu"))[0].tolist() == found.attention_mask


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"guidance": 3.5}, "guidance=3.5: has no effect"),
        ({"clip_skip": 1}, "clip_skip=1: asks for CLIP skip"),
        ({"prompt": "a (red:1.3) apple"}, "has no meaning for"),
        ({"width": 72}, "width=72: must be a multiple of 16 for chroma"),
        ({"sampler": "ddim"}, "sampler='ddim': is not for chroma"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict[str, Any], says: str, shared_engine: LocalEngine, folders: dict[str, Path]
) -> None:
    with pytest.raises(RequestError) as error:
        ours(shared_engine, folders["hd"], **changes)
    assert says in str(error.value)
