"""LoRAs and their relatives for FLUX.2 klein, under every name in use, as diffusers merges them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from support import flux2, loras, naming
from support.checkpoints import random_module
from support.loras import Tensors, Weights
from support.scale import thinned
from torch import nn

from safelight.catalog.identify import identify, read_header
from safelight.families.parts import flux_adapters

SEED, RANK, STRENGTH = 5, 4, 0.7
WIDTH, HIDDEN = 64, 192
CONFIG = flux2.configs()["transformer"]
PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
"""What ``Flux2KleinPipeline`` takes."""

ORIGINALS = {
    **{f"double_blocks.0.{stream}_attn.qkv": (3 * WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"double_blocks.1.{stream}_attn.proj": (WIDTH, WIDTH) for stream in ("img", "txt")},
    "double_blocks.0.img_mlp.0": (2 * HIDDEN, WIDTH),
    "double_blocks.1.txt_mlp.2": (WIDTH, HIDDEN),
    "single_blocks.0.linear1": (3 * WIDTH + 2 * HIDDEN, WIDTH),
    "single_blocks.1.linear2": (WIDTH, WIDTH + HIDDEN),
    "img_in": (WIDTH, 128),
    "txt_in": (WIDTH, 96),
    "time_in.in_layer": (WIDTH, 256),
    "final_layer.linear": (128, WIDTH),
}
"""Matrices by their original names, which diffusers reads in kohya's files too."""

MODULATIONS = {
    "double_stream_modulation_img.lin": (6 * WIDTH, WIDTH),
    "double_stream_modulation_txt.lin": (6 * WIDTH, WIDTH),
    "single_stream_modulation.lin": (3 * WIDTH, WIDTH),
}

OWN = {
    **{f"transformer_blocks.0.attn.{part}": (WIDTH, WIDTH) for part in ("to_q", "to_out.0", "add_k_proj")},
    "transformer_blocks.1.attn.to_add_out": (WIDTH, WIDTH),
    "transformer_blocks.1.ff.linear_in": (2 * HIDDEN, WIDTH),
    "transformer_blocks.1.ff_context.linear_out": (WIDTH, HIDDEN),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (3 * WIDTH + 2 * HIDDEN, WIDTH),
    "single_transformer_blocks.1.attn.to_out": (WIDTH, WIDTH + HIDDEN),
}
"""Matrices by diffusers' names."""


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.2


def pairs(shapes: Mapping[str, tuple[int, int]], name_of: Callable[[str, str], str], alpha: bool = False) -> Tensors:
    """Low-rank pairs for matrices. ``name_of``: names the tensor of a module and a slot."""
    out: Tensors = {}
    for module, (rows, columns) in shapes.items():
        out |= {name_of(module, "down"): drawn(RANK, columns), name_of(module, "up"): drawn(rows, RANK)}
        out |= {name_of(module, "alpha"): torch.tensor(2.0)} if alpha else {}
    return out


def kohya(prefix: str) -> Callable[[str, str], str]:
    return lambda module, slot: (
        f"{prefix}{module.replace('.', '_')}" + (".alpha" if slot == "alpha" else f".lora_{slot}.weight")
    )


def peft(prefix: str) -> Callable[[str, str], str]:
    return lambda module, slot: f"{prefix}{module}.lora_{'A' if slot == 'down' else 'B'}.weight"


