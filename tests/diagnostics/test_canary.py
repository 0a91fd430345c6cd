"""A tiny image whose result is known: compared after a switch, by the doctor, and after an upgrade."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from support import checkpoints
from support.families import tiny_families
from support.scale import thinned
from typer.testing import CliRunner

import safelight
from safelight.boundary import pictures
from safelight.cli.main import app
from safelight.diagnostics import canary, soak
from safelight.diagnostics.canary import Canaries, after_switch, request
from safelight.diagnostics.doctor import Doctor
from safelight.diagnostics.image_difference import difference
from safelight.errors import CanaryError
from safelight.families.family import Family
from safelight.families.registry import families
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.workers.local_engine import LocalEngine


@pytest.fixture
def engine(root: Path) -> LocalEngine:
    return safelight.open_engine(root, verify_transfers="off")


@pytest.fixture
def canaries(engine: LocalEngine, root: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Canaries:
    """Of two models, made by engines that have held no other; small, as no kernel is at fault here."""
    monkeypatch.setattr(canary, "TOKENS_PER_SIDE", 8)
    for name in ("a", "b"):
        engine.library.add(tiny / f"{name}.safetensors", name)

    def fresh(asked: Request, digest: str) -> Image:
        alone = safelight.open_engine(root)
        image = next(alone.generate(asked))
        alone.close()
        return image

    return Canaries(root, fresh)


def ask(name: str) -> Request:
    return Request("x", name, steps=1, width=64, height=64)


def test_the_first_use_makes_it_and_later_ones_compare(engine: LocalEngine, canaries: Canaries) -> None:
    seen: list[str] = []
    look = after_switch(canaries, engine.image_repairer)

    def on_switch(model, resources) -> None:
        seen.append(model.name)
        look(model, resources)

    engine.on_switch = on_switch
    for name in "aabab":
        next(engine.generate(ask(name)))
    assert seen == ["a", "b", "a", "b"]
    assert len(canaries.history(engine.library.get("a"))) == 1


def test_a_model_that_needs_an_image_has_no_canary(engine: LocalEngine, canaries: Canaries, tmp_path: Path) -> None:
    checkpoints.write_single(tmp_path / "eight.safetensors", "sd1", 7, in_channels=8)
    model = engine.library.add(tmp_path / "eight.safetensors", "eight")
    PILImage.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    engine.on_switch = after_switch(canaries, engine.image_repairer)
    next(engine.generate(replace(ask("eight"), image=str(tmp_path / "red.png"), steps=2)))
    assert canaries.history(model) == []
    assert list(Doctor(engine, canaries).since_upgrade([model])) == []


def test_images_of_two_jobs_in_turns_are_switches(engine: LocalEngine, canaries: Canaries) -> None:
    """What holds for each switch and each job holds when two generators of one engine are used in turns."""
    alone = {name: [image.pixels for image in engine.generate(replace(ask(name), count=3))] for name in "ab"}
    seen: list[str] = []
    look = after_switch(canaries, engine.image_repairer)

    def on_switch(model, resources) -> None:
        seen.append(model.name)
        look(model, resources)

    engine.on_switch = on_switch
    one, other = (engine.generate(replace(ask(name), count=3)) for name in "ab")
    made = [(next(one).pixels, next(other).pixels) for _ in range(3)]
    assert seen == ["a", "b"] * 3
    assert [list(pixels) for pixels in zip(*made, strict=True)] == [alone["a"], alone["b"]]


def spoil(engine: LocalEngine, role: str = "unet") -> None:
    """Other numbers in a denoiser, with a proof that agrees with them."""
    residency = engine.resources.residency
    for piece, held in residency.table.residents.items():
        if piece.component_key.startswith(role):
            for tensor in held.buffer.tensors.values():
                tensor.mul_(1.5)
            held.checksums = residency.source.compute_checksums(held.buffer)


def test_state_15_weights_of_another_model_are_found_by_the_canary(engine: LocalEngine, canaries: Canaries) -> None:
    right = next(engine.generate(ask("a"))).pixels_sha256
    engine.on_switch = after_switch(canaries, engine.image_repairer)
    next(engine.generate(ask("b")))
    spoil(engine)
    # It is read anew, and the canary is right again.
    assert next(engine.generate(ask("a"))).pixels_sha256 == right


def flipped(decode: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A decoder that exchanges colours each time."""
    return lambda *arguments, **more: decode(*arguments, **more).flip(1)


