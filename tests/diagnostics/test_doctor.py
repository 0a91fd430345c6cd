"""The doctor names the right suspect for faults that are put in, and says nothing when nothing is wrong."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Generator, Sequence
from functools import cache
from pathlib import Path

import pytest
from diagnostics.faults import FAULTS, A, B, Fault, Scene
from support import adapters
from support.measured import give
from support.scale import ALL, thinned

from safelight.assembly.engine import open_engine
from safelight.assembly.programs import WORKER
from safelight.catalog.catalog import Catalog
from safelight.catalog.library import Library
from safelight.devices.simulated import Simulated
from safelight.diagnostics import canary
from safelight.diagnostics.canary import Canaries, request
from safelight.diagnostics.doctor import Doctor
from safelight.diagnostics.finding import Finding
from safelight.diagnostics.report import ADAPTED, Report, without_names
from safelight.models import attention
from safelight.models.attention import KernelResult
from safelight.settings_sources import load_settings
from safelight.workers.fresh_process import FreshProcesses
from safelight.workers.local_engine import LocalEngine

pytestmark = pytest.mark.usefixtures("as_for_users")

SHORT = (
    "the text encoder of another checkpoint",
    "a hook left on the UNet",
    "attention gives junk above 1,024 tokens",
    "a device that does not repeat itself",
)
"""Faults that `make test` tries; `make proof` tries all."""


@pytest.fixture
def prepared(homes: Callable[[int], Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models with their canaries: copied for each test. In `make test`, the canaries are small."""
    if not (ALL or request.node.get_closest_marker("proof")):
        monkeypatch.setattr(canary, "TOKENS_PER_SIDE", 8)
    return homes(canary.TOKENS_PER_SIDE)


