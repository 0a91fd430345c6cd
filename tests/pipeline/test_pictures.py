"""Image to image and inpainting: pixels equal those of diffusers' own pipelines, bit for bit, on a CPU in fp32."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter
from support import checkpoints, oracle
from support.scale import thinned

import safelight
from safelight.catalog.inputs import Inputs
from safelight.errors import IntegrityError, RequestError
from safelight.workers.local_engine import LocalEngine

SAMPLERS = ("euler", "euler_a", "dpmpp_2m", "ddim")
KINDS: dict[str, tuple[Any, Any]] = {
    "sd1": (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline),
    "sdxl": (diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.StableDiffusionXLInpaintPipeline),
}
SCHEDULERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
}


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    return shared_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a mask of its middle, and an inpainting checkpoint of nine channels."""
    made = tmp_path_factory.mktemp("pictures")
    values = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    PILImage.fromarray(values).resize((64, 64), PILImage.Resampling.BICUBIC).save(made / "picture.png")
    mask = PILImage.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((16, 8, 47, 39), fill=255)
    mask.save(made / "mask.png")
    checkpoints.write_single(made / "nine.safetensors", "sd1", 6, in_channels=9)
    return made


def opened(path: Path) -> PILImage.Image:
    return PILImage.open(path).convert("RGB")


def theirs(pipe: Any, folder: Path, sampler: str, masked: bool, **call: Any) -> np.ndarray:
    pipe.scheduler = SCHEDULERS[sampler].from_config(oracle.SCHEDULE)
    more: dict[str, Any] = {"image": opened(folder / "picture.png")}
    if masked:
        more |= {"mask_image": PILImage.open(folder / "mask.png"), "width": 64, "height": 64}
    pipe.set_progress_bar_config(disable=True)
    oracle.torch.set_num_threads(1)
    generator = oracle.torch.Generator("cpu").manual_seed(11)
    made = pipe(
        "red apple", negative_prompt="blue", num_inference_steps=5, guidance_scale=5.0, generator=generator,
        **more, **call,
    )  # fmt: skip
    return np.asarray(made.images[0])


def ours(engine: LocalEngine, model: Path, folder: Path, **changes: Any) -> np.ndarray:
    values = {"prompt": "red apple", "negative": "blue", "steps": 5, "seed": 11, "cfg": 5.0, "mask_blur": 0}
    values |= {"image": str(folder / "picture.png"), **changes}
    image = next(engine.generate(safelight.Request(model=str(model), **values)))
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def outside(made: np.ndarray, folder: Path) -> np.ndarray:
    """The picture's own pixels where the mask is black."""
    mask = np.asarray(PILImage.open(folder / "mask.png"))[..., None] >= 128
    return np.where(mask, made, np.asarray(opened(folder / "picture.png")))


def _id(value: str | float) -> str | None:
    if isinstance(value, float):
        return f"strength {value}"
    return "nine channels" if value == "nine" else None


@pytest.mark.parametrize(
    ("base", "sampler", "strength"),
    thinned(
        [("sdxl", "euler_a", 0.75), *(("sd1", sampler, strength) for strength in (0.4, 1.0) for sampler in SAMPLERS)],
        5,
        unpack=True,
    ),
    ids=_id,
)
def test_image_to_image(
    engine: LocalEngine, tiny: Path, folder: Path, base: str, sampler: str, strength: float
) -> None:
    name, seed = {"sd1": ("a.safetensors", 1), "sdxl": ("xl.safetensors", 4)}[base]
    pipe = KINDS[base][0].from_pipe(oracle.pipeline(base, seed))
    right = theirs(pipe, folder, sampler, masked=False, strength=strength)
    assert np.array_equal(ours(engine, tiny / name, folder, sampler=sampler, strength=strength), right)


@pytest.mark.parametrize(
    ("model", "sampler", "strength"),
    thinned(
        [
            *((model, "euler", 1.0) for model in ("sd1", "nine", "sdxl")),
            ("sdxl", "dpmpp_2m", 0.6),
            *((model, sampler, 0.6) for sampler in SAMPLERS for model in ("sd1", "nine")),
        ],
        6,
        unpack=True,
    ),
    ids=_id,
)
def test_inpainting(engine: LocalEngine, tiny: Path, folder: Path, model: str, sampler: str, strength: float) -> None:
    paths = {"sd1": tiny / "a.safetensors", "sdxl": tiny / "xl.safetensors", "nine": folder / "nine.safetensors"}
    plain = oracle.pipeline("sdxl" if model == "sdxl" else "sd1", {"sd1": 1, "sdxl": 4, "nine": 6}[model])
    if model == "nine":
        for role, module in checkpoints.modules("sd1", 6, in_channels=9).items():
            setattr(plain, role, oracle.aligned(module))
    pipe = KINDS["sdxl" if model == "sdxl" else "sd1"][1].from_pipe(plain)
    right = outside(theirs(pipe, folder, sampler, masked=True, strength=strength), folder)
    mask = str(folder / "mask.png")
    assert np.array_equal(ours(engine, paths[model], folder, sampler=sampler, strength=strength, mask=mask), right)


