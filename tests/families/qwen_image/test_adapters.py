"""LoRAs and their relatives for Qwen-Image, under every name in use, as diffusers adds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import qwen_image
from support.scale import thinned
from support.zimage import changed_weights

import safelight
from safelight.catalog.identify import identify
from safelight.request.adapters import Lora

SEED, RANK, STRENGTH, ALPHA = 5, 4, 0.7, 2.0
WIDTH = 64
REQUEST = safelight.Request("a red apple", "", seed=3, steps=2, width=64, height=48, cfg=1.0)


def layers() -> dict[str, tuple[int, int]]:
    """The matrices that the LoRA of the tests changes, by name in the module."""
    parts = ("to_q", "to_out.0", "add_k_proj", "to_add_out")
    found = {f"transformer_blocks.{n}.attn.{part}": (WIDTH, WIDTH) for n in (0, 1) for part in parts}
    block = "transformer_blocks.1"
    return found | {
        f"{block}.img_mod.1": (6 * WIDTH, WIDTH),
        f"{block}.txt_mlp.net.0.proj": (4 * WIDTH, WIDTH),
        f"{block}.img_mlp.net.2": (WIDTH, 4 * WIDTH),
    }


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (
            torch.randn(RANK, columns, generator=generator) * 0.2,
            torch.randn(rows, RANK, generator=generator) * 0.2,
        )
        for name, (rows, columns) in layers().items()
    }


def peft(prefix: str, inner: str = "") -> Callable[[str, str], str]:
    return lambda name, slot: f"{prefix}{name}.lora_{'A' if slot == 'down' else 'B'}{inner}.weight"


def kohya(prefix: str) -> Callable[[str, str], str]:
    return lambda name, slot: f"{prefix}{name.replace('.', '_')}.lora_{slot}.weight"


NAMINGS: dict[str, Callable[[str, str], str]] = {
    "diffusers": peft("transformer."),
    "ComfyUI": peft("diffusion_model."),
    "kohya": kohya("lora_unet_"),
    "Lightning": lambda name, slot: f"{name}.lora_{slot}.weight",
    "PEFT": peft("base_model.model."),
    "adapter name": peft("", ".default"),
    "bare": peft(""),
    "OneTrainer": kohya("lora_transformer_"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.write_folder(tmp_path_factory.mktemp("qwen-image") / "tiny", SEED)


def pixels(model: Path, *loras: Path, root: Path) -> bytes:
    request = replace(REQUEST, model=str(model), loras=tuple(Lora(str(path), STRENGTH) for path in loras))
    return next(safelight.open_engine(root).generate(request)).pixels


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The pixels of a checkpoint into which the test itself has added the differences, with one rounding."""
    place = tmp_path_factory.mktemp("fused")
    path = qwen_image.write_folder(place / "tiny", SEED)
    with changed_weights(path / "transformer") as weights:
        for name, (down, up) in pairs().items():
            weights[f"{name}.weight"].addmm_(up, down, alpha=STRENGTH * ALPHA / RANK)
    return pixels(path, root=place / "root")


def write(path: Path, naming: str) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in pairs().items():
        tensors |= {NAMINGS[naming](name, slot): tensor for slot, tensor in zip(("down", "up"), pair, strict=True)}
        alpha = NAMINGS[naming](name, "down").partition(".lora_")[0]
        tensors[f"{alpha}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("naming", thinned(NAMINGS, 2))
def test_each_naming(naming: str, folder: Path, tmp_path: Path, right: bytes) -> None:
    path = write(tmp_path / "lora.safetensors", naming)
    assert identify(path).base == "qwen-image"
    assert pixels(folder, path, root=tmp_path / "root") == right


@pytest.mark.parametrize("naming", thinned(["ComfyUI", "kohya"]))
def test_diffusers_adds_the_same(naming: str, folder: Path, tmp_path: Path, right: bytes) -> None:
    """The fused weights of diffusers' ``load_lora_weights`` are ours within one rounding: the pixels differ by 1."""
    pipe = qwen_image.pipeline(SEED)
    pipe.load_lora_weights(str(write(tmp_path / "lora.safetensors", naming)), adapter_name="one")
    pipe.set_adapters(["one"], [STRENGTH])
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(3)
    image = pipe("a red apple", width=64, height=48, num_inference_steps=2, true_cfg_scale=1.0, generator=generator)
    theirs = torch.frombuffer(bytearray(image.images[0].tobytes()), dtype=torch.uint8)
    assert (torch.frombuffer(bytearray(right), dtype=torch.uint8).int() - theirs.int()).abs().max() <= 1


def test_an_adapter_of_the_attention_alone_is_recognised(tmp_path: Path) -> None:
    """By the number of blocks: other families have fewer blocks with these names."""
    down, up = torch.zeros(RANK, WIDTH), torch.zeros(WIDTH, RANK)
    for name in ("transformer_blocks.59.attn.to_q", "lora_unet_transformer_blocks_38_attn_to_q"):
        save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
        assert identify(tmp_path / "lora.safetensors").base == "qwen-image"


@pytest.mark.parametrize("kind", thinned(["lokr", "dora"]))
def test_other_kinds(kind: str, folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    name = "transformer_blocks.0.attn.to_q"
    path = qwen_image.write_folder(tmp_path / "changed", SEED)
    with changed_weights(path / "transformer") as weights:
        weight = weights[f"{name}.weight"]
        if kind == "lokr":
            one, two = torch.randn(8, 8, generator=generator) * 0.3, torch.randn(8, 8, generator=generator) * 0.3
            tensors = {"lokr_w1": one, "lokr_w2": two}
            weight.add_(torch.kron(one, two), alpha=STRENGTH)
        else:
            down, up = pairs()[name]
            magnitude = torch.rand(WIDTH, 1, generator=generator) + 0.5
            tensors = {"lora_A.weight": down, "lora_B.weight": up, "dora_scale": magnitude}
            changed = weight + up @ down
            norm = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
            weight.add_(changed * (magnitude / norm) - weight, alpha=STRENGTH)
    file = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.{name}.{leaf}": tensor for leaf, tensor in tensors.items()}, file)
    found = [pixels(folder, file, root=tmp_path / "root"), pixels(path, root=tmp_path / "root")]
    ours, theirs = (torch.frombuffer(bytearray(one), dtype=torch.uint8).int() for one in found)
    assert (ours - theirs).abs().max() <= 1
