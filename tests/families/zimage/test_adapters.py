"""LoRAs and their relatives for Z-Image, under every name in use, as diffusers adds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from support import loras, zimage
from support.loras import Tensors, Weights
from support.scale import thinned
from torch import nn

import safelight
from safelight.catalog.identify import identify
from safelight.errors import RequestError, SafelightError
from safelight.request.adapters import Lora

SEED, RANK, STRENGTH = 5, 4, 0.7
WIDTH = 64
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def layers() -> dict[str, tuple[int, int]]:
    """The matrices that the LoRA of the tests changes, by name in the module."""
    found = {f"layers.{n}.attention.{part}": (WIDTH, WIDTH) for n in (0, 1) for part in ATTENTION}
    return found | {"layers.0.feed_forward.w1": (170, WIDTH), "layers.1.feed_forward.w2": (WIDTH, 170)}


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (
            torch.randn(RANK, columns, generator=generator) * 0.2,
            torch.randn(rows, RANK, generator=generator) * 0.2,
        )
        for name, (rows, columns) in layers().items()
    }


def peft(prefix: str) -> Callable[[str, str], str]:
    return lambda name, slot: f"{prefix}{name}.lora_{'A' if slot == 'down' else 'B'}.weight"


def kohya(name: str, slot: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}.lora_{slot}.weight"


NAMINGS: dict[str, Callable[[str, str], str]] = {
    "diffusers": peft("transformer."),
    "ai-toolkit": peft("diffusion_model."),
    "PEFT": peft("base_model.model."),
    "bare": peft(""),
    "kohya": kohya,
    "OneTrainer": lambda name, slot: f"lora_transformer_{name.replace('.', '_')}.lora_{slot}.weight",
}


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return zimage.modules(SEED)


@pytest.fixture(scope="module")
def weights(modules: dict[str, nn.Module]) -> Weights:
    return {role: dict(module.state_dict()) for role, module in modules.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zimage.write_folder(tmp_path_factory.mktemp("zimage") / "tiny", SEED)


def pixels(model: Path, *loras: Path, root: Path) -> bytes:
    request = safelight.Request(
        "a red apple", str(model), seed=3, steps=2, width=64, height=48,
        loras=tuple(Lora(str(path), STRENGTH) for path in loras),
    )  # fmt: skip
    return next(safelight.open_engine(root).generate(request)).pixels


@pytest.fixture(scope="module")
def right(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The pixels of a checkpoint into which the test itself has added the differences, with one rounding."""
    place = tmp_path_factory.mktemp("fused")
    path = zimage.write_folder(place / "tiny", SEED)
    with zimage.changed_weights(path / "transformer") as weights:
        for name, (down, up) in pairs().items():
            weights[f"{name}.weight"].addmm_(up, down, alpha=STRENGTH)
    return pixels(path, root=place / "root")


@pytest.mark.parametrize("naming", thinned(NAMINGS, 3))
def test_each_naming(naming: str, folder: Path, tmp_path: Path, right: bytes) -> None:
    name_of = NAMINGS[naming]
    save_file(named(name_of), tmp_path / "lora.safetensors")
    assert pixels(folder, tmp_path / "lora.safetensors", root=tmp_path / "root") == right