def test_outside_of_the_mask_every_pixel_stays(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    picture = np.asarray(opened(folder / "picture.png"))
    mask = PILImage.open(folder / "mask.png")
    for more in ({}, {"mask_padding": 4, "width": 64, "height": 64}, {"mask_padding": 4, "width": 128, "height": 128}):
        made = ours(engine, tiny / "a.safetensors", folder, mask=str(folder / "mask.png"), mask_blur=3, **more)
        soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(3)))
        assert made.shape == picture.shape
        assert np.array_equal(made[soft == 0], picture[soft == 0])
        assert not np.array_equal(made[soft == 255], picture[soft == 255])


def test_an_image_is_kept_by_its_content_and_made_again(tiny: Path, folder: Path, root: Path) -> None:
    engine = safelight.open_engine(root)
    image = next(engine.generate(safelight.Request("x", str(tiny / "a.safetensors"), steps=2, seed=1,
                                                   image=str(folder / "picture.png"))))  # fmt: skip
    assert (image.width, image.height) == (64, 64)
    again = safelight.Request(**{**image.metadata["request"], "model": str(tiny / "a.safetensors")})
    assert next(engine.generate(again)).pixels_sha256 == image.pixels_sha256
    (kept,) = (root / "inputs").iterdir()
    assert kept.stem == image.metadata["request"]["image"]
    opened(kept).transpose(PILImage.Transpose.ROTATE_90).save(kept)
    with pytest.raises(IntegrityError, match="pixels of this input image changed"):
        next(engine.generate(again))
    kept.unlink()
    with pytest.raises(RequestError, match="this image is gone"):
        next(engine.generate(again))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask": "mask.png", "image": ""}, "needs an image"),
        ({"strength": 0.0}, "must be above 0"),
        ({"strength": 0.1}, "computes less than one step of"),
        ({"mask": "black.png"}, "nothing in it is white"),
        ({"image": "nothing.png"}, "not an image in a supported format"),
        ({"image": "absent.png"}, "absent.png"),
    ],
)
def test_what_cannot_be_started_from_is_said(
    engine: LocalEngine, tiny: Path, folder: Path, changes: dict[str, Any], says: str
) -> None:
    PILImage.new("L", (64, 64), 0).save(folder / "black.png")
    (folder / "nothing.png").write_bytes(b"no image")
    named = {k: str(folder / v) if isinstance(v, str) and v else v for k, v in changes.items()}
    with pytest.raises(safelight.InputError, match=says):
        ours(engine, tiny / "a.safetensors", folder, **named)


def test_a_part_of_a_picture_is_made_again_from_its_metadata(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    asked = safelight.Request(
        "x", str(tiny / "a.safetensors"), steps=2, width=128, height=64, image=str(folder / "picture.png"),
        mask=str(folder / "mask.png"), mask_padding=4,
    )  # fmt: skip
    image = next(engine.generate(asked))
    again = safelight.Request(**{**image.metadata["request"], "model": str(tiny / "a.safetensors")})
    assert next(engine.generate(again)).pixels_sha256 == image.pixels_sha256


def test_a_masks_faint_pixels_are_black(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    """As those of a JPEG are; neither the crop nor what is drawn reaches to them."""
    faint = PILImage.open(folder / "mask.png").copy()
    faint.putpixel((0, 0), 100)
    faint.save(folder / "faint.png")
    made = [
        ours(
            engine,
            tiny / "a.safetensors",
            folder,
            mask=str(folder / f"{name}.png"),
            mask_padding=2,
            width=64,
            height=64,
        )
        for name in ("mask", "faint")
    ]
    assert np.array_equal(*made)


def test_pictures_of_16_bits_keep_their_greys_and_strange_formats_are_refused(root: Path) -> None:
    inputs, held = Inputs(root), io.BytesIO()
    PILImage.fromarray(np.full((8, 8), 20000, np.uint16)).save(held, "PNG")
    assert np.asarray(inputs.open(inputs.store("image", held.getvalue()))).max() == 20000 // 257
    for data in (b"DDS " + bytes(200), b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(RequestError, match="not an image in a supported format"):
            inputs.store("image", data)


def test_a_checkpoint_for_inpainting_wants_a_mask(engine: LocalEngine, folder: Path) -> None:
    with pytest.raises(RequestError, match="needs an image and a mask"):
        ours(engine, folder / "nine.safetensors", folder)
