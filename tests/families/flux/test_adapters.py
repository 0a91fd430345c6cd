"""LoRAs and their relatives for FLUX.1, under every name in use, as diffusers merges them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from support import flux, loras
from support.loras import Tensors, Weights
from torch import nn

from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.errors import SafelightError
from safelight.families.flux.spec import FLUX

PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
"""What ``FluxPipeline`` takes."""

SEED, RANK, STRENGTH = 5, 4, 0.7
WIDTH = 64

ORIGINALS = {
    **{f"double_blocks.0.{stream}_attn.qkv": (3 * WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"double_blocks.1.{stream}_attn.proj": (WIDTH, WIDTH) for stream in ("img", "txt")},
    "double_blocks.0.img_mlp.0": (4 * WIDTH, WIDTH),
    "double_blocks.0.txt_mlp.2": (WIDTH, 4 * WIDTH),
    "double_blocks.0.img_mod.lin": (6 * WIDTH, WIDTH),
    "single_blocks.0.linear2": (WIDTH, 5 * WIDTH),
    "single_blocks.1.modulation.lin": (3 * WIDTH, WIDTH),
    "final_layer.linear": (64, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    "img_in": (WIDTH, 64),
    "txt_in": (WIDTH, 32),
    "time_in.in_layer": (WIDTH, 256),
    "guidance_in.out_layer": (WIDTH, WIDTH),
    "vector_in.in_layer": (WIDTH, WIDTH),
}
"""Matrices by their original names. Only of ``linear1`` do diffusers' converters want the published width."""

OWN = {
    **{
        f"transformer_blocks.0.attn.{part}": (WIDTH, WIDTH) for part in ("to_q", "to_out.0", "add_k_proj", "to_add_out")
    },
    **{f"single_transformer_blocks.1.attn.{part}": (WIDTH, WIDTH) for part in ("to_k", "to_v")},
}
"""Matrices by diffusers' names, which OneTrainer's files have too."""


def pairs(
    shapes: Mapping[str, tuple[int, int]], name_of: Callable[[str, str], str], alpha: bool = False, rank: int = RANK
) -> Tensors:
    """Low-rank pairs for matrices. ``name_of``: names the tensor of a module and a slot."""
    generator = torch.Generator().manual_seed(3)
    out: Tensors = {}
    for module, (rows, columns) in shapes.items():
        out[name_of(module, "down")] = torch.randn(rank, columns, generator=generator) * 0.2
        out[name_of(module, "up")] = torch.randn(rows, rank, generator=generator) * 0.2
        # diffusers drops the alpha of the last layer.
        if alpha and not module.startswith("final_layer"):
            out[name_of(module, "alpha")] = torch.tensor(2.0)
    return out


def kohya(prefix: str) -> Callable[[str, str], str]:
    return lambda module, slot: (
        f"{prefix}{module.replace('.', '_')}" + (".alpha" if slot == "alpha" else f".lora_{slot}.weight")
    )


def peft(prefix: str) -> Callable[[str, str], str]:
    endings = {"down": ".lora_A.weight", "up": ".lora_B.weight", "alpha": ".alpha"}
    return lambda module, slot: f"{prefix}{module}{endings[slot]}"


def xlabs(prefix: str) -> Tensors:
    """XLabs' names. An adapter for a single block has no part for the feed-forward layer."""
    shapes = {
        "double_blocks.0.processor.qkv_lora1": (3 * WIDTH, WIDTH),
        "double_blocks.0.processor.qkv_lora2": (3 * WIDTH, WIDTH),
        "double_blocks.1.processor.proj_lora1": (WIDTH, WIDTH),
        "double_blocks.1.processor.proj_lora2": (WIDTH, WIDTH),
        "single_blocks.0.processor.qkv_lora": (3 * WIDTH, WIDTH),
        "single_blocks.1.processor.proj_lora": (WIDTH, 5 * WIDTH),
    }
    return pairs(shapes, lambda module, slot: f"{prefix}{module}.{slot}.weight")


def comfy(module: str, slot: str) -> str:
    return f"diffusion_model.{module}" + (".alpha" if slot == "alpha" else f".lora_{slot}.weight")


NAMINGS: dict[str, Callable[[], Tensors]] = {
    "kohya": lambda: pairs(ORIGINALS, kohya("lora_unet_"), alpha=True),
    "diffusers": lambda: pairs(OWN, peft("transformer.")),
    "diffusers with alpha": lambda: pairs(OWN, peft("transformer."), alpha=True),
    "OneTrainer": lambda: pairs(OWN, kohya("lora_transformer_"), alpha=True),
    "XLabs": lambda: xlabs(""),
    "XLabs in ComfyUI": lambda: xlabs("diffusion_model."),
    "ComfyUI": lambda: pairs(ORIGINALS, comfy, alpha=True),
}


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return flux.modules(SEED)


