"""Adapters as diffusers and PEFT put them on: the fused weights are ours within the rounding of one fp32 sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import adapters, checkpoints, oracle
from support.scale import thinned

import safelight
from safelight.request.adapters import Lora

NAMINGS = {"kohya": adapters.kohya, "peft": adapters.peft}


def leased(engine: Any, request: Any) -> dict[str, torch.Tensor]:
    """Every weight of the model under the request's adapters, by role and name."""
    from safelight.resolve.contents import find_contents

    plain = engine.library.find(request.model)
    model = engine._combine(find_contents(engine.resolve(request), engine.catalog, plain))
    out: dict[str, torch.Tensor] = {}
    for component in model.manifest.components:
        with engine.resources.residency.lease(component, torch.float32) as lease:
            for name in lease.shapes:
                with lease.use_tensors([name]) as found:
                    out[f"{component.role}.{name}"] = found.pop().clone()
    return out


def fused(pipe: Any, role: str) -> dict[str, torch.Tensor]:
    state = getattr(pipe, role).state_dict()
    return {f"{role}.{name.replace('.base_layer', '')}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("naming", thinned(NAMINGS))
@pytest.mark.parametrize("base", thinned(["sdxl", "sd1", "sd2"]))
def test_two_loras_equal_those_that_diffusers_fuses(root: Path, tmp_path: Path, base: str, naming: str) -> None:
    name = NAMINGS[naming] if (base, naming) != ("sdxl", "kohya") else adapters.kohya_two
    path = checkpoints.write_single(tmp_path / "m.safetensors", base, 3)
    alpha = None if naming == "peft" else 2.0
    files = [adapters.write(tmp_path / f"{n}.safetensors", base, n, name, alpha=alpha) for n in (1, 2)]
    strengths = [0.8, -0.5]
    pipe = oracle.pipeline(base, 3)
    for number, file in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=str(number))
    pipe.set_adapters(["0", "1"], strengths)
    request = safelight.Request(
        "red apple", "m", negative="blur", seed=5, steps=2, width=64, height=64,
        loras=tuple(Lora(str(file), strength) for file, strength in zip(files, strengths, strict=True)),
    )  # fmt: skip
    engine = safelight.open_engine(root)
    engine.library.add(path, prediction_type="epsilon")
    image = next(engine.generate(request))
    theirs = oracle.pixels(pipe, "red apple", "blur", 2, 5, 7.0, width=64, height=64)
    apart = np.abs(np.frombuffer(image.pixels, np.uint8).astype(int) - np.frombuffer(theirs, np.uint8))
    assert apart.max() <= 2
    pipe.fuse_lora(components=[role for role in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, role)])
    ours, changed = leased(engine, request), 0
    plain = leased(engine, safelight.Request("x", "m"))
    for role in ("unet", "text_encoder", "text_encoder_2"):
        if not hasattr(pipe, role):
            continue
        for key, tensor in fused(pipe, role).items():
            if key in ours:
                assert torch.allclose(ours[key], tensor, rtol=0, atol=4e-6), key
                changed += not torch.equal(ours[key], plain[key])
    assert changed == len(list(adapters.modules(base)))


def test_dora_equals_that_of_peft(root: Path, tmp_path: Path) -> None:
    """The UNet's linear layers, as diffusers loads no magnitudes for text encoders."""
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 3)
    generator = torch.Generator().manual_seed(9)
    tensors: dict[str, torch.Tensor] = {}
    for role, module, shape in adapters.modules("sd1"):
        if role == "unet" and len(shape) == 2:
            for slot, size in (("down", (4, shape[1])), ("up", (shape[0], 4))):
                tensors[adapters.peft(role, module, slot)] = torch.randn(size, generator=generator) * 0.2
            tensors[f"unet.{module}.lora_magnitude_vector"] = torch.rand(shape[0], generator=generator) + 0.5
    save_file(tensors, tmp_path / "dora.safetensors")
    pipe = oracle.pipeline("sd1", 3)
    pipe.load_lora_weights(str(tmp_path / "dora.safetensors"))
    pipe.fuse_lora(components=["unet"])
    request = safelight.Request("x", str(path), loras=(Lora(str(tmp_path / "dora.safetensors")),))
    ours = leased(safelight.open_engine(root), request)
    compared = [(ours[key], tensor) for key, tensor in fused(pipe, "unet").items() if key in ours]
    assert len(compared) > 100
    for mine, theirs in compared:
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=4e-6)