def fused(kind: str) -> dict[str, torch.Tensor]:
    """An adapter for the fused projection of a block, with the names of the original."""
    generator = torch.Generator().manual_seed(4)
    name = "diffusion_model.layers.0.attention.qkv"

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    down, up = drawn(RANK, WIDTH), drawn(3 * WIDTH, RANK)
    match kind:
        case "lora":
            return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        case "dora":
            magnitude = torch.rand(3 * WIDTH, 1, generator=generator) + 0.5
            return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": magnitude}
        case _:
            return {f"{name}.lokr_w1": drawn(3, 2), f"{name}.lokr_w2": drawn(WIDTH, WIDTH // 2)}


@pytest.mark.parametrize("kind", thinned(["lora", "dora", "lokr"]))
def test_fused_projections(kind: str, folder: Path, tmp_path: Path) -> None:
    tensors = fused(kind)
    save_file(tensors, tmp_path / "lora.safetensors")
    path = zimage.write_folder(tmp_path / "fused", SEED)
    with zimage.changed_weights(path / "transformer") as weights:
        names = [f"layers.0.attention.{part}.weight" for part in ("to_q", "to_k", "to_v")]
        whole = torch.cat([weights[name] for name in names])
        values = {name.partition("qkv.")[2]: tensor for name, tensor in tensors.items()}
        if kind == "lokr":
            added = torch.kron(values["lokr_w1"], values["lokr_w2"])
        elif kind == "lora":
            added = values["lora_B.weight"] @ values["lora_A.weight"]
        else:
            changed = whole + values["lora_up.weight"] @ values["lora_down.weight"]
            norm = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
            added = changed * (values["dora_scale"] / norm) - whole
        for name, part in zip(names, (whole + STRENGTH * added).chunk(3), strict=True):
            weights[name].copy_(part)
    ours = torch.frombuffer(
        bytearray(pixels(folder, tmp_path / "lora.safetensors", root=tmp_path / "root")), dtype=torch.uint8
    )
    theirs = torch.frombuffer(bytearray(pixels(path, root=tmp_path / "root")), dtype=torch.uint8)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    plain = torch.frombuffer(bytearray(pixels(folder, root=tmp_path / "root")), dtype=torch.uint8)
    assert (ours.int() - plain.int()).abs().max() > 1


def test_diffusers_adds_the_same(folder: Path, tmp_path: Path) -> None:
    """The fused weights of diffusers' ``load_lora_weights`` are ours within one rounding: the pixels differ by 1."""
    save_file(named(peft("diffusion_model.")), tmp_path / "lora.safetensors")
    pipe = zimage.pipeline(SEED)
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="one")
    pipe.set_adapters(["one"], [STRENGTH])
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(3)
    image = pipe("a red apple", width=64, height=48, num_inference_steps=2, guidance_scale=0.0, generator=generator)
    theirs = torch.frombuffer(bytearray(image.images[0].tobytes()), dtype=torch.uint8)
    made = pixels(folder, tmp_path / "lora.safetensors", root=tmp_path / "root")
    ours = torch.frombuffer(bytearray(made), dtype=torch.uint8)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def alphas(tensors: Tensors) -> Tensors:
    """The tensors, with an alpha for each module that has factors."""
    modules = {name.partition(".lora")[0].partition(".lokr_")[0] for name in tensors}
    return tensors | {f"{module}.alpha": torch.tensor(2.0) for module in modules}


def named(name_of: Callable[[str, str], str]) -> Tensors:
    return {
        name_of(name, slot): tensor
        for name, pair in pairs().items()
        for slot, tensor in zip(("down", "up"), pair, strict=True)
    }


def lokr() -> Tensors:
    """LoKr as ai-toolkit writes it, with a factor of low rank."""
    generator = torch.Generator().manual_seed(6)
    shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (32, RANK), "lokr_w2_b": (RANK, 32)}
    name = "diffusion_model.layers.1.attention.to_k"
    return {f"{name}.{slot}": torch.randn(shape, generator=generator) for slot, shape in shapes.items()}


MERGED: dict[str, Callable[[], Tensors]] = {
    "diffusers": lambda: named(peft("transformer.")),
    "ai-toolkit": lambda: alphas(named(peft("diffusion_model."))),
    "PEFT with an adapter's name": lambda: named(
        lambda name, slot: f"{name}.lora_{'A' if slot == 'down' else 'B'}.default.weight"
    ),
    "kohya": lambda: alphas(named(kohya)),
    "dots": lambda: named(lambda name, slot: f"lora_unet_{name.replace('.', '_')}.lora.{slot}.weight"),
    "kohya, fused": lambda: alphas(
        {
            f"lora_unet_layers_0_attention_qkv.lora.{slot}.weight": tensor
            for slot, tensor in zip(("down", "up"), fused("lora").values(), strict=True)
        }
    ),
    "LoKr": lambda: alphas(lokr()),
}


@pytest.mark.parametrize("naming", MERGED)
def test_diffusers_merges_the_same(naming: str, modules: dict[str, nn.Module], weights: Weights) -> None:
    tensors = MERGED[naming]()
    parts: dict[str, Any] = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipe = diffusers.ZImagePipeline(**parts, transformer=copy.deepcopy(modules["transformer"]))  # type: ignore[arg-type]
    ours = loras.merged("z-image", zimage.configs(), weights, tensors, STRENGTH)
    loras.assert_same(ours, loras.merged_by_diffusers(pipe, tensors, STRENGTH))


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_model_", "text_encoders.qwen3_4b.transformer.model."])
def test_the_text_encoder(prefix: str, weights: Weights) -> None:
    """diffusers has no LoRAs for it, so the test merges them."""
    module = "layers.0.mlp.down_proj"
    down, up = torch.rand(RANK, 64), torch.rand(32, RANK)
    name = prefix + (module if "." in prefix else module.replace(".", "_"))
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    ours = loras.merged("z-image", zimage.configs(), weights, tensors, STRENGTH)
    whole = weights["text_encoder"][f"{module}.weight"] + STRENGTH * up @ down
    loras.assert_same(ours, {"text_encoder": {f"{module}.weight": whole}})


def test_the_family_is_recognised(tmp_path: Path) -> None:
    for name_of in NAMINGS.values():
        save_file(named(name_of), tmp_path / "x.safetensors")
        found = identify(tmp_path / "x.safetensors")
        assert (found.kind, found.base) == ("lora", "z-image")


def test_a_module_and_the_fused_one_around_it_cannot_both_be_changed(folder: Path, tmp_path: Path) -> None:
    down, up = pairs()["layers.0.attention.to_q"]
    own = {"diffusion_model.layers.0.attention.to_q.lora_A.weight": down}
    own |= {"diffusion_model.layers.0.attention.to_q.lora_B.weight": up}
    save_file({**fused("lora"), **own}, tmp_path / "lora.safetensors")
    with pytest.raises((RequestError, SafelightError), match="attention"):
        pixels(folder, tmp_path / "lora.safetensors", root=tmp_path / "root")
