"""FLUX.2 klein's folders: the tables, what is refused, what is shared, what a run leaves behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file
from support import flux2, naming, zimage
from support.checkpoints import random_module
from support.families import LDM

import safelight
from safelight.catalog.identify import identify
from safelight.errors import IncompleteModelError, RequestError, UnsupportedModelError
from safelight.families.components import Config
from safelight.families.family_model import PromptText, construct, family_model
from safelight.families.flux2 import transformer
from safelight.families.flux2.spec import FLUX2_KLEIN, mu
from safelight.families.flux2.transformer import Flux2Config
from safelight.families.parts import flux2_vae
from safelight.families.parts.flux2_vae import FLUX2_VAE, Flux2VAEConfig
from safelight.pipeline import upscale
from safelight.resolve.resolve import with_defaults
from safelight.workers.local_engine import LocalEngine

KLEIN_4B = Flux2Config(128, 3072, 5, 20, 128, 7680)
KLEIN_9B = Flux2Config(128, 4096, 8, 24, 128, 12288)


@pytest.fixture
def folder(distilled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(distilled, tmp_path / "copy"))


def ask(path: Path, **changes: Any) -> safelight.Request:
    values = {"prompt": "a red apple", "steps": 2, "width": 64, "height": 48, "seed": 11, **changes}
    return safelight.Request(model=str(path), **values)


@pytest.mark.parametrize("config", [KLEIN_4B, KLEIN_9B, FLUX2_VAE, *flux2.configs().values()])
def test_tables_are_what_the_modules_have(config: Config) -> None:
    with torch.device("meta"):
        state = construct(FLUX2_KLEIN, config).state_dict()
    assert {row.name: row.shape for row in config.rows()} == {name: tuple(one.shape) for name, one in state.items()}


def test_settings_come_back_from_shapes() -> None:
    for config in (KLEIN_4B, KLEIN_9B):
        assert transformer.infer({row.name: row.shape for row in config.rows()}) == config
        theirs = {name: tuple(one.shape) for name, one in naming.in_files(config, naming.on_meta(config), LDM).items()}
        assert transformer.infer(theirs) == config
    assert flux2_vae.infer({row.name: row.shape for row in FLUX2_VAE.rows()}) == FLUX2_VAE


def test_diffusers_converts_the_original_names_to_the_same_tensors() -> None:
    state = flux2.modules()["transformer"].state_dict()
    originals = naming.in_files(flux2.configs()["transformer"], state, LDM)
    converted = convert_flux2_transformer_checkpoint_to_diffusers(originals)
    assert converted.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in converted.items())


@pytest.mark.parametrize("tokens", [12, 256, 4096, 4300, 4301, 9000])
@pytest.mark.parametrize("steps", [1, 4, 50, 200])
def test_shift(tokens: int, steps: int) -> None:
    assert mu(tokens, steps) == compute_empirical_mu(tokens, steps)


@pytest.mark.parametrize("prompt", ["", "a red apple", "  été\n<|im_end|> <think> 你好 🍎 1234  ", "apple pear " * 400])
def test_token_ids(prompt: str) -> None:
    pair = PromptText("prompt", prompt)
    inputs = family_model(FLUX2_KLEIN).text_inputs(FLUX2_KLEIN, "text_encoder", ask(Path("x")), [pair], {})
    other = zimage.tokenizer()
    messages = [{"role": "user", "content": prompt}]
    text = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    found = other(text, padding="max_length", truncation=True, max_length=512)
    ids = inputs.each[pair].value
    assert ids == found.input_ids[: sum(found.attention_mask)]
    assert set(found.input_ids[len(ids) :]) <= {151643}


def test_variants_and_defaults(shared_engine: LocalEngine, distilled: Path, folder: Path) -> None:
    model = shared_engine.library.find(str(distilled))
    found = with_defaults(ask(distilled, steps=None), model)
    assert (model.base, model.variant, found.steps, found.cfg) == ("flux2-klein", "distilled", 4, 1.0)
    index = json.loads((folder / "model_index.json").read_text())
    del index["is_distilled"]
    (folder / "model_index.json").write_text(json.dumps(index))
    model = shared_engine.library.find(str(folder))
    found = with_defaults(ask(folder, steps=None), model)
    assert (model.variant, found.steps, found.cfg) == ("base", 50, 4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": 4.0}, "cfg.*a guidance scale"),
        ({"negative": "pears"}, "negative.*a negative prompt"),
        ({"clip_skip": 1}, "clip_skip.*CLIP skip"),
        ({"seamless": "x"}, "seamless.*seamless images"),
        ({"prompt_syntax": "compel"}, "prompt_syntax.*compel"),
        ({"width": 72}, "width.*multiple of 16"),
        ({"sampler": "ddim"}, "sampler.*is not for flux2-klein"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict[str, Any], message: str, shared_engine: LocalEngine, distilled: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        next(shared_engine.generate(ask(distilled, **changes)))


@pytest.mark.parametrize(
    "name",
    [
        "transformer.single_transformer_blocks.1.attn.to_out.weight",
        "vae.bn.running_var",
        "text_encoder.model.layers.27.mlp.up_proj.weight",
    ],
)
def test_missing_and_misshapen_tensors_are_named(name: str, folder: Path) -> None:
    role, _, inner = name.partition(".")
    (file,) = (folder / role).glob("*.safetensors")
    tensors = load_file(file)
    right = tensors.pop(inner)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(IncompleteModelError, match=re.escape(name)):
        identify(folder)
    save_file({**tensors, inner: torch.cat([right, right])}, file, {"format": "pt"})
    with pytest.raises(IncompleteModelError, match=re.escape(name)):
        identify(folder)


def test_other_settings_are_refused(folder: Path) -> None:
    file = folder / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 10000}))
    with pytest.raises(UnsupportedModelError, match="rope_theta = 10000"):
        identify(folder)


def test_a_text_encoder_with_too_few_layers_is_refused(folder: Path) -> None:
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    kept = {name: one for name, one in load_file(file).items() if not re.search(r"layers\.2[5-8]\.", name)}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="layer 27, which has only 24"):
        identify(folder)


def test_flux2_dev_is_not_taken_for_klein(folder: Path) -> None:
    net: Any = diffusers.Flux2Transformer2DModel
    made = net(**{**net.load_config(folder / "transformer"), "guidance_embeds": True})
    made.save_pretrained(folder / "transformer")
    with pytest.raises(UnsupportedModelError, match="unknown family"):
        identify(folder)


def test_the_text_encoder_is_the_same_component_in_z_image(
    shared_engine: LocalEngine, distilled: Path, tmp_path: Path
) -> None:
    path = zimage.write_folder(tmp_path / "z-image", 5)
    shutil.rmtree(path / "text_encoder")
    shutil.copytree(distilled / "text_encoder", path / "text_encoder")
    found = [shared_engine.library.find(str(one)).manifest.component("text_encoder") for one in (path, distilled)]
    assert found[0].digest == found[1].digest
    assert found[0].config == found[1].config


def test_a_run_leaves_the_skeletons_as_they_were(shared_engine: LocalEngine, distilled: Path, tmp_path: Path) -> None:
    right = next(shared_engine.generate(ask(distilled))).pixels
    skeletons = shared_engine.resources.skeletons
    assert {key.role for key in skeletons._free if key.base == "flux2-klein"} == set(FLUX2_KLEIN.roles)
    assert skeletons.check() == []
    assert next(shared_engine.generate(ask(distilled))).pixels == right
    little = safelight.open_engine(tmp_path / "root", max_cache_ram_gb=0.0185, threads=1, attention_type="torch-sdp")
    fits = little.fits(ask(distilled), little.library.find(str(distilled)))
    assert any(part["streamed"] for part in fits["components"])
    assert next(little.generate(ask(distilled))).pixels == right


def test_hires_fix_and_tiles(shared_engine: LocalEngine, distilled: Path) -> None:
    for upscaler in ("latent", "lanczos"):
        image = next(shared_engine.generate(ask(distilled, hires_scale=1.5, hires_upscaler=upscaler, tile=64)))
        assert (image.width, image.height) == (96, 64)
        assert len(set(image.pixels)) > 100


def test_patches_are_laid_out_as_in_diffusers() -> None:
    latents = torch.randn(1, 128, 3, 4)
    plain = upscale.lay_out_patches(latents, FLUX2_KLEIN.latents.patch)
    assert torch.equal(plain, diffusers.Flux2KleinPipeline._unpatchify_latents(latents))
    assert torch.equal(upscale.resize_latents(latents, 4, 3, "latent-nearest", 2), latents)


def test_statistics_of_the_vae_are_weights() -> None:
    names = dict(construct(FLUX2_KLEIN, Flux2VAEConfig(3, 3, 32, (32, 32), 1)).named_parameters())
    assert {"bn.running_mean", "bn.running_var"} <= names.keys()


@pytest.mark.parametrize(
    ("metadata", "variant"),
    [
        ({"modelspec.architecture": "flux-2-klein-4b"}, "distilled"),
        ({"modelspec.architecture": "FLUX.2-klein-base-9B"}, "base"),
        ({"modelspec.architecture": "klein"}, None),
    ],
)
def test_the_metadata_of_a_file_tells_its_variant(
    metadata: dict[str, str], variant: str | None, tmp_path: Path
) -> None:
    config = flux2.configs()["transformer"]
    tensors = naming.in_files(config, random_module("flux2-klein", config, torch.Generator()).state_dict(), LDM)
    save_file(tensors, tmp_path / "net.safetensors", metadata)
    found = identify(tmp_path / "net.safetensors")
    assert found.variant == variant
    assert identify(tmp_path / "net.safetensors", variant="base").variant == "base"
