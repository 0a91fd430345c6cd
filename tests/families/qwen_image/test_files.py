"""Qwen-Image's files as people have them: folders, a transformer alone, text encoder and VAE in files of their own."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from safetensors.torch import load_file, save_file
from support import qwen_image
from support.oracle import aligned
from support.qwen_image import TRANSFORMER
from typer.testing import CliRunner

import safelight
from safelight.assembly import export
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.cli.main import app
from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.families.family_model import construct
from safelight.families.parts.qwen_vae import QwenVAEConfig
from safelight.families.qwen_image.spec import QWEN_IMAGE
from safelight.families.qwen_image.transformer import QwenImageConfig
from safelight.models.skeleton import Skeleton, SkeletonKey

SEED = 5


def pixels(root: Path, model: str) -> str:
    request = safelight.Request("a red apple", model, seed=3, steps=2, width=64, height=48)
    return next(safelight.open_engine(root).generate(request)).pixels_sha256


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.write_folder(tmp_path_factory.mktemp("folder") / "tiny", SEED)


@pytest.fixture(scope="module")
def right(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pixels of the diffusers folder."""
    return pixels(tmp_path_factory.mktemp("right"), str(tiny))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.write_files(tmp_path_factory.mktemp("files"), SEED)


def run(root: Path, *arguments: str, code: int = 0) -> str:
    found = CliRunner().invoke(app, [*arguments, "--root", str(root)])
    assert found.exit_code == code, (found.output, found.exception)
    return found.output


def test_tables_are_what_the_modules_have() -> None:
    configs = [component.standard for component in QWEN_IMAGE.components]
    for config in (*configs, *qwen_image.configs("edit").values()):
        assert config is not None
        with torch.device("meta"):
            state = construct(QWEN_IMAGE, config).state_dict()
        assert {row.name: row.shape for row in config.rows()} == {name: tuple(one.shape) for name, one in state.items()}


def test_settings_come_back_from_shapes_in_all_names() -> None:
    for component in QWEN_IMAGE.components:
        config = component.standard
        assert config is not None
        for which in (0, 1, 2, -1):
            shapes = {row.sources[min(which, len(row.sources) - 1)].name: row.shape for row in config.rows()}
            assert component.infer(shapes) == config


def test_diffusers_converts_the_names_of_wan_to_the_same_tensors() -> None:
    """The converter knows the published numbers of levels and blocks."""
    config = QwenVAEConfig(3, 16, 8, (1, 2, 4, 4), 2)
    theirs = {row.sources[-1].name: row.name for row in config.rows()}
    assert convert_wan_vae_to_diffusers(theirs) == {name: name for name in theirs.values()}


def test_a_folder_as_comfyui_has_it_is_added_by_one_command(root: Path, files: Path, right: str) -> None:
    said = run(root, "models", "add", str(files), "--variant", "text-to-image")
    assert "added qwen_2.5_vl_tiny: text_encoder, fp32" in said
    assert "added qwen_image_vae_tiny: vae, fp32" in said
    assert (
        "added qwen_image_tiny: qwen-image, fp32, flow, draws 1328x1328\n  text_encoder: from qwen_2.5_vl_tiny" in said
    )
    assert "\n  vae: from qwen_image_vae_tiny, " in said
    assert pixels(root, "qwen_image_tiny") == right


@pytest.mark.full
def test_a_sharded_folder(root: Path, tmp_path: Path, right: str) -> None:
    path = qwen_image.write_folder(tmp_path / "sharded", SEED, max_shard_size="500KB")
    assert len(list((path / "transformer").glob("*.safetensors"))) > 1
    assert pixels(root, str(path)) == right


def test_a_vae_in_diffusers_names(root: Path, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    shutil.copy(tiny / "vae/diffusion_pytorch_model.safetensors", file)
    catalog = Catalog.under(root)
    found = catalog.adapters.add(file)
    assert found.component.digest == catalog.library.add(tiny, "m").manifest.component("vae").digest
    tensors = load_file(file)
    del tensors["decoder.norm_out.gamma"]
    save_file(tensors, file)
    with pytest.raises(IncompleteModelError, match=r"VAE of Qwen-Image.*decoder\.norm_out\.gamma"):
        catalog.adapters.add(file, "broken")


def test_what_is_missing_is_named(root: Path, files: Path) -> None:
    said = run(root, "models", "add", str(files / TRANSFORMER), "--variant", "text-to-image", code=2)
    assert "has no text_encoder (qwen2.5 3584x28) and no vae (qwen-vae 96-192-384-384x2)" in said
    said = run(root, "models", "add", str(files / TRANSFORMER), code=2)
    assert "is qwen-image, and nothing in it says which variant: use `safelight models add` with --variant" in said


@pytest.mark.parametrize(
    "name",
    [
        "transformer.transformer_blocks.1.attn.to_add_out.bias",
        "vae.decoder.up_blocks.2.upsamplers.0.resample.1.weight",
        "text_encoder.model.layers.1.self_attn.k_proj.bias",
    ],
)
def test_missing_and_misshapen_tensors_are_named(name: str, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    role, _, inner = name.partition(".")
    (file,) = (folder / role).glob("*.safetensors")
    tensors = load_file(file)
    wrong = tensors.pop(inner)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(IncompleteModelError, match=re.escape(name)):
        identify(folder)
    save_file({**tensors, inner: torch.cat([wrong, wrong])}, file, {"format": "pt"})
    with pytest.raises(IncompleteModelError, match=re.escape(name)):
        identify(folder)


def test_other_settings_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    for role, name, value in (("transformer", "zero_cond_t", True), ("vae", "latents_mean", [0.0] * 16)):
        file = folder / role / "config.json"
        before = file.read_text()
        file.write_text(json.dumps({**json.loads(before), name: value}))
        with pytest.raises(UnsupportedModelError, match=f"{name} = "):
            identify(folder)
        file.write_text(before)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("txt_in.text_norm.weight", "qwen-image-2.1"),
        ("time_text_embed.addition_t_embedding.weight", "qwen-image-layered"),
    ],
)
def test_its_relatives_are_named(name: str, base: str, tmp_path: Path, files: Path) -> None:
    path = tmp_path / "relative.safetensors"
    prefix = "model.diffusion_model."
    save_file({**load_file(files / TRANSFORMER), prefix + name: torch.zeros(2, 64)}, path)
    found = identify(path)
    assert (found.base, found.layout) == (base, None)
    assert "not supported yet" in found.rule


