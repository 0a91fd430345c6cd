"""Repair tries each possible cause once, in order; the metadata says what was wrong and what helped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from torch import nn

import safelight
from safelight.assembly.engine import open_engine
from safelight.boundary import kernels
from safelight.devices.simulated import simulated
from safelight.errors import ModuleModifiedError, NotFiniteError
from safelight.pipeline import model_stages, run, stages
from safelight.pipeline.denoise import Denoised, DenoiseInputs
from safelight.pipeline.repair import COUNTS_FILE
from safelight.resolve.contents import Contents
from safelight.settings_sources import load_settings
from safelight.workers.local_engine import LocalEngine

pytestmark = pytest.mark.usefixtures("as_for_users")


@pytest.fixture
def engine(root: Path) -> LocalEngine:
    """An engine that compares no checksums on its own, so that spoiled bytes reach the gates."""
    return safelight.open_engine(root, verify_transfers="off")


def spoil(engine: LocalEngine, role: str, forge: bool = False) -> None:
    """Write NaN into the resident bytes of a role. ``forge``: replace its proof by that of the spoiled bytes."""
    residency = engine.resources.residency
    for piece, held in residency.table.residents.items():
        if piece.component_key.startswith(role):
            for tensor in held.buffer.tensors.values():
                tensor.fill_(float("nan"))
            if forge:
                held.checksums = residency.source.compute_checksums(held.buffer)


@pytest.mark.parametrize("role", ["text_encoder", "unet", "vae"])
def test_copy_10_bytes_that_were_spoiled_in_memory_are_read_again(engine: LocalEngine, ask, role: str) -> None:
    right = next(engine.generate(ask())).pixels_sha256
    spoil(engine, role)
    # The cached output of the text encoder would hide the spoiled weights.
    engine.resources.embedding_cache.clear()
    image = next(engine.generate(ask()))
    assert image.pixels_sha256 == right
    (repair,) = image.metadata["repairs"]
    assert (repair["suspect"], repair["helped"]) == ("memory", "read again")
    assert "bytes in memory had changed" in repair["wrong"]
    assert any("repaired" in warning for warning in image.warnings)


def test_copy_11_what_was_read_wrongly_is_read_anew(engine: LocalEngine, ask) -> None:
    """The proof agrees with the wrong bytes, so only reading the file again helps."""
    right = next(engine.generate(ask())).pixels_sha256
    spoil(engine, "unet", forge=True)
    image = next(engine.generate(ask()))
    assert image.pixels_sha256 == right
    (repair,) = image.metadata["repairs"]
    assert (repair["suspect"], repair["helped"]) == ("loading", "read again from its file")
    assert "NaN" in repair["wrong"]


def test_copy_01_a_device_whose_asynchronous_copies_fail_makes_the_image_without_them(root: Path, ask) -> None:
    """The device passed its self-test. No checksum is compared after a copy, so only synchronous copies help."""
    with simulated() as device:
        engine = open_engine(load_settings(root, verify_transfers="off"), device)
        right = next(engine.generate(ask())).pixels_sha256
        engine.loaded.unload(None)
        device.faults.early_frees = 1 << 30
        image = next(engine.generate(ask()))
        assert image.pixels_sha256 == right
        (repair,) = image.metadata["repairs"]
        assert (repair["suspect"], repair["helped"]) == ("memory", "copied without asynchronous copies")
        assert device.asynchronous
        engine.close()


def broken(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *arguments, **more: original(*arguments, **more) * float("nan")


def test_attention_05_a_kernel_that_breaks_gives_way_to_the_reference(
    engine: LocalEngine, ask, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    kernel = kernels.AttnProcessor2_0
    monkeypatch.setattr(kernel, "__call__", broken(kernel.__call__))
    for _ in range(2):
        image = next(engine.generate(ask()))
        (repair,) = image.metadata["repairs"]
        assert (repair["suspect"], repair["helped"]) == ("attention", "computed with attention_type: normal")
        assert image.metadata["run"]["attention"] == "normal"
    reference = safelight.open_engine(root, attention_type="normal")
    assert image.pixels_sha256 == next(reference.generate(ask())).pixels_sha256
    assert json.loads((root / COUNTS_FILE).read_text())["computed with attention_type: normal"]["times"] == 2


def test_what_nothing_helps_fails_once_and_the_next_is_right(
    engine: LocalEngine, ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = next(engine.generate(ask())).pixels_sha256
    made = 0
    convolve = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += self.in_channels == 4 and self.out_channels > 4
        return convolve(self, x) * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", forward)
        with pytest.raises(NotFiniteError, match="at step 1"):
            next(engine.generate(ask()))
    # Three attempts (first, weights read again, reference attention). Each stopped at its first step.
    assert made == 3
    assert next(engine.generate(ask())).pixels_sha256 == right


def test_attention_06_a_half_precision_vae_that_overflows_decodes_again_in_fp32(
    engine: LocalEngine, tmp_path: Path
) -> None:
    tensors = load_file(checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1))
    for name in tensors:
        if name.startswith("first_stage_model.decoder.conv_in"):
            tensors[name] *= 1e5
    save_file(tensors, tmp_path / "m.safetensors")
    model = engine.library.add(tmp_path / "m.safetensors")
    request = safelight.Request("x", "m", steps=1, width=64, height=64)
    resources = engine.resources_for(model)
    right = run.make_image(Contents.plain(request, model), model, resources, 0, lambda _: None)
    half = replace(resources, run_settings=replace(resources.run_settings, vae_dtype="fp16"))
    image = run.make_image(Contents.plain(request, model), model, half, 0, lambda _: None)
    assert image.pixels_sha256 == right.pixels_sha256
    assert image.metadata["run"]["vae_dtype"] == "fp32"
    (repair,) = image.metadata["repairs"]
    assert (repair["suspect"], repair["helped"]) == ("numbers", "the VAE computed in fp32")


def test_state_23_what_is_left_on_a_model_while_it_computes_is_not_returned(
    engine: LocalEngine, ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = next(engine.generate(ask())).pixels_sha256
    denoise, left = model_stages.denoise, [True]

    def hooked(work: DenoiseInputs) -> Denoised:
        if left.pop() if left else False:
            work.denoiser.register_forward_hook(lambda _, __, out: out)
        return denoise(work)

    monkeypatch.setattr(model_stages, "denoise", hooked)
    image = next(engine.generate(ask()))
    assert image.pixels_sha256 == right
    (repair,) = image.metadata["repairs"]
    assert (repair["suspect"], repair["helped"]) == ("state", "computed with a newly built model")
    left += [True] * stages.ATTEMPTS
    with pytest.raises(ModuleModifiedError, match="_forward_hooks"):
        next(engine.generate(ask()))


def test_state_23_what_is_left_on_a_model_between_two_images_changes_none(engine: LocalEngine, ask) -> None:
    right = next(engine.generate(ask())).pixels_sha256
    for skeleton in engine.resources.skeletons._free.values():
        skeleton.module.register_forward_hook(lambda _, __, out: None)
    image = next(engine.generate(ask()))
    assert image.pixels_sha256 == right
    # The changed skeleton was never used, so nothing needed a repair.
    assert image.metadata["repairs"] == []


def test_load_07_a_file_that_is_spoiled_is_not_used_again(engine: LocalEngine, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    sound = (tiny / "a.safetensors").read_bytes()
    path.write_bytes(sound)
    engine.library.add(path)
    request = safelight.Request("x", "m", steps=1, width=64, height=64)
    right = next(engine.generate(request)).pixels_sha256
    engine.loaded.unload(None)
    spoiled = bytearray(sound)
    spoiled[-5000] ^= 1
    path.write_bytes(spoiled)
    with pytest.raises(safelight.IntegrityError, match="its content changed"):
        next(engine.generate(request))
    model = engine.library.get("m")
    assert "its content changed" in (engine.library.quarantine_reason(model) or "")
    with pytest.raises(safelight.IntegrityError, match="is in quarantine"):
        next(engine.generate(request))
    with pytest.raises(safelight.IntegrityError, match="its content changed"):
        engine.library.verify("m")
    path.write_bytes(sound)
    assert next(engine.generate(request)).pixels_sha256 == right
    assert engine.library.verify("m").digest == model.digest
    assert not list((engine.library.root / "quarantine").iterdir())


def test_a_conversion_that_is_spoiled_is_made_again(engine: LocalEngine, tiny: Path) -> None:
    model = engine.library.add(tiny / "old.ckpt", "old")
    request = safelight.Request("x", "old", steps=1, width=64, height=64)
    right = next(engine.generate(request)).pixels_sha256
    engine.loaded.unload(None)
    conversion = model.manifest.files[0].path
    data = bytearray(conversion.read_bytes())
    data[-5000] ^= 4
    conversion.write_bytes(data)
    assert next(engine.generate(request)).pixels_sha256 == right
    assert engine.library.verify("old").digest == model.digest
    assert engine.library.quarantine_reason(model) is None


def test_a_repair_is_told_by_the_ledger_too(engine: LocalEngine, ask) -> None:
    """No memory of the failed attempts stays in the ledger."""
    next(engine.generate(ask()))
    ledger = engine.resources.residency.ledger
    before = ledger.stored("host"), ledger.reserved("host")
    spoil(engine, "unet")
    next(engine.generate(ask()))
    assert (ledger.stored("host"), ledger.reserved("host")) == before
