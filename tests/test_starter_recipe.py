"""The recipe that trains the starters: what it packs is what it trained, and its stages run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe import adapters, data, export
from recipe.flux import export as flux_export
from recipe.flux import model, pictures, train
from safetensors.torch import load_file, save_file
from support import flux

from safelight.catalog import records, starters
from safelight.families.parts.flux_latents import SCALING_FACTOR, SHIFT_FACTOR


def test_original_names_are_those_of_published_files() -> None:
    modules, configs = flux.modules(), flux.configs()
    expected = {
        "transformer": flux.original_names(modules["transformer"]),
        "vae": flux.ldm_vae(modules["vae"]),
        "text_encoder_2": modules["text_encoder_2"].state_dict(),
    }
    for role, tensors in expected.items():
        tensors.pop("encoder.embed_tokens.weight", None)
        packed = export.original(configs[role], modules[role].state_dict(), flux_export.SPELLINGS[role])
        assert packed.keys() == tensors.keys()
        assert all(torch.equal(packed[name], tensors[name]) for name in tensors), role


def test_the_starters_that_were_packed_before_are_packed_alike(tmp_path: Path) -> None:
    """The tensors of a shipped starter, read by the library and packed again, are those of its file."""
    starter = next(found for found in starters.models() if found.name == adapters.BASE)
    states = {part.role: adapters.weights(part) for part in starter.manifest.components}
    probe = tmp_path / "probe.safetensors"
    save_file(
        {f"{role}.{name}": one.contiguous() for role, some in states.items() for name, one in some.items()}, probe
    )
    packed, shipped = export.ldm(states, probe), load_file(starter.path)
    assert packed.keys() == shipped.keys()
    assert all(torch.equal(packed[name].half(), shipped[name]) for name in shipped)


def test_rescaled_latents_have_unit_spread_and_reconstruct_the_same() -> None:
    torch.manual_seed(0)
    vae: Any = flux.modules()["vae"]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        mean, spread = before.mean.mean((0, 2, 3)), before.mean.std()
        inside = vae.decoder.conv_in(before.mean)[..., 1:-1, 1:-1]
        model.rescale(vae, mean, spread)
        after = vae.encode(images).latent_dist
        latents = (after.mean - SHIFT_FACTOR) * SCALING_FACTOR
        torch.testing.assert_close(model.vae_input(latents), after.mean)
        torch.testing.assert_close(latents, (before.mean - mean.view(-1, 1, 1)) / spread, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.std, before.std / spread / SCALING_FACTOR)
        torch.testing.assert_close(vae.decoder.conv_in(after.mean)[..., 1:-1, 1:-1], inside, atol=1e-4, rtol=1e-4)


@pytest.mark.full
def test_every_stage_runs_and_the_packed_file_has_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for _, name in data.subjects()][:2]
    pixels = torch.randint(0, 256, (3, 2, 3, 128, 128), dtype=torch.uint8)
    monkeypatch.setattr(pictures, "load", lambda _: data.Images(pixels, names))
    steps = [f"--{stage}-steps={count}" for stage, count in (("vae", 1), ("joint", 1), ("decoder", 1), ("guidance", 2))]
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path), *steps])
    train.main()
    states = torch.load(tmp_path / "final.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for state in states.values() for tensor in state.values())
    monkeypatch.setattr(flux_export, "PACKAGE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", "--from", str(tmp_path)])
    flux_export.main()
    packed = records.read(tmp_path / "starter-flux.json", tmp_path)
    assert (packed.base, packed.variant, packed.resolution) == ("flux", "dev", 128)
    stored = adapters.weights(packed.manifest.component("transformer"))
    assert all(torch.equal(tensor, states["transformer"][name].half().float()) for name, tensor in stored.items())