@pytest.fixture(scope="module")
def weights(modules: dict[str, nn.Module]) -> Weights:
    return {role: dict(module.state_dict()) for role, module in modules.items()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_diffusers_merges_the_same(naming: str, modules: dict[str, nn.Module], weights: Weights) -> None:
    tensors = NAMINGS[naming]()
    ours = loras.merged("flux", flux.configs(), weights, tensors, STRENGTH)
    changed = {"transformer": copy.deepcopy(modules["transformer"])}
    pipe: Any = diffusers.FluxPipeline(**dict.fromkeys(PARTS) | changed)
    loras.assert_same(ours, loras.merged_by_diffusers(pipe, tensors, STRENGTH))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "base_model.model."])
def test_pairs_of_original_names(prefix: str, weights: Weights) -> None:
    """diffusers reads these names under ``base_model.model.`` only, and there it wants a whole transformer."""
    ours = loras.merged("flux", flux.configs(), weights, pairs(ORIGINALS, peft(prefix)), STRENGTH)
    right = loras.merged("flux", flux.configs(), weights, pairs(ORIGINALS, kohya("lora_unet_")), STRENGTH)
    loras.assert_same(ours, right)


def test_whole_transformers_of_the_published_width() -> None:
    """diffusers' converters of kohya's and fal's files split ``linear1`` at fixed rows; the width is the published."""
    wide, rows = 3072, {"qkv": 3, "proj": 1, "lin": 6, "linear1": 7, "linear2": 1, "modulation.lin": 3}
    shapes: dict[str, tuple[int, int]] = {"final_layer.linear": (64, wide)}
    for n in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{n}.{stream}"
            shapes |= {f"{block}_attn.{part}": (rows[part] * wide, wide) for part in ("qkv", "proj")}
            shapes |= {f"{block}_mod.lin": (6 * wide, wide)}
            shapes |= {f"{block}_mlp.0": (4 * wide, wide), f"{block}_mlp.2": (wide, 4 * wide)}
    for n in range(38):
        shapes |= {f"single_blocks.{n}.linear1": (7 * wide, wide), f"single_blocks.{n}.linear2": (wide, 5 * wide)}
        shapes |= {f"single_blocks.{n}.modulation.lin": (3 * wide, wide)}
    config = {"transformer": FLUX.component("transformer").standard}
    for tensors in (pairs(shapes, kohya("lora_unet_"), True, 1), pairs(shapes, peft("base_model.model."), rank=1)):
        found = loras.matched("flux", config, tensors)
        assert (found.unknown, found.mismatched) == ((), ())
        converted = diffusers.FluxPipeline.lora_state_dict(dict(tensors))
        theirs = {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}
        for change in found.changes["transformer"]:
            slots = {slot: tensors[name] for slot, name in change.slots.items()}
            assert change.rows is None or len(change.rows) == 1
            first, count = (change.rows or ((0, None),))[0]
            up = slots["up"][first : None if count is None else first + count] * slots.get("alpha", 1.0)
            name = change.target.removesuffix(".weight")
            down, other = (theirs.pop(f"{name}.lora_{letter}.weight") for letter in "AB")
            # The product of a column and a row is known by its first row and its first column.
            torch.testing.assert_close(up @ slots["down"][:, :1], other @ down[:, :1])
            torch.testing.assert_close(up[:1] @ slots["down"], other[:1] @ down)
        assert not theirs


ENCODERS = {
    "kohya": ("lora_te1_text_model_", "lora_te3_", kohya),
    "OneTrainer": ("lora_te1_text_model_", "lora_te2_", kohya),
    "diffusers": ("text_encoder.text_model.", "text_encoder_2.", peft),
    "ComfyUI": ("text_encoders.clip_l.transformer.text_model.", "text_encoders.t5xxl.transformer.", peft),
}


@pytest.mark.parametrize("naming", ENCODERS)
def test_text_encoders(naming: str, weights: Weights) -> None:
    """diffusers leaves out T5's, and with this transformers CLIP's too; so the test merges them."""
    first, second, named = ENCODERS[naming]
    clip = {"encoder.layers.0.self_attn.q_proj": (64, 64), "encoder.layers.1.mlp.fc1": (64, 64)}
    t5 = {"encoder.block.0.layer.0.SelfAttention.q": (32, 32), "encoder.block.1.layer.1.DenseReluDense.wo": (32, 64)}
    wanted: Weights = {}
    for role, shapes in (("text_encoder", clip), ("text_encoder_2", t5)):
        tensors = pairs(shapes, lambda module, slot: f"{module} {slot}", True)
        wanted[role] = {
            f"{module}.weight": weights[role][f"{module}.weight"]
            + STRENGTH * 2.0 / RANK * tensors[f"{module} up"] @ tensors[f"{module} down"]
            for module in shapes
        }
    tensors = pairs(clip, named(first), True) | pairs(t5, named(second), True)
    loras.assert_same(loras.merged("flux", flux.configs(), weights, tensors, STRENGTH), wanted)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.2