def test_the_marker_of_edit_2511_is_read(tmp_path: Path, files: Path) -> None:
    path = tmp_path / "marked.safetensors"
    marker = "model.diffusion_model.__index_timestep_zero__"
    save_file({**load_file(files / TRANSFORMER), marker: torch.zeros(0)}, path)
    for file, marked in ((path, True), (files / TRANSFORMER, False)):
        layout = identify(file).layout
        assert layout is not None
        config = layout.component("transformer").config
        assert isinstance(config, QwenImageConfig)
        assert config.zero_reference_time == marked
        assert (marker in layout.left_over) == marked


def test_diffusers_draws_the_same_with_an_exported_folder(root: Path, tmp_path: Path, tiny: Path, right: str) -> None:
    model = Catalog.under(root).library.add(tiny, "m")
    export.to_diffusers(model, tmp_path / "exported")
    pipe: Any = diffusers.QwenImagePipeline.from_pretrained(tmp_path / "exported")
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
        aligned(module)
    torch.set_num_threads(1)
    image = pipe(
        "a red apple",
        negative_prompt="",
        num_inference_steps=2,
        true_cfg_scale=4.0,
        width=64,
        height=48,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    assert hashlib.sha256(image.tobytes()).hexdigest() == right
    assert Catalog.under(root).library.add(tmp_path / "exported", name="again").digest == model.digest


def test_a_run_leaves_the_skeletons_as_they_were(root: Path, tiny: Path, right: str, tmp_path: Path) -> None:
    engine: Any = safelight.open_engine(root)
    request = safelight.Request("a red apple", str(tiny), seed=3, steps=2, width=64, height=48)
    for changes in ({}, {"width": 80, "tile": 64}, {"hires_scale": 1.5}):
        image = next(engine.generate(replace(request, **changes)))
        assert len(set(image.pixels)) > 100
    skeletons = engine.resources.skeletons
    # Tests of one process share skeletons, so there may be a ControlNet's and a vision encoder's, too.
    left = {key.role for key in skeletons._free if key.base == "qwen-image"}
    assert left >= set(QWEN_IMAGE.roles_of("text-to-image"))
    assert skeletons.check() == []
    assert next(engine.generate(request)).pixels_sha256 == right


def test_the_rotary_embedding_keeps_nothing_of_a_call() -> None:
    """diffusers' own has a cache for the whole process, which holds the frequencies of each size and the module."""
    config = qwen_image.configs()["transformer"]
    built: list[Any] = [Skeleton(SkeletonKey("qwen-image", "transformer", config, torch.float32, "torch-sdp"))]
    rope = built[0].module.pos_embed
    plain = QwenEmbedRope(theta=10000, axes_dim=rope.axes_dim, scale_rope=True)
    sizes = [[(1, rows, columns)] for rows in (1, 3, 70) for columns in (2, 5)] + [[(1, 3, 4), (1, 2, 2)]]
    for size in sizes:
        found, wanted = (one([size], max_txt_seq_len=9, device=torch.device("cpu")) for one in (rope, plain))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert built[0].differences() == []
    gone = weakref.ref(rope)
    del rope, found
    built.clear()
    gc.collect()
    assert gone() is None


def test_with_little_memory_the_pixels_are_the_same(tiny: Path, right: str, tmp_path: Path) -> None:
    request = safelight.Request("a red apple", str(tiny), seed=3, steps=2, width=64, height=48)
    little = safelight.open_engine(tmp_path / "root", max_cache_ram_gb=0.01825, threads=1, attention_type="torch-sdp")
    fits = little.fits(request, little.library.find(str(tiny)))
    assert any(part["streamed"] for part in fits["components"])
    assert next(little.generate(request)).pixels_sha256 == right
