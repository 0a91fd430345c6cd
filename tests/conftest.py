"""Shared fixtures: tiny checkpoints made once for each worker, an empty library, an engine."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Two workers on two cores: one thread each. It is part of the run settings, so it has to be the same everywhere.
os.environ["SAFELIGHT_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# The fastest kernel of one process may not be that of the next, and tests compare pixels between processes.
os.environ["SAFELIGHT_ATTENTION_TYPE"] = "torch-sdp"

import httpx
import pytest
from support import extensions, forking, serving
from support.measured import give, measure
from support.scale import ALL
from support.serving import Server

import safelight

if TYPE_CHECKING:
    from safelight.workers.local_engine import LocalEngine

# `make test-all` starts every process anew, as users do; so does `make coverage`, which cannot see into forks.
if forking.CLONE and not ALL and "COVERAGE_PROCESS_CONFIG" not in os.environ:
    forking.forks_ours()


SHARE_SECONDS = 10.0
"""A test that takes longer is named at the end. Two thousand tests have five minutes on two cores."""


def pytest_collection() -> None:
    """Nothing that is imported is garbage, and to examine it takes a tenth of the time of the imports."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports: list[pytest.TestReport] = [
        report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])
    ]
    slow = sorted((report.duration, report.nodeid) for report in reports if report.duration > SHARE_SECONDS)
    if slow and not ALL:
        terminalreporter.section(f"tests that take more than their share of {SHARE_SECONDS:.0f} s")
        for seconds, name in reversed(slow):
            terminalreporter.write_line(f"{seconds:6.1f} s {name}")


@pytest.fixture(scope="module", autouse=True)
def frozen(measured: None) -> None:
    """Tell the garbage collector that what is alive between two modules is not garbage.

    It examines everything that is not frozen whenever an image asks for a collection: 0.1 s for what was imported and
    for what tests share.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def lighter() -> Generator[None]:
    """See :mod:`support.lighter`."""
    with pytest.MonkeyPatch.context() as patch:
        if not ALL:
            from support.lighter import make_lighter

            make_lighter(patch)
        yield


@pytest.fixture
def as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what `make test` makes cheaper: it is as for users."""
    from support import lighter

    lighter.as_for_users(monkeypatch)


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured once of a machine."""
    # Not above: the process that hands out the tests to others computes nothing, and others wait until it has begun.
    # structlog is imported before a test captures messages: the first message would configure it then.
    import structlog  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import torch

    from safelight.assembly import importing

    torch.set_num_threads(1)
    importing.import_engine(own_process=False)
    measure(tmp_path_factory.mktemp("measured"))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: None) -> Path:
    """A place for everything that Safelight keeps; nothing is there but what was measured of this machine."""
    place = tmp_path / "root"
    place.mkdir()
    give(place)
    monkeypatch.setenv("SAFELIGHT_ROOT", str(place))
    monkeypatch.delenv("SAFELIGHT_MAX_CACHE_RAM_GB", raising=False)
    return place


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny checkpoints: two of SD 1, one of SD 2 and of SDXL, a refiner, in several forms."""
    import torch
    from support import checkpoints

    folder = tmp_path_factory.mktemp("tiny")
    checkpoints.write_single(folder / "a.safetensors", "sd1", 1)
    checkpoints.write_single(folder / "b.safetensors", "sd1", 2, dtype=torch.float16)
    checkpoints.write_single(folder / "v2.safetensors", "sd2", 3)
    checkpoints.write_single(folder / "xl.safetensors", "sdxl", 4)
    checkpoints.write_single(folder / "refiner.safetensors", "sdxl-refiner", 5)
    checkpoints.write_single(folder / "inpaint.safetensors", "sd1", 6, in_channels=9)
    checkpoints.write_single(folder / "old.ckpt", "sd1", 1)
    checkpoints.write_folder(folder / "folder", "sd1", 1)
    return folder


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Generator[extensions.Install]:
    """Installs packages: folders, or names of examples. A further call replaces them. They are gone after the test."""
    packages = extensions.Packages(monkeypatch)
    yield packages.install
    packages.install()


@pytest.fixture
def engine(root: Path) -> Iterator[LocalEngine]:
    opened = safelight.open_engine(root)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared_engine(measured: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    """One engine for all tests of a module: what it has made before must change nothing."""
    place = tmp_path_factory.mktemp("root")
    give(place)
    opened = safelight.open_engine(place)
    yield opened
    opened.close()


@pytest.fixture
def ask(tiny: Path):
    """A small request for one of the tiny checkpoints."""

    from support.jobs import small

    return lambda name="a.safetensors", **changes: small(tiny / name, **changes)


@pytest.fixture(scope="session")
def server(measured: None, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """One server for all tests of a process that do no harm to it."""
    del measured
    with serving.serving(tmp_path_factory.mktemp("server")) as made:
        made.ready()
        yield made


@pytest.fixture
def http(server: Server) -> Generator[httpx.Client]:
    with server.client() as client:
        yield client
