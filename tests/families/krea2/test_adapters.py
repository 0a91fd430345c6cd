"""LoRAs for Krea 2, under every name in use, as diffusers adds them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import krea2
from support.scale import thinned

import safelight
from safelight.catalog.catalog import Catalog
from safelight.request.adapters import Lora

SEED, RANK, STRENGTH = 5, 4, 0.7

MODULES = {
    "transformer_blocks.0.attn.to_q": ("blocks.0.attn.wq", 64, 64),
    "transformer_blocks.1.attn.to_k": ("blocks.1.attn.wk", 32, 64),
    "transformer_blocks.1.attn.to_gate": ("blocks.1.attn.gate", 64, 64),
    "transformer_blocks.0.attn.to_out.0": ("blocks.0.attn.wo", 64, 64),
    "transformer_blocks.0.ff.down": ("blocks.0.mlp.down", 64, 96),
    "text_fusion.refiner_blocks.0.attn.to_v": ("txtfusion.refiner_blocks.0.attn.wv", 16, 32),
    "text_fusion.projector": ("txtfusion.projector", 1, 2),
    "img_in": ("first", 64, 64),
    "time_embed.linear_1": ("tmlp.0", 64, 32),
    "time_mod_proj": ("tproj.1", 384, 64),
    "txt_in.linear_2": ("txtmlp.3", 64, 64),
    "final_layer.linear": ("last.linear", 64, 64),
}
"""The matrices that the LoRA of the tests changes: names in the module, original names, rows, columns."""


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (
            torch.randn(RANK, columns, generator=generator) * 0.2,
            torch.randn(rows, RANK, generator=generator) * 0.2,
        )
        for name, (_, rows, columns) in MODULES.items()
    }


def peft(prefix: str, original: bool) -> Callable[[str, str], str]:
    def name_of(name: str, slot: str) -> str:
        return f"{prefix}{MODULES[name][0] if original else name}.lora_{'A' if slot == 'down' else 'B'}.weight"

    return name_of


def kohya(prefix: str, original: bool) -> Callable[[str, str], str]:
    def name_of(name: str, slot: str) -> str:
        return f"{prefix}{(MODULES[name][0] if original else name).replace('.', '_')}.lora_{slot}.weight"

    return name_of


NAMINGS: dict[str, Callable[[str, str], str]] = {
    "ComfyUI": peft("diffusion_model.", original=True),
    "diffusers": peft("transformer.", original=False),
    "kohya": kohya("lora_unet_", original=True),
    "ai-toolkit": peft("base_model.model.", original=True),
    "bare": peft("", original=False),
    "OneTrainer": kohya("lora_transformer_", original=False),
}


def write(path: Path, naming: str) -> Path:
    name_of = NAMINGS[naming]
    tensors = {
        name_of(name, slot): tensor
        for name, pair in pairs().items()
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
def right(turbo: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The pixels of a checkpoint into which the test itself has added the differences, with one rounding."""
    place = tmp_path_factory.mktemp("fused")
    path = Path(shutil.copytree(turbo, place / "tiny"))
    for file in (path / "transformer").glob("*.safetensors"):
        weights = load_file(file)
        for name, (down, up) in pairs().items():
            if f"{name}.weight" in weights:
                weights[f"{name}.weight"].addmm_(up, down, alpha=STRENGTH)
        save_file(weights, file, {"format": "pt"})
    found = pixels(path, root=place / "root")
    assert found != pixels(turbo, root=place / "root")
    return found


@pytest.mark.parametrize("naming", thinned(NAMINGS, 2))
def test_each_naming(naming: str, turbo: Path, tmp_path: Path, right: bytes) -> None:
    file = write(tmp_path / "lora.safetensors", naming)
    assert pixels(turbo, file, root=tmp_path / "root") == right
    assert Catalog.under(tmp_path / "other").adapters.add(file).base == "krea-2"


@pytest.mark.parametrize("naming", thinned(["ComfyUI", "ai-toolkit", "diffusers"]))
def test_diffusers_adds_the_same(naming: str, turbo: Path, tmp_path: Path, right: bytes) -> None:
    """The fused weights of diffusers' ``load_lora_weights`` are ours within one rounding: the pixels differ by 1."""
    built: dict[str, Any] = dict(krea2.modules(SEED))
    pipe = krea2.pipeline_of({**built, "transformer": copy.deepcopy(built["transformer"])}, distilled=True)
    pipe.load_lora_weights(str(write(tmp_path / "lora.safetensors", naming)), adapter_name="one")
    pipe.set_adapters(["one"], [STRENGTH])
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(3)
    image = pipe("a red apple", width=64, height=48, num_inference_steps=2, guidance_scale=0.0, generator=generator)
    theirs = torch.frombuffer(bytearray(image.images[0].tobytes()), dtype=torch.uint8)
    ours = torch.frombuffer(bytearray(right), dtype=torch.uint8)
    assert (ours.int() - theirs.int()).abs().max() <= 1
