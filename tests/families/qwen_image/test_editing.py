"""Qwen-Image-Edit, also 2509 and 2511: the pixels equal those of diffusers' pipelines, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from safetensors.torch import load_file, save_file
from support import qwen_image
from support.pictures import soft_picture
from support.scale import thinned

import safelight
from safelight.errors import RequestError
from safelight.families.qwen_image.spec import EDIT, EDIT_2509, EDIT_2511
from safelight.pipeline.noise import draw_seeded_noise
from safelight.request.results import Image as Made
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "put the apple (fresh) on 2 tables of picture 1: 你好 🍎"
NEGATIVE = "a blurred picture"
VARIANTS = (EDIT, EDIT_2509, EDIT_2511)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("edit")
    return {variant: qwen_image.write_folder(root / variant, SEED, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {variant: qwen_image.pipeline(SEED, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    sizes = ((130, 79), (70, 200), (96, 80), (64, 64))
    return [soft_picture(folder / f"{number}.png", size, number) for number, size in enumerate(sizes)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen_image.make_references_small(monkeypatch)


def theirs(pipe: Any, given: list[Path], **call: Any) -> Image.Image:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    shown = [Image.open(path) for path in given]
    values = {"prompt": PROMPT, "width": 64, "height": 48, "num_inference_steps": 2, "true_cfg_scale": 1.0, **call}
    single = isinstance(pipe, pipeline_qwenimage_edit.QwenImageEditPipeline)
    generator = torch.Generator("cpu").manual_seed(11)
    return pipe(image=shown[0] if single else shown, **values, generator=generator).images[0]


def ours(engine: LocalEngine, path: Path, given: list[Path], **changes: Any) -> Made:
    values = {"prompt": PROMPT, "width": 64, "height": 48, "steps": 2, "cfg": 1.0, "seed": 11, **changes}
    return next(engine.generate(safelight.Request(model=str(path), references=tuple(map(str, given)), **values)))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("count", thinned([2, 3]))
def test_several_references_and_a_negative_prompt(
    count: int, shared_engine: LocalEngine, folders: dict[str, Path], pipes: dict[str, Any], pictures: list[Path]
) -> None:
    given, size = pictures[:count], {"width": None, "height": None}
    made = ours(shared_engine, folders[EDIT_2509], given, cfg=4.0, negative=NEGATIVE, **size)
    right = theirs(pipes[EDIT_2509], given, true_cfg_scale=4.0, negative_prompt=NEGATIVE, **size)
    assert made.pixels == right.tobytes()
    sizes = ["96x64, not 130x79", "32x128, not 70x200", "96x64, not 96x80"]
    wanted = [f"references: the model sees picture {n} at {one}" for n, one in enumerate(sizes[:count], 1)]
    assert list(made.warnings) == wanted


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_reference_gives_its_size(
    variant: str, shared_engine: LocalEngine, folders: dict[str, Path], pipes: dict[str, Any], pictures: list[Path]
) -> None:
    size = {"width": None, "height": None}
    made = ours(shared_engine, folders[variant], pictures[:1], **size)
    right = theirs(pipes[variant], pictures[:1], **size)
    assert (made.width, made.height) == right.size == (96, 64)
    assert made.pixels == right.tobytes()


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_sizes(
    variant: str, shared_engine: LocalEngine, folders: dict[str, Path], pipes: dict[str, Any], pictures: list[Path]
) -> None:
    made = ours(shared_engine, folders[variant], pictures[:1])
    assert made.pixels == theirs(pipes[variant], pictures[:1]).tobytes()
    assert list(made.warnings) == ["references: the model sees picture 1 at 1312x800, not 130x79"]


@pytest.mark.usefixtures("small")
def test_bf16(tmp_path: Path, folders: dict[str, Path], pictures: list[Path]) -> None:
    """The noise is drawn in fp32 for every dtype; diffusers draws it in bf16, so it is given the same noise."""
    pipe = qwen_image.loaded(folders[EDIT_2511], torch.bfloat16, EDIT_2511)
    noise = draw_seeded_noise((1, 16, 6, 8), 11, torch.bfloat16, torch.device("cpu"))
    right = theirs(pipe, pictures[:2], latents=pipe._pack_latents(noise, 1, 16, 6, 8))
    engine = safelight.open_engine(tmp_path / "root")
    assert ours(engine, folders[EDIT_2511], pictures[:2], precision="bf16").pixels == right.tobytes()


@pytest.mark.usefixtures("small")
def test_the_references_of_2511_have_no_noise(
    shared_engine: LocalEngine, folders: dict[str, Path], pipes: dict[str, Any], pictures: list[Path]
) -> None:
    assert [pipes[variant].transformer.config.zero_cond_t for variant in VARIANTS] == [False, False, True]
    made = [ours(shared_engine, folders[variant], pictures[:1]).pixels for variant in (EDIT_2509, EDIT_2511)]
    assert made[0] != made[1]


@pytest.mark.usefixtures("small")
def test_beside_an_image(shared_engine: LocalEngine, folders: dict[str, Path], pictures: list[Path]) -> None:
    """Denoising starts from the image, and the references are seen in every step, also of the hires fix."""
    start = {"image": str(pictures[3]), "strength": 0.6, "steps": 4}
    cases = ({}, start, {**start, "mask": str(pictures[3])}, {"hires_scale": 1.5})
    made = [
        ours(shared_engine, folders[EDIT_2509], given, **changes).pixels
        for changes in cases
        for given in (pictures[:1], pictures[1:2])
    ]
    assert len(set(made)) == len(made)


@pytest.mark.usefixtures("small")
def test_the_vision_encoder_counts_where_the_text_encoder_is_the_same(
    root: Path, tmp_path: Path, folders: dict[str, Path], pictures: list[Path]
) -> None:
    """The cache of the text encoder's outputs tells two models with different vision encoders apart."""
    other = qwen_image.write_folder(tmp_path / "other", SEED, EDIT_2509)
    [file] = (other / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    tensors["visual.merger.mlp.2.bias"] += 1
    save_file(tensors, file, {"format": "pt"})
    engine: Any = safelight.open_engine(root)
    first, second = (ours(engine, path, pictures[:1]).pixels for path in (folders[EDIT_2509], other))
    assert first != second
    one, two = (engine.library.find(str(path)).manifest for path in (folders[EDIT_2509], other))
    same = [part.role for part in one.components if part.digest == two.component(part.role).digest]
    assert same == ["text_encoder", "transformer", "vae"]


@pytest.mark.usefixtures("small")
def test_what_they_cannot_do_is_refused(
    shared_engine: LocalEngine, folders: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    long = soft_picture(tmp_path / "long.png", (201, 1), 1)
    for variant, given, changes, message in (
        (EDIT, [], {}, r"references=0: edit \(qwen-image, edit\) takes 1 pictures"),
        (EDIT, pictures[:2], {}, r"references=2: edit \(qwen-image, edit\) takes 1 pictures"),
        (EDIT_2509, [], {}, r"references=0: edit-2509 \(qwen-image, edit-2509\) takes 1 to 3 pictures"),
        (EDIT_2511, pictures[:4], {}, r"references=4: .* takes 1 to 3 pictures"),
        (EDIT_2511, [long], {}, "references='201x1': picture 1 is too long: one side may be at most 200 times"),
        (EDIT_2511, pictures[:1], {"prompt": "a <|image_pad|>"}, r"prompt=.*: has <\|image_pad\|>, which stands for"),
        (EDIT_2511, pictures[:1], {"guidance": 3.0}, "guidance=3.0: has no effect"),
    ):
        with pytest.raises(RequestError, match=message):
            ours(shared_engine, folders[variant], given, **changes)