@pytest.mark.parametrize(
    "name",
    # There is no canary for a checkpoint that needs an image.
    thinned(sorted((n for n, one in tiny_families().items() if not one.references), key=lambda name: name != "flux")),
)
def test_each_family_has_canaries_and_its_mismatches_are_found(
    name: str, engine: LocalEngine, canaries: Canaries, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary in this process is that of a fresh one, which resolves the request from the beginning."""
    tiny_family = tiny_families()[name]
    model = engine.library.get(tiny_family.add_folder(root, tmp_path / "folder", 5))
    request = tiny_family.ask(model.name, steps=1)
    engine.on_switch = after_switch(canaries, engine.image_repairer)
    right = next(engine.generate(request)).pixels_sha256
    [known] = canaries.history(model)
    assert known.pixels().shape == (8 * model.family.latents.multiple, 8 * model.family.latents.multiple, 3)
    next(engine.generate(ask("a")))
    spoil(engine, model.family.denoiser)
    assert next(engine.generate(request)).pixels_sha256 == right
    next(engine.generate(ask("a")))
    monkeypatch.setattr(pictures, "decode", flipped(pictures.decode))
    with pytest.raises(CanaryError, match="structural similarity"):
        next(engine.generate(request))


@pytest.mark.parametrize("family", [family for family in families().values() if family.variants])
def test_a_canary_has_more_tokens_than_kernels_are_known_to_break_at(family: Family) -> None:
    assert canary.side_of(family) % family.latents.multiple == 0
    assert (canary.side_of(family) // family.latents.multiple) ** 2 > 1024


def test_what_reading_anew_does_not_help_fails_the_job(
    engine: LocalEngine, canaries: Canaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.on_switch = after_switch(canaries, engine.image_repairer)
    next(engine.generate(ask("a")))
    right = next(engine.generate(ask("b"))).pixels_sha256
    convolve = torch.nn.Conv2d.forward
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "forward", lambda self, x: convolve(self, x) * 1.1)
        with pytest.raises(CanaryError, match="structural similarity"):
            next(engine.generate(ask("a")))
        # Not only the first time.
        with pytest.raises(CanaryError):
            next(engine.generate(ask("a")))
    assert next(engine.generate(ask("a"))).width == 64
    assert next(engine.generate(ask("b"))).pixels_sha256 == right


def test_after_an_upgrade_it_is_said_which_models_draw_otherwise(engine: LocalEngine, canaries: Canaries) -> None:
    models = [engine.library.get(name) for name in "ab"]
    doctor = Doctor(engine, canaries)
    first = list(doctor.since_upgrade(models))
    assert all(finding.ok and "one is stored now" in finding.evidence for finding in first)
    image = next(engine.generate(request(models[0])))
    older = {**image.metadata["run"], "versions": {**image.metadata["run"]["versions"], "torch": "2.0.0"}}
    canaries.keep(models[0], replace(image, metadata={**image.metadata, "run": older}))
    noise = np.random.default_rng(0).integers(0, 256, image.width * image.height * 3, dtype=np.uint8).tobytes()
    other = next(engine.generate(request(models[1])))
    canaries.keep(models[1], replace(other, pixels=noise, pixels_sha256="0" * 64, metadata={"run": older}))
    same, changed = doctor.since_upgrade(models)
    assert same.ok
    assert "unchanged since the upgrade (torch 2.0.0 to" in same.evidence
    assert not changed.ok
    assert "structural similarity" in changed.evidence
    assert "safelight rollback" in changed.todo


@pytest.mark.full
def test_a_soak_finds_drift_and_growth_and_draws_them(engine: LocalEngine, canaries: Canaries, tmp_path: Path) -> None:
    models = [engine.library.get(name) for name in "ab"]
    sound = soak.soak(engine, models, lambda count, _: count >= 20)
    assert all(finding.ok for finding in sound.findings()), sound.findings()
    assert all(one != other for one, other in zip(sound.models, sound.models[1:], strict=False))
    soak.plot(sound, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 1000
    spoiled = replace(
        sound,
        models=["a", "b"] * 20,
        settled=0,
        drifted=[7],
        megabytes=[100.0 + 10 * n for n in range(40)],
        switch=[0.01] * 20 + [1.0] * 20,
    )
    assert [finding.ok for finding in spoiled.findings()] == [False, False, False]


def test_differences_are_measured() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert str(difference(image, image)) == "at most 0 of 255, 0.00 on average, structural similarity 1.000"
    rounded = np.clip(image.astype(int) + 1, 0, 255).astype(np.uint8)
    assert difference(image, rounded).similarity > 0.99
    assert difference(image, 255 - image).similarity < 0


def test_on_the_command_line(root: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "TOKENS_PER_SIDE", 8)
    shutil.copy(tiny / "a.safetensors", tmp_path / "mine.safetensors")
    runner = CliRunner()
    assert runner.invoke(app, ["models", "add", str(tmp_path / "mine.safetensors")]).exit_code == 0
    report = tmp_path / "report.json"
    arguments = ["doctor", "mine", "--soak", "2", "--plot", str(tmp_path / "soak.png"), "--save", str(report)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "images made on this machine are right" in result.output
    assert "(model 1)" in report.read_text()
    assert "mine" not in report.read_text()
    assert (tmp_path / "soak.png").exists()
    data = bytearray((tmp_path / "mine.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "mine.safetensors").write_bytes(data)
    result = runner.invoke(app, ["doctor", "mine", "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["cause"] == "loading"
    assert runner.invoke(app, ["doctor", "--soak", "0"]).exit_code != 0
