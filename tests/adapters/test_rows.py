"""Rows of the corpus that came later: adapters, schedules and memory over many jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import adapters, memory

import safelight
from safelight.assembly.engine import open_engine
from safelight.devices.simulated import simulated
from safelight.errors import InputError
from safelight.memory.residency import Residency
from safelight.request.adapters import Lora
from safelight.request.schema import Request
from safelight.settings_sources import load_settings
from safelight.workers.local_engine import LocalEngine

Ask = Callable[..., Request]
VAE = "first_stage_model."


@pytest.fixture
def style(tmp_path: Path) -> Lora:
    return Lora(str(adapters.write(tmp_path / "style.safetensors")), 0.8)


def pixels(engine: LocalEngine, request: Request) -> str:
    return next(engine.generate(request)).pixels_sha256


def test_state_31_what_is_in_memory_is_as_it_was_read_while_adapters_are_on(root: Path, ask: Ask, style: Lora) -> None:
    engine = safelight.open_engine(root)
    plain = pixels(engine, ask())
    held = {h.component: h.nbytes for tier in engine.tiers for h in tier.usage_by_component()}
    for _ in range(3):
        assert pixels(engine, ask(loras=(style,))) != plain
        assert [tier.check() for tier in engine.tiers] == [[]] * len(engine.tiers)
    now = {h.component: h.nbytes for tier in engine.tiers for h in tier.usage_by_component()}
    assert held.items() <= now.items()
    assert pixels(engine, ask()) == plain


def test_state_32_another_jobs_dtype_and_memory_are_its_own(root: Path, ask: Ask, style: Lora) -> None:
    engine = safelight.open_engine(root)
    fresh = next(safelight.open_engine(root).generate(ask("b.safetensors")))
    pixels(engine, ask(loras=(style,), precision="bf16"))
    later = next(engine.generate(ask("b.safetensors")))
    assert later.metadata["run"] == fresh.metadata["run"]
    assert later.metadata["run"]["dtype"] == "fp32"
    assert later.pixels_sha256 == fresh.pixels_sha256
    engine.loaded.unload(None)
    assert [tier.resident_bytes for tier in engine.tiers] == [0] * len(engine.tiers)


def test_state_33_an_adapter_of_another_shape_is_refused_each_time_and_never_applied_in_part(
    root: Path, ask: Ask, style: Lora, tmp_path: Path
) -> None:
    engine = safelight.open_engine(root)
    plain = pixels(engine, ask())
    tensors = load_file(style.name)
    up = next(name for name in tensors if name.startswith("lora_unet") and name.endswith("lora_up.weight"))
    tensors[up] = torch.cat([tensors[up], tensors[up]])
    save_file(tensors, tmp_path / "wider.safetensors")
    for _ in range(2):
        with pytest.raises(InputError, match="wider"):
            pixels(engine, ask(loras=(Lora(str(tmp_path / "wider.safetensors")),)))
        assert pixels(engine, ask()) == plain


def test_state_34_a_schedule_is_its_jobs_own(root: Path, ask: Ask) -> None:
    engine = safelight.open_engine(root)
    asked = [ask(steps=4, schedule=schedule) for schedule in ("default", "karras", "exponential", "sgm_uniform")]
    right = [pixels(safelight.open_engine(root), request) for request in asked]
    assert len(set(right)) == len(right)
    for at in (1, 0, 2, 0, 3, 0, 1):
        assert pixels(engine, asked[at]) == right[at]


def test_state_35_another_adapter_over_another_vae(
    root: Path, ask: Ask, style: Lora, tiny: Path, tmp_path: Path
) -> None:
    other = Lora(str(adapters.write(tmp_path / "other.safetensors", seed=2)), 0.5)
    tensors = {n.removeprefix(VAE): t for n, t in load_file(tiny / "b.safetensors").items() if n.startswith(VAE)}
    save_file(tensors, tmp_path / "vae.safetensors")
    asked = [ask(loras=(one,), vae=str(tmp_path / "vae.safetensors")) for one in (style, other)]
    right = [pixels(safelight.open_engine(root), request) for request in asked]
    assert right[0] != right[1]
    engine = safelight.open_engine(root)
    assert [pixels(engine, asked[at]) for at in (0, 1, 0, 1)] == [*right, *right]


def test_state_36_the_tenth_run_is_the_first(root: Path, ask: Ask, style: Lora) -> None:
    engine = safelight.open_engine(root)
    assert len({pixels(engine, ask(loras=(style,))) for _ in range(10)}) == 1


def test_speed_01_after_a_switch_each_model_is_read_once(root: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, read = safelight.open_engine(root), list[int]()
    bring = Residency.read

    def counted(self: Residency, lease: object) -> None:
        read.extend(coming.buffer.slab.nbytes for coming in lease.pending)  # type: ignore[attr-defined]
        bring(self, lease)  # type: ignore[arg-type]

    monkeypatch.setattr(Residency, "read", counted)
    for name in ("a.safetensors", "b.safetensors"):
        pixels(engine, ask(name))
    assert read
    read.clear()
    for number in range(3):
        pixels(engine, replace(ask("b.safetensors"), prompt=f"another prompt {number}"))
    pixels(engine, ask("a.safetensors"))
    assert not read


def test_speed_02_buffers_of_copies_are_in_the_ledger(root: Path, ask: Ask) -> None:
    with simulated() as device:
        engine = open_engine(load_settings(root), device)
        ledger = engine.resources.residency.ledger
        (buffers,) = [entry for entry in ledger.entries() if entry.owner == "transfers"]
        assert buffers.nbytes > 0
        for _ in range(2):
            pixels(engine, ask())
        assert [entry for entry in ledger.entries() if entry.owner == "transfers"] == [buffers]
        assert memory.bytes_of_weights(ledger, device.name) == device.allocated()
        engine.close()
