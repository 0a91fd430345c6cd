"""ERNIE-Image's pixels equal those of diffusers' pipeline, bit for bit, on a CPU in fp32.

The pipeline takes no pictures. A loop of the test over diffusers' scheduler and model is the oracle for these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import ernie_image
from support.scale import thinned

import safelight
from safelight.errors import IntegrityError, RequestError, UnsupportedModelError
from safelight.families.family_model import PromptText
from safelight.families.parts import ministral3_model
from safelight.families.tokenizer_file import TokenizerContent
from safelight.pipeline.noise import draw_seeded_noise
from safelight.resolve.resolve import with_defaults
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "a red apple (fresh)"
NEGATIVE = "green rain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ernie_image.write_folder(tmp_path_factory.mktemp("ernie") / "tiny", SEED)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return ernie_image.pipeline(SEED)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> LocalEngine:
    found: Any = safelight.open_engine(tmp_path_factory.mktemp("root"))
    found.library.add(folder, "base", variant="base")
    return found


def theirs(pipe: Any, steps: int = 3, prompt: str = PROMPT, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(11),
        **{"width": 64, "height": 48, "guidance_scale": 3.0, "negative_prompt": NEGATIVE, **call},
    ).images[0]
    return image.tobytes()


def ask(**changes: Any) -> safelight.Request:
    values = {"negative": NEGATIVE, "steps": 3, "width": 64, "height": 48, "seed": 11, "cfg": 3.0, **changes}
    return safelight.Request(values.pop("prompt", PROMPT), values.pop("model", "base"), **values)


def ours(engine: LocalEngine, **changes: Any) -> bytes:
    return next(engine.generate(ask(**changes))).pixels


@pytest.mark.parametrize("prompt", thinned([PROMPT, "", "  été 你好 🍎  " * 60], 2))
def test_text_to_image(prompt: str, engine: LocalEngine, pipe: Any) -> None:
    assert ours(engine, prompt=prompt) == theirs(pipe, prompt=prompt)


def test_without_guidance(engine: LocalEngine, pipe: Any) -> None:
    assert ours(engine, cfg=1.0, negative="") == theirs(pipe, guidance_scale=1.0)


@pytest.mark.parametrize("schedule", thinned(["karras", "exponential"]))
def test_schedules(schedule: str, engine: LocalEngine, pipe: Any) -> None:
    before = pipe.scheduler
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0, **{f"use_{schedule}_sigmas": True})
    wanted = theirs(pipe, 4)
    pipe.scheduler = before
    assert ours(engine, steps=4, schedule=schedule) == wanted


def test_bf16(tmp_path: Path, folder: Path) -> None:
    """The noise is drawn in fp32 for every dtype; diffusers draws it in bf16, so it is given the same noise."""
    pipe = ernie_image.loaded(folder, torch.bfloat16)
    wanted = theirs(pipe, latents=draw_seeded_noise((1, 128, 3, 4), 11, torch.bfloat16, torch.device("cpu")))
    found: Any = safelight.open_engine(tmp_path / "root")
    found.library.add(folder, "base", variant="base")
    assert ours(found, precision="bf16") == wanted


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A picture, and a mask."""
    place = tmp_path_factory.mktemp("pictures")
    colours = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(2))
    Image.fromarray((colours * 255).byte().numpy()).resize((64, 48)).save(place / "picture.png")
    made = Image.new("L", (64, 48))
    made.paste(255, (16, 16, 48, 32))
    made.save(place / "mask.png")
    return place / "picture.png", place / "mask.png"


def encoded(pipe: Any, picture: torch.Tensor) -> torch.Tensor:
    patches = F.pixel_unshuffle(pipe.vae.encode(picture).latent_dist.mode(), 2)
    norm = pipe.vae.bn
    mean, variance = (one.view(1, -1, 1, 1) for one in (norm.running_mean, norm.running_var))
    return (patches - mean) / torch.sqrt(variance + 1e-5)


@torch.no_grad()
def looped(
    pipe: Any, scheduler: Any, steps: int, picture: Path | None = None, mask: Path | None = None, strength: float = 1.0
) -> bytes:
    """Denoise with diffusers' scheduler and model, as its pipelines for flows do with pictures and masks."""
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(11)
    texts = pipe.encode_prompt([NEGATIVE, PROMPT], "cpu")
    text, lengths = pipe._pad_text(texts, "cpu", torch.float32, 32)
    levels = {"sigmas": torch.linspace(1.0, 0.0, steps + 1)[:-1]}
    takes = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler | diffusers.FlowMatchLCMScheduler)
    scheduler.set_timesteps(**(levels if takes else {"num_inference_steps": steps}))
    first = int(max(steps - min(steps * strength, steps), 0)) * scheduler.order
    times = scheduler.timesteps[first:]
    scheduler.set_begin_index(first)
    whole = None if picture is None else encoded(pipe, pipe.image_processor.preprocess(Image.open(picture)))
    noise = torch.randn(1, 128, 3, 4, generator=generator)
    latents = noise if whole is None or strength == 1 else scheduler.scale_noise(whole, times[:1], noise)
    for at, time in enumerate(times):
        both = pipe.transformer(torch.cat([latents] * 2), time.expand(2), text, lengths, return_dict=False)[0]
        without, with_prompt = both.chunk(2)
        more = {"generator": generator} if isinstance(scheduler, diffusers.FlowMatchLCMScheduler) else {}
        found = without + 3.0 * (with_prompt - without)
        latents = scheduler.step(found, time, latents, return_dict=False, **more)[0]
        if mask is not None:
            shown = F.interpolate((pipe_mask(mask) >= 0.5).float(), size=(3, 4))
            kept = whole if at + 1 == len(times) else scheduler.scale_noise(whole, times[at + 1 : at + 2], noise)
            latents = (1 - shown) * kept + shown * latents
    norm = pipe.vae.bn
    mean, variance = (one.view(1, -1, 1, 1) for one in (norm.running_mean, norm.running_var))
    plain = pipe._unpatchify_latents(latents * torch.sqrt(variance + 1e-5) + mean)
    return pipe.image_processor.postprocess(pipe.vae.decode(plain).sample, output_type="pil")[0].tobytes()


