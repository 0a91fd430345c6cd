"""FLUX.2 klein with reference images: the pixels equal those of diffusers' pipelines, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from support import flux2
from support.jobs import resolved
from support.pictures import soft_picture
from support.scale import thinned
from typer.testing import CliRunner

import safelight
from safelight.cli.main import app
from safelight.errors import RequestError
from safelight.families.flux2.model import MODEL
from safelight.families.flux2.spec import reference_size
from safelight.queue.database import Database
from safelight.request.results import Image as Made
from safelight.server.apis.openai import Edit
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "the apple in the style of the second picture"
SIZES = ((70, 65), (96, 80))
"""The first is cropped to 64 by 64."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux2.pipeline(SEED, distilled=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [soft_picture(folder / f"{number}.png", size, number) for number, size in enumerate((*SIZES, (80, 64)))]


def theirs(pipe: Any, given: list[Path], **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        prompt=PROMPT,
        image=[Image.open(path) for path in given],
        generator=torch.Generator("cpu").manual_seed(11),
        **{"num_inference_steps": 2, "guidance_scale": 1.0, **call},
    ).images[0]
    return image.tobytes()


def ours(engine: LocalEngine, path: Path, given: list[Path], **changes: Any) -> Made:
    values = {"prompt": PROMPT, "steps": 2, "seed": 11, **changes}
    return next(engine.generate(safelight.Request(model=str(path), references=tuple(map(str, given)), **values)))


@pytest.mark.parametrize("count", thinned([2, 1]))
def test_one_and_two_references(
    count: int, shared_engine: LocalEngine, distilled: Path, pipe: Any, pictures: list[Path]
) -> None:
    given = pictures[:2][-count:]
    size = {} if count == 2 else {"width": 64, "height": 48}
    made = ours(shared_engine, distilled, given, **size)
    assert made.pixels == theirs(pipe, given, **size)
    assert (made.width, made.height) == ((64, 64) if count == 2 else (64, 48))
    warnings = ["references: the model sees picture 1 at 64x64, not 70x65"] if count == 2 else []
    assert list(made.warnings) == warnings


def test_with_guidance_and_a_negative_prompt(
    shared_engine: LocalEngine, base: Path, pipe: Any, pictures: list[Path]
) -> None:
    pipe = diffusers.Flux2KleinPipeline(**pipe.components, is_distilled=False)
    right = theirs(
        pipe, pictures[:1], guidance_scale=4.0, negative_prompt_embeds=pipe.encode_prompt("pears")[0], width=64
    )
    assert ours(shared_engine, base, pictures[:1], cfg=4.0, negative="pears", width=64).pixels == right


@pytest.mark.parametrize(
    ("second", "strength", "masked"), thinned([(True, 0.6, True), (False, 1.0, True), (True, 0.5, False)], unpack=True)
)
def test_beside_an_image_and_a_mask(
    second: bool,
    strength: float,
    masked: bool,
    shared_engine: LocalEngine,
    distilled: Path,
    pipe: Any,
    pictures: list[Path],
    tmp_path: Path,
) -> None:
    """diffusers' pipeline for inpainting shows the picture itself to the transformer too, as the first reference."""
    *_, other, picture = pictures
    mask = Image.new("L", (80, 64), 0 if masked else 255)
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    inpaint = diffusers.Flux2KleinInpaintPipeline(**pipe.components, is_distilled=True)
    given = {"image_reference": Image.open(other)} if second else {}
    call = {"mask_image": mask, "strength": strength, "num_inference_steps": 4, **given}
    inpaint.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    found = inpaint(
        image=Image.open(picture),
        prompt=PROMPT,
        generator=torch.Generator("cpu").manual_seed(11),
        guidance_scale=1.0,
        **call,
    )
    outside = np.asarray(mask)[..., None] < 128
    right = np.where(outside, np.asarray(Image.open(picture)), np.asarray(found.images[0]))
    changes = {"image": str(picture), "strength": strength, "steps": 4}
    changes |= {"mask": str(tmp_path / "mask.png"), "mask_blur": 0} if masked else {}
    references = [picture, other] if second else [picture]
    assert ours(shared_engine, distilled, references, **changes).pixels == right.tobytes()


@pytest.mark.full
def test_bf16(tmp_path: Path, distilled: Path, pictures: list[Path]) -> None:
    noise = torch.randn(1, 128, 3, 4, generator=torch.Generator("cpu").manual_seed(11)).bfloat16()
    engine = safelight.open_engine(tmp_path / "root")
    made = ours(engine, distilled, pictures[1:2], width=64, height=48, precision="bf16")
    pipe = flux2.loaded(distilled, True, torch.bfloat16)
    assert made.pixels == theirs(pipe, pictures[1:2], width=64, height=48, latents=noise)


