"""FLUX.1's pixels equal those of diffusers' pipelines, bit for bit, on a CPU in fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support import flux
from support.scale import thinned

import safelight
from safelight.errors import RequestError
from safelight.families.flux.model import clip_tokens
from safelight.families.parts import t5_model
from safelight.pictures.chunks import parameters
from safelight.pipeline.noise import draw_seeded_noise
from safelight.resolve.resolve import with_defaults
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "a red apple (fresh)"
LENGTHS = {"dev": 512, "schnell": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux")
    return {variant: flux.write_folder(root / variant, SEED, variant) for variant in LENGTHS}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {variant: flux.pipeline(SEED, variant) for variant in LENGTHS}


def theirs(pipe: Any, steps: int = 3, prompt: str = PROMPT, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    variant = "dev" if pipe.transformer.config.guidance_embeds else "schnell"
    image = pipe(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(11),
        max_sequence_length=LENGTHS[variant],
        **{"width": 64, "height": 48, "guidance_scale": 3.5, **call},
    ).images[0]
    return image.tobytes()


def ask(path: Path, **changes: Any) -> safelight.Request:
    values = {"prompt": PROMPT, "steps": 3, "width": 64, "height": 48, "seed": 11, **changes}
    return safelight.Request(model=str(path), **values)


def ours(engine: LocalEngine, path: Path, **changes: Any) -> bytes:
    return next(engine.generate(ask(path, **changes))).pixels


@pytest.mark.parametrize("prompt", thinned([PROMPT, "", "word " * 600]))
@pytest.mark.parametrize("variant", LENGTHS)
def test_text_to_image(
    variant: str, prompt: str, shared_engine: LocalEngine, folders: dict[str, Path], pipes: dict[str, Any]
) -> None:
    assert ours(shared_engine, folders[variant], prompt=prompt) == theirs(pipes[variant], prompt=prompt)


def test_the_shift_follows_the_size(
    shared_engine: LocalEngine, folders: dict[str, Path], pipes: dict[str, Any]
) -> None:
    size = {"width": 128, "height": 192}
    assert ours(shared_engine, folders["dev"], **size) == theirs(pipes["dev"], **size)


def test_guidance(shared_engine: LocalEngine, folders: dict[str, Path], pipes: dict[str, Any]) -> None:
    drawn = {scale: ours(shared_engine, folders["dev"], guidance=scale) for scale in (0.0, 3.5, 8.0)}
    assert drawn == {scale: theirs(pipes["dev"], guidance_scale=scale) for scale in drawn}
    assert len(set(drawn.values())) == 3


def test_the_guidance_is_recorded(shared_engine: LocalEngine, folders: dict[str, Path]) -> None:
    image = next(shared_engine.generate(ask(folders["dev"])))
    assert image.metadata["repairs"] == []
    assert "CFG scale: 1.0, " in parameters(image.metadata)
    assert "Distilled CFG Scale: 3.5" in parameters(image.metadata)


@pytest.mark.parametrize(("variant", "wanted"), [("dev", (28, 1.0, 3.5)), ("schnell", (4, 1.0, None))])
def test_defaults(
    variant: str, wanted: tuple[object, ...], shared_engine: LocalEngine, folders: dict[str, Path]
) -> None:
    path = folders[variant]
    model = shared_engine.library.find(str(path))
    found = with_defaults(ask(path, steps=None), model)
    assert model.variant == variant
    assert (found.steps, found.cfg, found.guidance) == wanted


@pytest.mark.parametrize("variant", thinned(LENGTHS))
@pytest.mark.parametrize("strength", thinned([0.5, 0.34, 1.0]))
def test_image_to_image(
    strength: float,
    variant: str,
    shared_engine: LocalEngine,
    folders: dict[str, Path],
    picture: Path,
    pipes: dict[str, Any],
) -> None:
    other = diffusers.FluxImg2ImgPipeline(**_components(pipes[variant]))
    wanted = theirs(other, 5, image=Image.open(picture), strength=strength)
    assert ours(shared_engine, folders[variant], steps=5, image=str(picture), strength=strength) == wanted


def _components(pipe: Any) -> dict[str, Any]:
    return {name: one for name, one in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}


@pytest.mark.parametrize("variant", thinned(LENGTHS))
@pytest.mark.parametrize("strength", thinned([0.6, 1.0]))
def test_inpainting(
    strength: float,
    variant: str,
    shared_engine: LocalEngine,
    folders: dict[str, Path],
    picture: Path,
    mask: Path,
    pipes: dict[str, Any],
) -> None:
    other = diffusers.FluxInpaintPipeline(**_components(pipes[variant]))
    pictures = {"image": Image.open(picture), "mask_image": Image.open(mask)}
    drawn = np.frombuffer(theirs(other, 4, strength=strength, **pictures), np.uint8).reshape(48, 64, 3)
    outside = np.asarray(Image.open(mask))[..., None] < 128
    wanted = np.where(outside, np.asarray(Image.open(picture)), drawn)
    changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": strength, "mask_blur": 0}
    assert ours(shared_engine, folders[variant], **changes) == wanted.tobytes()


@pytest.mark.parametrize("variant", thinned(LENGTHS))
@pytest.mark.parametrize("schedule", thinned(["karras", "exponential"]))
def test_schedules(schedule: str, variant: str, shared_engine: LocalEngine, folders: dict[str, Path]) -> None:
    pipe = flux.pipeline(SEED, variant, **{f"use_{schedule}_sigmas": True})
    assert ours(shared_engine, folders[variant], steps=5, schedule=schedule) == theirs(pipe, 5)


@pytest.mark.parametrize("variant", thinned(LENGTHS))
@pytest.mark.parametrize("sampler", thinned(["heun", "dpmpp_2m", "unipc", "lcm"]))
def test_samplers_that_the_pipeline_lacks(
    sampler: str, variant: str, shared_engine: LocalEngine, folders: dict[str, Path], pipes: dict[str, Any]
) -> None:
    """The oracle is a loop over diffusers' scheduler and model: the pipeline passes sigmas, which few take."""
    tokens = 3 * 4
    shift = math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)) if variant == "dev" else 1.0
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler: Any = {
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=shift),
    }[sampler]()
    assert ours(shared_engine, folders[variant], sampler=sampler, steps=4) == looped(pipes[variant], scheduler, 4)


