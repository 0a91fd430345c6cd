"""LoRAs as different programs write them: the same weights, whatever the names of tensors and the dtype of alpha."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import adapters
from support.scale import thinned

from safelight.request.adapters import Lora
from safelight.request.schema import Request
from safelight.workers.local_engine import LocalEngine

Ask = Callable[..., Request]


def sha(engine: LocalEngine, request: Request) -> str:
    return next(engine.generate(request)).pixels_sha256


@pytest.mark.parametrize("form", thinned(["pt", "safetensors"]))
def test_alpha_is_a_number_whatever_its_dtype(form: str, engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    tensors = adapters.lora("sd1", 1, adapters.kohya)

    def drawn(dtype: torch.dtype) -> str:
        path = tmp_path / f"{dtype}.{form}".replace("torch.", "")
        changed = {name: t.to(dtype) if name.endswith(".alpha") else t for name, t in tensors.items()}
        save_file(changed, path) if form == "safetensors" else torch.save(changed, path)
        return sha(engine, ask(loras=(Lora(str(path), 0.8),)))

    right = drawn(torch.float32)
    assert right != sha(engine, ask())
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8):
        assert drawn(dtype) == right, dtype


def test_double_precision_pairs_are_read(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    tensors = adapters.lora("sd1", 1, adapters.kohya)
    save_file(tensors, tmp_path / "single.safetensors")
    save_file({name: t.double() for name, t in tensors.items()}, tmp_path / "double.safetensors")
    one, other = (
        sha(engine, ask(loras=(Lora(str(tmp_path / f"{n}.safetensors"), 1.0),))) for n in ("single", "double")
    )
    assert one == other


def test_names_of_comfyui(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    """What its 'Extract and Save Lora' writes: LDM's names of the UNet, HF's of the text encoder, no alpha."""
    block, path = "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "encoder.layers.0.self_attn.q_proj"
    chance = torch.Generator().manual_seed(0)
    pairs = {slot: torch.randn(shape, generator=chance) for slot, shape in (("down", (4, 32)), ("up", (32, 4)))}
    text = {slot: torch.randn(shape, generator=chance) for slot, shape in (("down", (4, 64)), ("up", (64, 4)))}

    def drawn(unet: str, encoder: str) -> str:
        made = {
            f"{name}.lora_{slot}.weight": t for name, p in ((unet, pairs), (encoder, text)) for slot, t in p.items()
        }
        save_file(made, tmp_path / "x.safetensors")
        return sha(engine, ask(loras=(Lora(str(tmp_path / "x.safetensors"), 0.5),)))

    kohya = f"lora_unet_{block.replace('.', '_')}", f"lora_te_text_model_{path.replace('.', '_')}"
    right = drawn(*kohya)
    assert right != sha(engine, ask())
    assert drawn(f"diffusion_model.{block}", f"text_encoders.clip_l.transformer.text_model.{path}") == right
    diffusers = "unet.base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert drawn(diffusers, kohya[1]) == right


def test_the_users_word_goes_above_what_a_file_says(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    wrong = {"ss_base_model_version": "sdxl_base_v1-0"}
    whole = adapters.lora("sd1", 1, adapters.kohya)
    library = engine.catalog.adapters
    # Its text encoder and its first convolutions are SD 1's, whatever the metadata says.
    save_file(whole, tmp_path / "whole.safetensors", wrong)
    assert library.add(tmp_path / "whole.safetensors").base == "sd1"
    unclear = {name: tensor for name, tensor in whole.items() if "attn1" in name}
    save_file(unclear, tmp_path / "style.safetensors", wrong)
    assert library.add(tmp_path / "style.safetensors").base == "sdxl"
    added = library.add(tmp_path / "style.safetensors", base="sd1")
    assert (added.base, added.base_from_user) == ("sd1", True)
    assert "the user set" in added.rule
    assert library.verify(library.get("style")).base == "sd1"
    assert sha(engine, ask(loras=(Lora("style"),))) != sha(engine, ask())
