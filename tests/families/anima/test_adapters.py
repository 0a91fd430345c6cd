"""LoRAs for Anima, under every name in use, as diffusers adds them. They also change the text conditioner."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import anima
from support.scale import thinned

import safelight
from safelight.catalog.catalog import Catalog
from safelight.request.adapters import Lora

SEED, RANK, STRENGTH = 5, 4, 0.7

MODULES = {
    "transformer_blocks.0.attn1.to_q": ("blocks.0.self_attn.q_proj", 64, 64),
    "transformer_blocks.1.attn2.to_k": ("blocks.1.cross_attn.k_proj", 64, 48),
    "transformer_blocks.1.attn2.to_out.0": ("blocks.1.cross_attn.output_proj", 64, 64),
    "transformer_blocks.0.ff.net.0.proj": ("blocks.0.mlp.layer1", 128, 64),
    "transformer_blocks.0.norm2.linear_1": ("blocks.0.adaln_modulation_cross_attn.1", 16, 64),
    "patch_embed.proj": ("x_embedder.proj.1", 64, 68),
    "time_embed.t_embedder.linear_2": ("t_embedder.1.linear_2", 192, 64),
    "norm_out.linear_2": ("final_layer.adaln_modulation.2", 128, 16),
    "proj_out": ("final_layer.linear", 64, 64),
}
"""The transformer's matrices that the LoRA changes: names in the module, original names, rows, columns."""

CONDITIONER = {"blocks.0.self_attn.q_proj": (32, 32), "blocks.1.cross_attn.v_proj": (32, 32), "out_proj": (48, 32)}
"""The text conditioner's matrices that the LoRA changes: rows, columns. The first is also a module's original name."""

PLACES = {"transformer": MODULES, "text_conditioner": CONDITIONER}


def pairs(role: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(len(role))
    sizes = {name: size[-2:] for name, size in PLACES[role].items()}
    return {
        name: tuple(torch.randn(shape, generator=generator) * 0.2 for shape in ((RANK, columns), (rows, RANK)))
        for name, (rows, columns) in sizes.items()
    }


def peft(net: str, conditioner: str, original: bool) -> Callable[[str, str, str], str]:
    def name_of(role: str, name: str, slot: str) -> str:
        module = MODULES[name][0] if role == "transformer" and original else name
        prefix = net if role == "transformer" else conditioner
        return f"{prefix}{module}.lora_{'A' if slot == 'down' else 'B'}.weight"

    return name_of


def kohya(net: str, conditioner: str) -> Callable[[str, str, str], str]:
    def name_of(role: str, name: str, slot: str) -> str:
        module = net + MODULES[name][0] if role == "transformer" else conditioner + name
        return f"{module.replace('.', '_')}.lora_{slot}.weight"

    return name_of


NAMINGS: dict[str, Callable[[str, str, str], str]] = {
    "ComfyUI": peft("diffusion_model.", "diffusion_model.llm_adapter.", original=True),
    "ai-toolkit": peft("base_model.model.", "base_model.model.llm_adapter.", original=True),
    "diffusers": peft("transformer.", "text_conditioner.", original=False),
    "kohya": kohya("lora_unet_", "lora_unet_llm_adapter_"),
    "bare": peft("", "llm_adapter.", original=True),
    "LyCORIS": kohya("lycoris_", "lycoris_llm_adapter_"),
}


def write(path: Path, naming: str) -> Path:
    name_of = NAMINGS[naming]
    tensors = {
        name_of(role, name, slot): tensor
        for role in PLACES
        for name, pair in pairs(role).items()
        for slot, tensor in zip(("down", "up"), pair, strict=True)
    }
    save_file(tensors, path)
    return path


def pixels(model: Path, *loras: Path, root: Path) -> bytes:
    request = safelight.Request(
        "a red apple", str(model), seed=3, steps=2, width=64, height=48, cfg=1.0,
        loras=tuple(Lora(str(path), STRENGTH) for path in loras),
    )  # fmt: skip
    return next(safelight.open_engine(root).generate(request)).pixels


@pytest.fixture(scope="module")
def right(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The pixels of a checkpoint into which the test itself has added the differences, with one rounding."""
    place = tmp_path_factory.mktemp("fused")
    path = Path(shutil.copytree(folder, place / "tiny"))
    for role in PLACES:
        [file] = (path / role).glob("*.safetensors")
        weights = load_file(file)
        for name, (down, up) in pairs(role).items():
            weights[f"{name}.weight"].addmm_(up, down, alpha=STRENGTH)
        save_file(weights, file, {"format": "pt"})
    found = pixels(path, root=place / "root")
    assert found != pixels(folder, root=place / "root")
    return found


@pytest.mark.parametrize("naming", thinned(NAMINGS, 2))
def test_each_naming(naming: str, folder: Path, tmp_path: Path, right: bytes) -> None:
    file = write(tmp_path / "lora.safetensors", naming)
    assert pixels(folder, file, root=tmp_path / "root") == right
    assert Catalog.under(tmp_path / "other").adapters.add(file).base == "anima"


@pytest.mark.parametrize("naming", thinned(["ComfyUI", "diffusers"]))
def test_diffusers_adds_the_same(naming: str, folder: Path, tmp_path: Path, right: bytes) -> None:
    """The sums differ by one rounding, so the pixels by 1."""
    pipe: Any = anima.pipeline(SEED, tmp_path / "tokenizers")
    pipe.load_lora_weights(load_file(write(tmp_path / "lora.safetensors", naming)), adapter_name="one")
    pipe.set_adapters(["one"], [STRENGTH])
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0))
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(3)
    image = pipe(prompt="a red apple", width=64, height=48, num_inference_steps=2, generator=generator).images[0]
    theirs = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    ours = torch.frombuffer(bytearray(right), dtype=torch.uint8)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_a_lora_of_stable_diffusion_2_is_still_its_own(tmp_path: Path) -> None:
    """Its cross-attention reads text as wide as Anima's, 1,024."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = {f"{name}.lora_down.weight": torch.zeros(4, 1024), f"{name}.lora_up.weight": torch.zeros(320, 4)}
    save_file(pair, tmp_path / "sd2.safetensors")
    assert Catalog.under(tmp_path / "root").adapters.add(tmp_path / "sd2.safetensors").base == "sd2"


def test_a_lora_for_the_text_conditioner_alone_is_known_by_its_name(tmp_path: Path) -> None:
    name = "diffusion_model.llm_adapter.blocks.0.mlp.0"
    pair = {f"{name}.lora_A.weight": torch.zeros(4, 1024), f"{name}.lora_B.weight": torch.zeros(4096, 4)}
    save_file(pair, tmp_path / "adapter.safetensors")
    assert Catalog.under(tmp_path / "root").adapters.add(tmp_path / "adapter.safetensors").base == "anima"


def test_the_text_conditioner_has_the_strength_of_the_denoiser(folder: Path, tmp_path: Path, right: bytes) -> None:
    """ComfyUI has both in one module. A strength of 0 on the text encoder does not turn it off."""
    file = write(tmp_path / "lora.safetensors", "ComfyUI")
    lora = Lora(str(file), unet=STRENGTH, text_encoder=0.0)
    request = safelight.Request(
        "a red apple", str(folder), seed=3, steps=2, width=64, height=48, cfg=1.0, loras=(lora,)
    )
    assert next(safelight.open_engine(tmp_path / "root").generate(request)).pixels == right