@pytest.fixture(scope="session")
def homes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Returns the folder of two models with canaries of that many tokens per side, made in fresh processes."""
    return cache(lambda _: prepare(tiny, tmp_path_factory.mktemp("prepared")))


def prepare(tiny: Path, home: Path) -> Path:
    root = home / "root"
    root.mkdir()
    give(root)
    shutil.copy(tiny / "a.safetensors", home / f"{A}.safetensors")
    shutil.copy(tiny / "b.safetensors", home / f"{B}.safetensors")
    settings = load_settings(root)
    engine = open_engine(settings)
    fresh = FreshProcesses(WORKER, settings, Catalog.under(settings.root))
    canaries = Canaries(root, fresh.make_first_image)
    for name in (A, B):
        canaries.make_in_fresh_process(engine.library.add(home / f"{name}.safetensors", name))
    engine.close()
    return home


@contextlib.contextmanager
def scene(prepared: Path, home: Path, seed: int, device: str = "cpu") -> Generator[tuple[Scene, Doctor]]:
    """An engine that has made an image by each model, and a doctor; the models are at ``home``."""
    shutil.copytree(prepared / "root", home / "root", dirs_exist_ok=True)
    files = {name: home / f"{name}.safetensors" for name in (A, B)}
    settings = load_settings(home / "root")
    simulated = Simulated(nbytes=256 << 20) if device == "simulated" else None
    engine = open_engine(settings, simulated)
    for name, path in files.items():
        shutil.copy(prepared / path.name, path)
        engine.library.remove(name)
        engine.library.add(path, name)
    canaries = Canaries(home / "root", FreshProcesses(WORKER, settings, Catalog.under(settings.root)).make_first_image)
    try:
        yield Scene(engine, files, random.Random(seed)), Doctor(engine, canaries)
    finally:
        engine.close()
        if simulated is not None:
            simulated.close()


def used(engine: LocalEngine) -> None:
    for name in (A, B):
        next(engine.generate(request(engine.library.get(name))))


def examined(doctor: Doctor) -> Report:
    return doctor.examine([doctor.engine.library.get(name) for name in (A, B)])


def named(prepared: Path, home: Path, fault: Fault, seed: int) -> str:
    """Whom the doctor names for a fault."""
    with scene(prepared, home, seed, fault.device) as (there, doctor):
        used(there.engine)
        applied = fault.apply(there)
        with applied if hasattr(applied, "__enter__") else contextlib.nullcontext():
            report = examined(doctor)
        assert not report.ok, fault.name
        return report.cause


@pytest.mark.parametrize(
    "fault", thinned([fault for fault in FAULTS if fault.name in SHORT], 1), ids=lambda fault: fault.name
)
def test_the_right_suspect_is_named(fault: Fault, prepared: Path, tmp_path: Path) -> None:
    assert named(prepared, tmp_path, fault, 1) == fault.suspect


@pytest.mark.proof
def test_forty_faults_and_the_right_suspects(prepared: Path, tmp_path: Path) -> None:
    wrong = {}
    for number, fault in enumerate(FAULTS):
        home = tmp_path / str(number)
        home.mkdir()
        found = named(prepared, home, fault, number)
        shutil.rmtree(home)
        if found != fault.suspect:
            wrong[fault.name] = found
    assert len(FAULTS) >= 40
    assert len(wrong) <= 2, wrong


def test_nothing_is_wrong(prepared: Path, tmp_path: Path) -> None:
    with scene(prepared, tmp_path, 0) as (there, doctor):
        used(there.engine)
        report = examined(doctor)
        assert report.ok, [finding for finding in report.findings if not finding.ok]
        assert report.cause == ""
        assert json.loads(json.dumps(report.values()))["ok"] is True


@pytest.mark.proof
def test_nothing_is_wrong_a_hundred_times(prepared: Path, tmp_path: Path) -> None:
    with scene(prepared, tmp_path, 0) as (there, doctor):
        for _ in range(100):
            used(there.engine)
            report = examined(doctor)
            assert report.ok, [finding for finding in report.findings if not finding.ok]


def test_a_report_for_others_names_nobody(tmp_path: Path, tiny: Path) -> None:
    library = Library(tmp_path)
    models = [library.add(tiny / f"{form}.safetensors", name) for form, name in (("a", "dream"), ("b", "deliberate"))]
    finding = Finding("loading", f"the files of {models[0].name}", False, f"{models[0].path}: is gone", "Put it back.")
    text = json.dumps(without_names(Report((finding,), {"device": "cpu"}), models).values())
    assert str(tiny) not in text
    assert "dream" not in text
    assert "(model 1)" in text
    assert "(file 1)" in text


def test_the_kernel_of_each_model_is_tested(root: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(load_settings(root, attention_types={B: "normal"}))
    models = [engine.library.add(tiny / f"{file}.safetensors", name) for file, name in (("a", A), ("b", B))]

    def fake_results(names: Sequence[str], *_: object) -> dict[str, KernelResult]:
        return {name: KernelResult(name != "normal" or sound, "", 1.0) for name in names}

    monkeypatch.setattr(attention, "check_kernels", fake_results)
    doctor = Doctor(engine, Canaries(root, lambda *_: pytest.fail("nothing is drawn")))
    sound = True
    assert [(one.what, one.ok) for one in doctor._attention(models)] == [
        ("the kernel normal in fp32", True),
        ("the kernel torch-sdp in fp32", True),
    ]
    sound = False
    assert [(one.what, one.ok) for one in doctor._attention(models)] == [
        ("the kernel normal in fp32", False),
        ("the kernel torch-sdp in fp32", True),
    ]


def test_adapters_are_looked_at_too(prepared: Path, tmp_path: Path) -> None:
    """One that fits the models is put on and taken off; one whose file was changed is named."""
    with scene(prepared, tmp_path, 0) as (made, doctor):
        path = adapters.write(tmp_path / "style.safetensors")
        made.engine.catalog.adapters.add(path)
        models = [made.engine.library.get(name) for name in (A, B)]
        report = doctor.examine(models)
        assert report.ok, [finding for finding in report.findings if not finding.ok]
        tried = [finding for finding in report.findings if finding.what == ADAPTED]
        assert [finding.evidence for finding in tried] == [
            f"{n}: after 1 combinations it makes the same image as before" for n in (A, B)
        ]
        adapters.write(path, seed=2)
        [wrong] = doctor._adapters()
        assert (wrong.ok, wrong.suspect, wrong.what) == (False, "loading", "the file of the adapter style")