@torch.no_grad()
def looped(pipe: Any, scheduler: Any, steps: int) -> bytes:
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(11)
    dev = pipe.transformer.config.guidance_embeds
    hidden, pooled, places = pipe.encode_prompt(PROMPT, None, max_sequence_length=512 if dev else 256)
    latents, positions = pipe.prepare_latents(1, 16, 48, 64, torch.float32, "cpu", generator)
    lcm = isinstance(scheduler, diffusers.FlowMatchLCMScheduler)
    if lcm:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)
    for time in scheduler.timesteps:
        found = pipe.transformer(
            latents,
            hidden,
            pooled,
            time.expand(1) / 1000,
            positions,
            places,
            torch.full([1], 3.5) if dev else None,
            return_dict=False,
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


@pytest.mark.parametrize("variant", LENGTHS)
def test_bf16(variant: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    """The noise is drawn in fp32 for every dtype; diffusers draws it in bf16, so it is given the same noise."""
    pipe = flux.loaded(folders[variant], torch.bfloat16)
    noise = draw_seeded_noise((1, 16, 6, 8), 11, torch.bfloat16, torch.device("cpu"))
    wanted = theirs(pipe, latents=pipe._pack_latents(noise, 1, 16, 6, 8))
    assert ours(safelight.open_engine(tmp_path / "root"), folders[variant], precision="bf16") == wanted


@pytest.mark.full
def test_in_fp16_t5_computes_in_fp32(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Its last projections overflow in fp16; transformers, too, keeps them in fp32."""
    engine = safelight.open_engine(tmp_path / "root")
    assert len(ours(engine, folders["schnell"], precision="fp16", steps=1)) == 64 * 48 * 3


@pytest.mark.parametrize("length", [256, 512])
@pytest.mark.parametrize("prompt", ["", "a red apple", "  été\n</s> <pad> 你好 🍎 1234  ", "two  words", "word " * 600])
def test_token_ids(prompt: str, length: int) -> None:
    padded = {"padding": "max_length", "truncation": True}
    assert t5_model.tokens_of(prompt, length)[0] == flux.t5_tokenizer()(prompt, max_length=length, **padded).input_ids
    clip = flux.clip_tokenizer("<|endoftext|>")
    assert clip_tokens(prompt) == clip(prompt, max_length=77, **padded).input_ids


def test_what_t5_cuts_off_is_said() -> None:
    ids, cut = t5_model.tokens_of("word " * 300 + "end", 256)
    assert len(ids) == 256
    assert cut.split() == ["word"] * 45 + ["end"]


@pytest.mark.parametrize(
    ("variant", "changes", "says"),
    [
        ("dev", {"negative": "green"}, "negative='green': asks for a negative prompt"),
        ("dev", {"cfg": 2.0}, "cfg=2.0: asks for a guidance scale"),
        ("schnell", {"cfg": 2.0}, "cfg=2.0: asks for a guidance scale"),
        ("schnell", {"guidance": 3.5}, "guidance=3.5: has no effect"),
        ("dev", {"clip_skip": 1}, "clip_skip=1: asks for CLIP skip"),
        ("dev", {"prompt_syntax": "compel"}, "asks for compel's syntax"),
        ("dev", {"seamless": "x"}, "seamless='x': asks for seamless images"),
        ("dev", {"width": 72}, "width=72: must be a multiple of 16 for flux"),
        ("dev", {"sampler": "ddim"}, "sampler='ddim': is not for flux"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    variant: str, changes: dict[str, Any], says: str, shared_engine: LocalEngine, folders: dict[str, Path]
) -> None:
    with pytest.raises(RequestError) as error:
        ours(shared_engine, folders[variant], **changes)
    assert says in str(error.value)


def test_guidance_is_refused_for_other_families(shared_engine: LocalEngine, tiny: Path) -> None:
    with pytest.raises(RequestError, match=r"guidance=3\.5: has no effect"):
        ours(shared_engine, tiny / "a.safetensors", guidance=3.5)