@pytest.mark.parametrize("size", thinned([(1500, 900), (1023, 1025), (64, 64), (2048, 300), (640, 1111)]))
def test_pictures_are_prepared_as_in_diffusers(size: tuple[int, int], tmp_path: Path) -> None:
    picture = Image.open(soft_picture(tmp_path / "picture.png", size, 3))
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    made = picture
    if size[0] * size[1] > 1024 * 1024:
        made = processor._resize_to_target_area(picture, 1024 * 1024)
    wide, high = (side // 16 * 16 for side in made.size)
    right = processor.preprocess(made, height=high, width=wide, resize_mode="crop")
    prepared = MODEL.prepare_reference(picture, reference_size(picture.size))
    assert prepared.size == (wide, high)
    assert torch.equal(processor.preprocess(prepared), right)


@pytest.mark.parametrize(
    ("size", "count", "message"),
    [
        ((63, 64), 1, "references='63x64': picture 1 is too small: each side must have at least 64"),
        ((1024, 64), 1, "references='1024x64': picture 1 is too long: one side may be at most 8 times the other"),
        ((64, 64), 11, "references.*a list of at most 10 pictures"),
    ],
)
def test_what_it_cannot_take_is_refused(
    size: tuple[int, int], count: int, message: str, shared_engine: LocalEngine, distilled: Path, tmp_path: Path
) -> None:
    picture = soft_picture(tmp_path / "picture.png", size, 1)
    with pytest.raises(RequestError, match=message):
        ours(shared_engine, distilled, [picture] * count)


def test_families_without_references_refuse_them(shared_engine: LocalEngine, pictures: list[Path], tiny: Path) -> None:
    with pytest.raises(RequestError, match=r"references=.*asks for reference images, which a \(sd1\) does not have"):
        ours(shared_engine, tiny / "a.safetensors", pictures[:1], width=64, height=64)


def test_each_reference_changes_the_pixels_and_the_job_has_their_digests(
    shared_engine: LocalEngine, distilled: Path, pictures: list[Path]
) -> None:
    one, other, _ = pictures
    size = {"width": 64, "height": 48}
    both = ours(shared_engine, distilled, [one, other], **size)
    digests = both.metadata["request"]["references"]
    assert len(digests) == 2
    assert len(re.findall("[0-9a-f]{64}", " ".join(digests))) == 2
    again = ours(shared_engine, distilled, [Path(digest) for digest in digests], **size)
    assert again.pixels == both.pixels
    others = [ours(shared_engine, distilled, given, **size).pixels for given in ([other, one], [one])]
    assert len({both.pixels, *others}) == 3


def test_the_hires_fix_shows_them_in_both_passes(
    shared_engine: LocalEngine, distilled: Path, pictures: list[Path]
) -> None:
    size = {"width": 64, "height": 48, "hires_scale": 1.5}
    plain, shown = (ours(shared_engine, distilled, given, **size) for given in ([], pictures[1:2]))
    assert (shown.width, shown.height) == (96, 64)
    assert shown.pixels != plain.pixels


def test_pictures_of_waiting_jobs_are_in_use(root: Path, distilled: Path, pictures: list[Path]) -> None:
    database = Database(root)
    request = safelight.Request(PROMPT, str(distilled), references=tuple(map(str, pictures[:2])))
    [job] = database.accept(resolved(root, request))
    assert set(job.request.references) == database.inputs()
    assert len(database.inputs()) == 2


def test_the_command_line_takes_them_and_remake_makes_the_same(
    root: Path, distilled: Path, pictures: list[Path], tmp_path: Path
) -> None:
    def run(*arguments: str) -> str:
        found = CliRunner().invoke(app, [*arguments, "--root", str(root)])
        assert found.exit_code == 0, (found.output, found.exception)
        return found.output

    given = [f"--reference={path}" for path in pictures[:2]]
    out = tmp_path / "out"
    said = run("generate", PROMPT, "-m", str(distilled), "--steps=2", "--seed=11", f"--out={out}", *given)
    assert "references: the model sees picture 1 at 64x64, not 70x65" in " ".join(said.split())
    [made] = out.glob("*.png")
    run("remake", str(made))


def test_pictures_of_openais_edits(shared_engine: LocalEngine, distilled: Path, tiny: Path) -> None:
    klein, plain = (shared_engine.library.find(str(path)) for path in (distilled, tiny / "a.safetensors"))
    one, two, masked = Edit(("a",), ""), Edit(("a", "b"), ""), Edit(("a", "b"), "m")
    start = {"image": "a", "mask": ""}
    assert two.fields(klein, has_strength=False) == {"references": ("a", "b")}
    assert two.fields(klein, has_strength=True) == {"references": ("a", "b"), **start}
    assert masked.fields(klein, has_strength=False) == {"references": ("a", "b"), "image": "a", "mask": "m"}
    assert one.fields(plain, has_strength=False) == start
    with pytest.raises(RequestError, match="only one picture is supported: a does not edit by reference"):
        two.fields(plain, has_strength=False)