def pipe_mask(mask: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(mask), np.float32) / 255)[None, None]


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)


def test_the_loop_is_the_pipeline(pipe: Any) -> None:
    assert looped(pipe, euler(), 3) == theirs(pipe)


@pytest.mark.parametrize("strength", thinned([0.5, 0.34]))
def test_image_to_image(strength: float, engine: LocalEngine, pictures: tuple[Path, Path], pipe: Any) -> None:
    wanted = looped(pipe, euler(), 5, pictures[0], strength=strength)
    assert ours(engine, steps=5, image=str(pictures[0]), strength=strength) == wanted


@pytest.mark.parametrize("strength", thinned([0.6, 1.0]))
def test_inpainting(strength: float, engine: LocalEngine, pictures: tuple[Path, Path], pipe: Any) -> None:
    picture, mask = pictures
    drawn = np.frombuffer(looped(pipe, euler(), 4, picture, mask, strength), np.uint8).reshape(48, 64, 3)
    outside = np.asarray(Image.open(mask))[..., None] < 128
    wanted = np.where(outside, np.asarray(Image.open(picture)), drawn)
    changes = {"steps": 4, "image": str(picture), "mask": str(mask), "strength": strength, "mask_blur": 0}
    assert ours(engine, **changes) == wanted.tobytes()


@pytest.mark.parametrize("sampler", thinned(["heun", "lcm", "dpmpp_2m", "unipc"], 2))
def test_samplers_that_the_pipeline_lacks(sampler: str, engine: LocalEngine, pipe: Any) -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 4.0}
    scheduler: Any = {
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=4.0),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=4.0),
    }[sampler]()
    assert ours(engine, sampler=sampler, steps=4) == looped(pipe, scheduler, 4)


@pytest.mark.parametrize("prompt", ["", "a red apple", "  été\n</s> <s> 你好 🍎 1234  ", "word " * 600])
def test_token_ids(prompt: str, pipe: Any) -> None:
    content = TokenizerContent("digest", ernie_image.tokenizer_file().encode())
    pair = PromptText("prompt", prompt)
    found = ministral3_model.text_inputs(content, [pair]).each[pair].value
    assert found == pipe.tokenizer(prompt, add_special_tokens=True, truncation=True, padding=False)["input_ids"]


@pytest.mark.parametrize(("variant", "wanted"), [("turbo", (8, 1.0)), ("base", (50, 4.0))])
def test_the_user_says_the_variant(variant: str, wanted: tuple[object, ...], root: Path, folder: Path) -> None:
    library = safelight.open_engine(root).library  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=r"--variant turbo or --variant base"):
        library.add(folder)
    found = with_defaults(ask(steps=None, cfg=None), library.add(folder, variant=variant))
    assert (found.steps, found.cfg, found.guidance) == (*wanted, None)


def test_a_missing_tokenizer_is_named_with_its_source(root: Path, tmp_path: Path) -> None:
    path = ernie_image.write_folder(tmp_path / "tiny", SEED)
    (path / "tokenizer/tokenizer.json").unlink()
    library = safelight.open_engine(root).library  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=r"tokenizer/tokenizer\.json there, which comes from baidu/ERNIE"):
        library.add(path, variant="base")


def test_another_tokenizer_is_another_text_encoder(root: Path, tmp_path: Path) -> None:
    path = ernie_image.write_folder(tmp_path / "tiny", SEED)
    engine: Any = safelight.open_engine(root)
    before = engine.library.add(path, "base", variant="base")
    drawn = ours(engine)
    file = path / "tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace('"<s>",1', '"<s>",2').replace('"ids":[1]', '"ids":[2]'))
    assert file.read_text() != ernie_image.tokenizer_file()
    with pytest.raises(IntegrityError, match="content"):
        ours(engine)
    after = engine.library.add(path, "base", variant="base")
    assert after.digest != before.digest
    assert ours(engine) != drawn


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"guidance": 3.5}, "guidance=3.5: has no effect"),
        ({"clip_skip": 1}, "clip_skip=1: asks for CLIP skip"),
        ({"width": 72}, "width=72: must be a multiple of 16 for ernie-image"),
        ({"sampler": "ddim"}, "sampler='ddim': is not for ernie-image"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(changes: dict[str, Any], says: str, engine: LocalEngine) -> None:
    with pytest.raises(RequestError) as error:
        ours(engine, **changes)
    assert says in str(error.value)
