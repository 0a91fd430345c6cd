"""Chroma's files as people have them: one file with all, and a file for each component."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from support import chroma
from support.oracle import aligned
from support.scale import thinned

import safelight
from safelight.assembly import export
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.families.chroma.transformer import ChromaConfig, infer
from safelight.families.family_model import construct
from safelight.families.registry import family
from safelight.request.adapters import Lora

SEED = 5
PUBLISHED = ChromaConfig(64, 16, 3072, 19, 38, 128, 4096, 64, 5120, 5)


def ask(model: str, **changes: Any) -> safelight.Request:
    return safelight.Request("a red apple", model, seed=3, steps=2, width=64, height=48, cfg=1.0, **changes)


def pixels(root: Path, model: str, **changes: Any) -> bytes:
    return next(safelight.open_engine(root).generate(ask(model, **changes))).pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chroma.write_folder(tmp_path_factory.mktemp("chroma") / "hd", SEED)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return chroma.single_tensors(SEED)


def test_a_file_asks_for_its_variant_and_says_what_it_lacks(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(chroma.parts(SEED)["transformer"], path)
    found = identify(path)
    assert (found.kind, found.base, found.variant) == ("checkpoint", "chroma", None)
    assert "modulation of all blocks, alone" in found.rule
    library = Catalog.under(root).library
    with pytest.raises(UnsupportedModelError, match=r"--variant hd or --variant base or"):
        library.add(path)
    with pytest.raises(UnsupportedModelError, match=r"no text_encoder \(t5 4096x24\) and no vae"):
        library.add(path, variant="hd")


def test_components_have_one_digest_whatever_file_has_them(root: Path, tmp_path: Path, folder: Path) -> None:
    catalog = Catalog.under(root)
    sharded = chroma.write_folder(tmp_path / "sharded", SEED, max_shard_size="200KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    single = catalog.library.add(chroma.write_single(tmp_path / "all.safetensors", SEED), variant="hd")
    assert catalog.library.add(folder).digest == catalog.library.add(sharded).digest == single.digest


def test_diffusers_converts_the_original_names_to_the_same_tensors() -> None:
    # The converter knows only the published width.
    source = Path(single_file_utils.__file__).read_text()
    begin = source.index("def convert_chroma_transformer_checkpoint_to_diffusers")
    text = source[begin : source.index("\ndef ", begin + 1)].replace("inner_dim = 3072", "inner_dim = 64")
    names: dict[str, Any] = {"torch": torch}
    exec(text, names)
    module = chroma.modules(SEED)["transformer"]
    converted = names["convert_chroma_transformer_checkpoint_to_diffusers"](chroma.original_names(module))
    state = module.state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)


def test_the_table_has_what_the_module_has() -> None:
    with torch.device("meta"):
        state = construct(family("chroma"), PUBLISHED).state_dict()
    assert {row.name: row.shape for row in PUBLISHED.rows()} == {name: tuple(one.shape) for name, one in state.items()}


@pytest.mark.parametrize(
    "name",
    thinned(
        [
            "model.diffusion_model.distilled_guidance_layer.norms.1.scale",
            "model.diffusion_model.double_blocks.1.txt_attn.qkv.weight",
            "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo.weight",
            "model.diffusion_model.single_blocks.1.linear1.bias",
            "model.diffusion_model.img_in.weight",
            "vae.decoder.conv_out.weight",
        ],
        3,
    ),
)
def test_a_missing_tensor_and_a_wrong_shape_are_named(
    name: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "part.safetensors"
    for changed in (None, torch.zeros(3, 5, 7)):
        kept = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(kept if changed is None else {**kept, name: changed}, path)
        with pytest.raises(IncompleteModelError) as error:
            identify(path)
        assert name.removeprefix("model.diffusion_model.") in str(error.value)


def test_settings_come_back_from_shapes_in_both_names() -> None:
    for which in (0, -1):
        assert infer({row.sources[which].name: row.shape for row in PUBLISHED.rows()}) == PUBLISHED


def test_radiance_is_named_and_not_supported(tmp_path: Path) -> None:
    names = ("distilled_guidance_layer.in_proj.bias", "double_blocks.0.img_attn.qkv.weight", "nerf_blocks.0.norm.scale")
    save_file({name: torch.zeros(4) for name in names}, tmp_path / "radiance.safetensors")
    found = identify(tmp_path / "radiance.safetensors")
    assert (found.base, found.layout) == ("chroma-radiance", None)


@pytest.mark.parametrize("variant", thinned(["base", "hd", "unlocked"]))
def test_diffusers_draws_the_same_with_an_exported_folder(variant: str, root: Path, tmp_path: Path) -> None:
    if variant == "base":
        pytest.importorskip("scipy")
    path = chroma.write_single(tmp_path / "all.safetensors", SEED)
    model = Catalog.under(root).library.add(path, variant=variant)
    export.to_diffusers(model, tmp_path / "exported")
    assert identify(tmp_path / "exported").variant == variant
    pipe: Any = diffusers.ChromaPipeline.from_pretrained(tmp_path / "exported")
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
        aligned(module)
    torch.set_num_threads(1)
    image = pipe(
        "a red apple",
        num_inference_steps=2,
        width=64,
        height=48,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    assert hashlib.sha256(image.tobytes()).hexdigest() == hashlib.sha256(pixels(root, model.name)).hexdigest()


def lora(path: Path, name: str, rows: int, down: str, up: str, columns: int = 64) -> Path:
    generator = torch.Generator().manual_seed(1)
    factors = {f"{name}{down}": (4, columns), f"{name}{up}": (rows, 4)}
    save_file({key: torch.randn(shape, generator=generator) * 0.2 for key, shape in factors.items()}, path)
    return path


LORAS = [
    ("diffusion_model.double_blocks.0.img_attn.qkv", 192, ".lora_A.weight", ".lora_B.weight"),
    ("lora_unet_single_blocks_0_linear1", 448, ".lora_down.weight", ".lora_up.weight"),
    ("transformer.single_transformer_blocks.0.proj_mlp", 256, ".lora_A.weight", ".lora_B.weight"),
    ("lora_unet_double_blocks_0_img_mlp_0", 256, ".lora_down.weight", ".lora_up.weight"),
    ("lora_transformer_transformer_blocks_0_attn_to_q", 64, ".lora_down.weight", ".lora_up.weight"),
    ("base_model.model.double_blocks.0.txt_attn.proj", 64, ".lora_A.weight", ".lora_B.weight"),
    ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", 32, ".lora_A.weight", ".lora_B.weight"),
]


@pytest.mark.parametrize(("name", "rows", "down", "up"), thinned(LORAS, 2, unpack=True))
def test_an_adapter_draws_what_the_changed_file_draws(
    name: str, rows: int, down: str, up: str, root: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    own = lora(tmp_path / "own.safetensors", name, rows, down, up, 32 if "guidance" in name else 64)
    # The names of blocks are those of FLUX.1.
    assert identify(own).base == ("chroma" if "guidance" in name else None)
    library = Catalog.under(root).library
    plain, merged = tmp_path / "plain.safetensors", tmp_path / "merged.safetensors"
    save_file(tensors, plain)
    factors = load_file(own)
    difference = factors[f"{name}{up}"] @ factors[f"{name}{down}"]
    save_file(merge(tensors, name, difference), merged)
    plain_model, merged_model = (library.add(path, variant="hd").name for path in (plain, merged))
    one, other = (
        torch.frombuffer(bytearray(pixels(root, model, loras=loras)), dtype=torch.uint8).int()
        for model, loras in ((plain_model, (Lora(str(own)),)), (merged_model, ()))
    )
    assert (one - other).abs().max() <= 1
    unchanged = torch.frombuffer(bytearray(pixels(root, plain_model)), dtype=torch.uint8).int()
    assert (one - unchanged).abs().max() > 1


def merge(tensors: dict[str, torch.Tensor], name: str, difference: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors with the difference added to the weight that an adapter's name means."""
    target, rows = {
        "transformer.single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", slice(192, 448)),
        "lora_unet_double_blocks_0_img_mlp_0": ("double_blocks.0.img_mlp.0", slice(None)),
        "lora_unet_single_blocks_0_linear1": ("single_blocks.0.linear1", slice(None)),
        "lora_transformer_transformer_blocks_0_attn_to_q": ("double_blocks.0.img_attn.qkv", slice(0, 64)),
    }.get(name, (name.removeprefix("diffusion_model.").removeprefix("base_model.model."), slice(None)))
    key = f"model.diffusion_model.{target}.weight"
    changed = tensors[key].clone()
    changed[rows] += difference
    return {**tensors, key: changed}


