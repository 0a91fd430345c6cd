"""Qwen-Image-Edit's pictures, tokens and positions are those of transformers; its files are identified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import checkpoints, qwen_image
from support.pictures import soft_picture
from support.qwen_image import TEXT_ENCODER, TRANSFORMER, VAE
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import safelight
from safelight.assembly import export
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.errors import IncompleteModelError, InputError, UnsupportedModelError
from safelight.families.family_model import PromptText, Reference
from safelight.families.parts import qwen25_model, qwen25_vision, qwen25_vision_model
from safelight.families.parts.qwen25_model import PICTURE_TOKEN
from safelight.families.parts.qwen25_vision import Qwen25VisionConfig
from safelight.families.qwen_image import editing
from safelight.families.qwen_image.spec import EDIT, EDIT_2509, EDIT_2511, QWEN_IMAGE, TEXT_TO_IMAGE
from safelight.resolve.resolve import with_defaults

SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.write_folder(tmp_path_factory.mktemp("edit") / "tiny", SEED, EDIT_2511)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.write_files(tmp_path_factory.mktemp("files"), SEED)


def test_pictures_are_seen_as_transformers_prepares_them(tmp_path: Path) -> None:
    processor = qwen_image.Processor().image_processor
    for number, size in enumerate(((392, 392), (160, 96), (33, 1000), (40, 41))):
        picture = Image.open(soft_picture(tmp_path / "picture.png", size, number))
        right = processor(images=picture, return_tensors="np")
        found = qwen25_vision_model.patches_of(picture)
        assert found.dtype == np.float32
        assert np.array_equal(found, right["pixel_values"])
        assert [1, *qwen25_vision.grid_of(size)] == right["image_grid_thw"][0].tolist()


def test_what_shapes_do_not_tell_is_as_published() -> None:
    published, standard = Qwen2_5_VLVisionConfig(), QWEN_IMAGE.component("vision_encoder").standard
    assert isinstance(standard, Qwen25VisionConfig)
    with torch.device("meta"):
        built: Any = qwen25_vision_model.build(standard).config
    vision = ("depth", "num_heads", "fullatt_block_indexes", "window_size", "intermediate_size", "hidden_act")
    for name in (*vision, "patch_size", "temporal_patch_size", "spatial_merge_size", "out_hidden_size"):
        given = getattr(published, name)
        assert getattr(built, name) == (list(given) if isinstance(given, tuple) else given)


def test_grids_are_those_of_transformers() -> None:
    sizes = [(width, height) for width in (1, 13, 42, 70, 1024, 5000) for height in (1, 14, 41, 100, 777, 6000)]
    for width, height in sizes:
        if max(width, height) <= qwen25_vision.MOST_RATIO * min(width, height):
            right = smart_resize(height, width, 28, 56 * 56, qwen25_vision.MOST_PIXELS)
            assert tuple(side * 14 for side in qwen25_vision.grid_of((width, height))) == right


def test_positions_are_those_of_transformers() -> None:
    grids = [(4, 10), (12, 6)]
    ids = qwen25_model.with_pictures([1, 2, PICTURE_TOKEN, 3, PICTURE_TOKEN, 4, 5], grids)
    tokens = torch.tensor([ids])
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(model)
    kinds: Any = (tokens == PICTURE_TOKEN).int()
    shapes = torch.tensor([(1, *grid) for grid in grids])
    right, _ = Qwen2_5_VLModel.get_rope_index(model, tokens, kinds, image_grid_thw=shapes)
    assert torch.equal(qwen25_model.positions(ids, grids), right)
    assert not torch.equal(right[0], right[1])


def test_the_template_has_as_many_tokens_as_are_left_out() -> None:
    encoding = qwen25_model.tokenizer().encode(editing.BEGINNING, add_special_tokens=False)
    assert len(encoding.ids) == editing.BEGINNING_TOKENS


def test_what_is_cut_off_is_the_end_of_the_prompt() -> None:
    references = [Reference("0", Image.new("RGB", (160, 96)))]
    texts = [PromptText("prompt", "apple" + " apple" * (count - 1)) for count in (1000, 2000)]
    inputs = editing.EditPrompts().text_inputs(EDIT, texts, references, None)
    [left] = inputs.cut.values()
    # One token each for the picture and its two marks.
    assert len(left.split()) == 2000 - (editing.PROMPT_TOKENS - 3)
    tokens = qwen25_vision.count_tokens(qwen25_vision.grid_of((160, 96)))
    assert inputs.each[texts[1]].tokens == editing.BEGINNING_TOKENS + editing.PROMPT_TOKENS - 1 + tokens


@pytest.mark.parametrize("variant", [EDIT, EDIT_2509, EDIT_2511])
def test_a_folder_says_its_variant(variant: str, folder: Path, tmp_path: Path, root: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for place, name, value in (
        ("model_index.json", "_class_name", qwen_image.PIPELINES[variant].__name__),
        ("transformer/config.json", "zero_cond_t", variant == EDIT_2511),
    ):
        settings = json.loads((copy / place).read_text())
        (copy / place).write_text(json.dumps({**settings, name: value}))
    model = Catalog.under(root).library.add(copy, "m")
    found = with_defaults(safelight.Request("x", "m"), model)
    assert (model.variant, found.steps, found.cfg) == (variant, 40, 4.0)
    zero: Any = model.manifest.component("transformer").config
    assert zero.zero_reference_time == (variant == EDIT_2511)
    with pytest.raises(InputError, match=r"m \(qwen-image\) cannot be exported: its text encoder and its vision"):
        export.to_diffusers(model, tmp_path / "out")


def test_a_file_says_its_variant_by_the_marker_or_by_its_metadata(tmp_path: Path, files: Path) -> None:
    plain = load_file(files / TRANSFORMER)
    marked = {**plain, "model.diffusion_model.__index_timestep_zero__": torch.zeros(0)}
    for tensors, declared, wanted in (
        (plain, "", None),
        (marked, "", EDIT_2511),
        (plain, "Qwen-Image-Edit", EDIT),
        (plain, "qwen-image-edit-plus", EDIT_2509),
        (plain, "Qwen-Image-Edit-2511", EDIT_2511),
    ):
        save_file(tensors, tmp_path / "file.safetensors", {"modelspec.architecture": declared})
        assert identify(tmp_path / "file.safetensors").variant == wanted
    # What the user says counts, whatever the file has.
    for variant in (EDIT_2509, EDIT_2511):
        found = identify(tmp_path / "file.safetensors", variant=variant)
        assert found.layout is not None
        config: Any = found.layout.component("transformer").config
        assert (found.variant, config.zero_reference_time) == (variant, variant == EDIT_2511)


def test_the_vision_encoder_is_read_only_where_it_is_used(
    root: Path, folder: Path, files: Path, tmp_path: Path
) -> None:
    """A file of the text encoder gives both components, and the digests are those of the folder."""
    catalog = Catalog.under(root)
    given = catalog.adapters.add(files / TEXT_ENCODER, "encoder")
    catalog.adapters.add(files / VAE, "vae")
    assert [part.role for part in given.manifest.components] == ["text_encoder", "vision_encoder"]
    edits = catalog.library.add(files / TRANSFORMER, "edits", variant=EDIT_2511)
    draws = catalog.library.add(files / TRANSFORMER, "draws", variant=TEXT_TO_IMAGE)
    whole = catalog.library.add(folder, "whole")
    assert edits.sources == {"vision_encoder": "encoder", "text_encoder": "encoder", "vae": "vae"}
    assert edits.roles == QWEN_IMAGE.roles
    assert [part.role for part in draws.manifest.components] == ["text_encoder", "transformer", "vae"]
    assert edits.digest == whole.digest
    for role in draws.roles:
        assert draws.manifest.component(role).digest == edits.manifest.component(role).digest
    # Another file would come first by its name.
    other = load_file(files / TEXT_ENCODER)
    changes = {name: other[name] + 1 for name in ("visual.merger.mlp.2.bias", "model.norm.weight")}
    save_file({**other, **changes}, tmp_path / "other.safetensors")
    catalog.adapters.add(tmp_path / "other.safetensors", "another")
    changed = catalog.library.set_choices("draws", variant=EDIT_2511)
    assert (changed.digest, changed.sources) == (edits.digest, edits.sources)


def test_a_text_encoder_without_its_vision_encoder_is_refused_for_editing(
    root: Path, folder: Path, files: Path, tmp_path: Path
) -> None:
    tensors = {name: one for name, one in load_file(files / TEXT_ENCODER).items() if not name.startswith("visual.")}
    save_file(tensors, tmp_path / "blind.safetensors")
    catalog = Catalog.under(root)
    catalog.adapters.add(tmp_path / "blind.safetensors", "blind")
    catalog.adapters.add(files / VAE, "vae")
    draws = catalog.library.add(files / TRANSFORMER, "draws", variant=TEXT_TO_IMAGE)
    assert draws.sources["text_encoder"] == "blind"
    message = (
        r"has no vision_encoder \(qwen2.5-vision 1280x32; a file of the text encoder with tensors named visual.\* has "
        r"it\), and none in the library fits; add it with `safelight adapters add FILE`"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        catalog.library.add(files / TRANSFORMER, "edits", variant=EDIT_2509)
    catalog.adapters.add(files / TEXT_ENCODER, "seeing")
    edits = catalog.library.add(files / TRANSFORMER, "edits", variant=EDIT_2509)
    assert edits.sources["vision_encoder"] == "seeing"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    [weights] = (copy / "text_encoder").glob("*.safetensors")
    save_file({n: one for n, one in load_file(weights).items() if "visual." not in n}, weights, {"format": "pt"})
    with pytest.raises(IncompleteModelError, match=r"vision_encoder\.patch_embed\.proj\.weight"):
        identify(copy)


def test_a_block_that_is_missing_as_a_whole_is_named(root: Path, files: Path, tmp_path: Path) -> None:
    tensors = load_file(files / TEXT_ENCODER)
    kept = {name: one for name, one in tensors.items() if not name.startswith("visual.blocks.5.")}
    save_file(kept, tmp_path / "gap.safetensors")
    with pytest.raises(IncompleteModelError, match=r"visual\.blocks\.5\.norm1\.weight"):
        Catalog.under(root).adapters.add(tmp_path / "gap.safetensors")


def test_a_folder_of_pickles_is_converted_with_its_vision_encoder(root: Path, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    checkpoints.as_pickles(copy)
    library = Catalog.under(root).library
    converted = library.add(copy, "pickles")
    assert (converted.variant, converted.digest) == (EDIT_2511, library.add(folder, "whole").digest)
    assert library.verify("pickles").digest == converted.digest