def relative(kind: str, rows: int) -> tuple[Tensors, Callable[[torch.Tensor], torch.Tensor]]:
    """The tensors of a LoRA's relative for a matrix of ``rows`` rows, by suffix, and what it adds to the matrix."""
    match kind:
        case "lokr":
            tensors = {"lokr_w1": drawn(2, 2), "lokr_w2": drawn(rows // 2, WIDTH // 2), "alpha": torch.tensor(3.0)}
            return tensors, lambda _: torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
        case "lokr of low rank":
            a, b = drawn(rows // 2, RANK), drawn(RANK, WIDTH // 2)
            tensors = {"lokr_w1": drawn(2, 2), "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(2.0)}
            return tensors, lambda _: torch.kron(tensors["lokr_w1"], a @ b) * 2 / RANK
        case "loha":
            (a, b), (c, d) = ((drawn(rows, rank), drawn(rank, WIDTH)) for rank in (3, 5))
            return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, lambda _: (a @ b) * (c @ d)
        case "diff":
            whole = drawn(rows, WIDTH)
            return {"diff": whole}, lambda _: whole
        case _:
            down, up, scale = drawn(RANK, WIDTH), drawn(rows, RANK), drawn(rows, 1).abs() + 0.5

            def added(weight: torch.Tensor) -> torch.Tensor:
                changed = weight + up @ down
                return changed * (scale / changed.norm(dim=1, keepdim=True)) - weight

            return {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}, added


FUSED = {
    "double_blocks.0.txt_attn.qkv": 3 * WIDTH,
    "single_blocks.1.linear1": 7 * WIDTH,
    "final_layer.adaLN_modulation.1": 2 * WIDTH,
}


def after(modules: dict[str, nn.Module], changed: Tensors) -> Tensors:
    """The transformer's tensors under their original names, with some tensors of the module changed."""
    module = copy.deepcopy(modules["transformer"])
    module.load_state_dict(module.state_dict() | changed)
    return flux.original_names(module)


@pytest.mark.parametrize("kind", ["lokr", "lokr of low rank", "loha", "diff", "dora"])
@pytest.mark.parametrize("module", FUSED)
def test_relatives_change_the_original_matrices(
    module: str, kind: str, modules: dict[str, nn.Module], weights: Weights
) -> None:
    suffixes, added = relative(kind, FUSED[module])
    name = f"lora_unet_{module.replace('.', '_')}"
    tensors = {f"{name}.{suffix}": tensor for suffix, tensor in suffixes.items()}
    ours = loras.merged("flux", flux.configs(), weights, tensors, STRENGTH)["transformer"]
    before = after(modules, {})
    wanted = before | {f"{module}.weight": before[f"{module}.weight"] + STRENGTH * added(before[f"{module}.weight"])}
    loras.assert_same({"transformer": after(modules, ours)}, {"transformer": wanted})


def test_norms_and_biases(modules: dict[str, nn.Module], weights: Weights) -> None:
    names = {
        "double_blocks.0.img_attn.norm.query_norm.scale": "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm",
        "double_blocks.1.txt_attn.norm.key_norm.scale": "lora_unet_double_blocks_1_txt_attn_norm_key_norm.diff",
        "single_blocks.0.norm.key_norm.scale": "diffusion_model.single_blocks.0.norm.key_norm.scale.diff",
        "double_blocks.0.txt_attn.qkv.bias": "lora_unet_double_blocks_0_txt_attn_qkv.diff_b",
        "single_blocks.0.linear1.bias": "lora_unet_single_blocks_0_linear1.diff_b",
        "final_layer.adaLN_modulation.1.bias": "diffusion_model.final_layer.adaLN_modulation.1.diff_b",
        "img_in.bias": "lora_unet_img_in.b_norm",
    }
    wanted = after(modules, {})
    tensors = {name: drawn(len(wanted[original])) for original, name in names.items()}
    ours = loras.merged("flux", flux.configs(), weights, tensors, STRENGTH)["transformer"]
    wanted |= {original: wanted[original] + STRENGTH * tensors[name] for original, name in names.items()}
    loras.assert_same({"transformer": after(modules, ours)}, {"transformer": wanted})


@pytest.mark.parametrize(
    ("naming", "stranger"),
    [
        ("OneTrainer", "bundle_emb.cat.clip_l"),
        ("kohya", "lora_unet_double_blocks_9_img_mlp_0.alpha"),
        ("kohya", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        ("XLabs", "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"),
    ],
)
def test_what_fits_nothing_is_named(naming: str, stranger: str) -> None:
    """A part of a projection cannot be changed beside the whole."""
    assert loras.matched("flux", flux.configs(), NAMINGS[naming]() | {stranger: drawn(4, 64)}).unknown == (stranger,)


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_family_is_recognised(naming: str, tmp_path: Path) -> None:
    save_file(NAMINGS[naming](), tmp_path / "x.safetensors")
    found = identify(tmp_path / "x.safetensors")
    assert (found.kind, found.base) == ("lora", "flux")


def test_a_control_lora_is_refused_for_what_it_is(root: Path, tmp_path: Path) -> None:
    tensors = pairs({"double_blocks.0.img_attn.qkv": (192, 64)}, peft(""))
    save_file(tensors | {"double_blocks.0.img_attn.norm.query_norm.scale": drawn(32)}, tmp_path / "x.safetensors")
    with pytest.raises(SafelightError, match=r"is a control_lora .*makes FLUX\.1 read a second picture"):
        Catalog.under(root).adapters.add(tmp_path / "x.safetensors")