def test_diffusers_adds_the_same(folder: Path, root: Path, tmp_path: Path) -> None:
    """Chroma's pipeline loads LoRAs as FLUX.1's does. The sums differ by one rounding, so the pixels by 1."""
    name = "transformer.transformer_blocks.0.attn.to_k"
    own = lora(tmp_path / "own.safetensors", name, 64, ".lora_A.weight", ".lora_B.weight")
    pipe = chroma.pipeline(SEED)
    pipe.load_lora_weights(str(own), adapter_name="one")
    pipe.set_adapters(["one"], [0.7])
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(3)
    image = pipe("a red apple", width=64, height=48, num_inference_steps=2, guidance_scale=1.0, generator=generator)
    theirs = torch.frombuffer(bytearray(image.images[0].tobytes()), dtype=torch.uint8).int()
    drawn = pixels(root, str(folder), loras=(Lora(str(own), 0.7),))
    assert (torch.frombuffer(bytearray(drawn), dtype=torch.uint8).int() - theirs).abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "declared", "base"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "", None),
        ("lora_unet_double_blocks_0_img_attn_qkv", "chroma", "chroma"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "flux1", "flux"),
        ("lora_unet_double_blocks_0_img_mod_lin", "", "flux"),
        ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", "", "chroma"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "", "flux2-klein"),
    ],
)
def test_adapters_of_related_families_are_recognised(
    name: str, declared: str, base: str | None, tmp_path: Path
) -> None:
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 64), f"{name}.lora_up.weight": torch.zeros(64, 4)}
    path = tmp_path / "own.safetensors"
    save_file(tensors, path, {"ss_base_model_version": declared} if declared else None)
    found = identify(path)
    assert (found.kind, found.base) == ("lora", base)
