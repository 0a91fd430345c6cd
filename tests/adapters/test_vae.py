"""Another VAE: of a file of its own or of another model, and the checkpoint's own again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import safelight
from safelight.errors import IntegrityError, RequestError
from safelight.request.schema import Request

Ask = Callable[..., Request]
PREFIX = "first_stage_model."


@pytest.fixture
def vae(tiny: Path, tmp_path: Path) -> Path:
    """The VAE of the checkpoint b, without the prefix that checkpoints have."""
    tensors = load_file(tiny / "b.safetensors")
    alone = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    save_file(alone, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_state_16_the_checkpoints_own_comes_back(root: Path, ask: Ask, tiny: Path, vae: Path) -> None:
    engine = safelight.open_engine(root)
    engine.catalog.adapters.add(vae, "mine")
    own = next(engine.generate(ask())).pixels_sha256
    other = next(engine.generate(ask(vae="mine")))
    assert other.pixels_sha256 != own
    assert next(engine.generate(ask())).pixels_sha256 == own
    for way in (str(vae), str(tiny / "b.safetensors")):
        assert next(engine.generate(ask(vae=way))).pixels_sha256 == other.pixels_sha256
    assert next(engine.generate(ask())).pixels_sha256 == own
    b = engine.library.find(str(tiny / "b.safetensors"))
    assert other.metadata["model"]["components"]["vae"] == b.manifest.component("vae").digest
    assert other.metadata["request"]["vae_digest"] == b.manifest.component("vae").digest


def test_what_is_no_vae_for_it_is_refused(root: Path, ask: Ask, tiny: Path, vae: Path) -> None:
    engine = safelight.open_engine(root)
    engine.catalog.adapters.add(vae, "mine")
    with pytest.raises(RequestError, match="is the VAE of a sdxl model; a is sd1"):
        next(engine.generate(ask(vae=str(tiny / "xl.safetensors"))))
    with pytest.raises(safelight.InputError, match="no VAE named 'nobody'"):
        next(engine.generate(ask(vae="nobody")))
    with pytest.raises(RequestError, match="is a vae: ask for it as vae"):
        next(engine.generate(ask(prompt="x <lora:mine>")))
    tensors = load_file(vae)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, vae.parent / "short.safetensors")
    with pytest.raises(safelight.InputError, match=r"decoder\.conv_in"):
        next(engine.generate(ask(vae=str(vae.parent / "short.safetensors"))))
    with pytest.raises(IntegrityError, match="other content than 0000000000"):
        next(engine.generate(ask(vae="mine", vae_digest="0" * 64)))