def lokr(shapes: Mapping[str, tuple[int, int]], name_of: Callable[[str], str]) -> Tensors:
    out: Tensors = {}
    for module, (rows, columns) in shapes.items():
        out |= {f"{name_of(module)}.lokr_w1": drawn(2, 2), f"{name_of(module)}.lokr_w2_a": drawn(rows // 2, RANK)}
        out |= {
            f"{name_of(module)}.lokr_w2_b": drawn(RANK, columns // 2),
            f"{name_of(module)}.alpha": torch.tensor(2.0),
        }
    return out


NAMINGS: dict[str, Callable[[], Tensors]] = {
    "kohya": lambda: pairs(ORIGINALS, kohya("lora_unet_"), alpha=True),
    "ai-toolkit": lambda: pairs({**ORIGINALS, **MODULATIONS}, peft("diffusion_model.")),
    "diffusers": lambda: pairs(OWN, peft("transformer.")),
    "diffusers in ComfyUI": lambda: pairs(OWN, peft("diffusion_model.")),
    "PEFT": lambda: pairs(ORIGINALS, peft("base_model.model.")),
    "PEFT in diffusers' names": lambda: pairs(OWN, peft("base_model.model.")),
    "LyCORIS": lambda: lokr(OWN, lambda module: f"lycoris_{module.replace('.', '_')}"),
    "SimpleTuner's LoKr": lambda: lokr(OWN, lambda module: module),
}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return random_module("flux2-klein", CONFIG, torch.Generator().manual_seed(SEED))


@pytest.fixture(scope="module")
def weights(module: nn.Module) -> Weights:
    return {"transformer": dict(module.state_dict())}


def merged(weights: Weights, tensors: Tensors) -> Weights:
    return loras.merged("flux2-klein", {"transformer": CONFIG}, weights, tensors, STRENGTH)


@pytest.mark.parametrize("naming_", NAMINGS)
def test_diffusers_merges_the_same(naming_: str, module: nn.Module, weights: Weights) -> None:
    tensors = NAMINGS[naming_]()
    parts: dict[str, Any] = dict.fromkeys(PARTS) | {"transformer": copy.deepcopy(module)}
    pipe: Any = diffusers.Flux2KleinPipeline(**parts)
    loras.assert_same(merged(weights, tensors), loras.merged_by_diffusers(pipe, tensors, STRENGTH))


def relative(kind: str, rows: int) -> tuple[Tensors, Callable[[torch.Tensor], torch.Tensor]]:
    """The tensors of a LoRA or a relative for a matrix of ``rows`` rows, and what it adds to the matrix."""
    down, up = drawn(RANK, WIDTH), drawn(rows, RANK)
    match kind:
        case "lora":
            return {"lora_A.weight": down, "lora_B.weight": up}, lambda _: up @ down
        case "lokr":
            tensors = {"lokr_w1": drawn(2, 2), "lokr_w2": drawn(rows // 2, WIDTH // 2), "alpha": torch.tensor(3.0)}
            return tensors, lambda _: torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
        case _:
            scale = drawn(rows, 1).abs() + 0.5

            def added(weight: torch.Tensor) -> torch.Tensor:
                changed = weight + up @ down
                return changed * (scale / changed.norm(dim=1, keepdim=True)) - weight

            return {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}, added


FUSED = {
    "diffusion_model.double_blocks.0.txt_attn.qkv": ("double_blocks.0.txt_attn.qkv", 3 * WIDTH),
    "transformer.transformer_blocks.1.attn.to_qkv": ("double_blocks.1.img_attn.qkv", 3 * WIDTH),
    "transformer.transformer_blocks.1.attn.to_added_qkv": ("double_blocks.1.txt_attn.qkv", 3 * WIDTH),
    "diffusion_model.single_blocks.1.linear1": ("single_blocks.1.linear1", 9 * WIDTH),
    "diffusion_model.final_layer.adaLN_modulation.1": ("final_layer.adaLN_modulation.1", 2 * WIDTH),
    "lora_unet_final_layer_adaLN_modulation_1": ("final_layer.adaLN_modulation.1", 2 * WIDTH),
}
"""Names of adapters for whole matrices of the original, with the matrix and its rows."""


@pytest.mark.parametrize("kind", ["lora", "lokr", "dora"])
@pytest.mark.parametrize("name", FUSED)
def test_the_matrices_of_the_original_are_changed(name: str, kind: str, weights: Weights) -> None:
    """diffusers merges a LoKr for a fused projection only into fused models, and does not swap the last layer."""
    original, rows = FUSED[name]
    suffixes, added = relative(kind, rows)
    ours = merged(weights, {f"{name}.{suffix}": tensor for suffix, tensor in suffixes.items()})["transformer"]
    before = naming.in_files(CONFIG, weights["transformer"], 1)
    after = naming.in_files(CONFIG, weights["transformer"] | ours, 1)
    matrix = before[f"{original}.weight"]
    wanted = before | {f"{original}.weight": matrix + STRENGTH * added(matrix)}
    loras.assert_same({"transformer": after}, {"transformer": wanted})


@pytest.mark.parametrize("naming_", thinned(NAMINGS, 4))
def test_the_family_is_recognised(naming_: str, tmp_path: Path) -> None:
    save_file(NAMINGS[naming_](), tmp_path / "x.safetensors")
    found = identify(tmp_path / "x.safetensors")
    assert (found.kind, found.base) == ("lokr" if "Ly" in naming_ or "LoKr" in naming_ else "lora", "flux2-klein")


OTHERS = {
    "single_blocks.0.linear1": (7 * WIDTH, WIDTH),
    "double_blocks.0.txt_mlp.0": (4 * WIDTH, WIDTH),
    "double_blocks.8.img_attn.qkv": (3 * WIDTH, WIDTH),
    "single_blocks.24.linear2": (WIDTH, 5 * WIDTH),
}
"""Matrices of FLUX.1 and Chroma. klein has others of these names, or has no such block."""


@pytest.mark.parametrize("name_of", [kohya("lora_unet_"), peft("diffusion_model.")])
def test_names_that_it_shares_with_flux1_are_told_by_their_proportions(
    name_of: Callable[[str, str], str], tmp_path: Path
) -> None:
    def signs(shapes: dict[str, tuple[int, int]]) -> tuple[bool, bool]:
        save_file(pairs(shapes, name_of), tmp_path / "x.safetensors")
        header = read_header(tmp_path / "x.safetensors")
        return flux_adapters.may_change_klein(header), flux_adapters.may_change_flux1(header)

    either = {"double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH)}
    assert signs(either) == (True, True)
    for name in ("single_blocks.0.linear1", "double_blocks.0.img_mlp.0"):
        assert signs({**either, name: ORIGINALS[name]}) == (True, False)
        assert identify(tmp_path / "x.safetensors").base == "flux2-klein"
    for name, shape in OTHERS.items():
        assert signs({**either, name: shape}) == (False, True)
    assert signs({"img_in": (WIDTH, 128)}) == (False, False)


def test_what_fits_nothing_is_named() -> None:
    stranger = "diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight"
    tensors = NAMINGS["ai-toolkit"]() | {stranger: drawn(4, 64)}
    assert loras.matched("flux2-klein", {"transformer": CONFIG}, tensors).unknown == (stranger,)
