"""Isolated images have the same pixels as others, and nothing can write to the shared weights."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from support import adapters
from support.jobs import resolved
from support.serving import Server, ended

import safelight
from safelight.assembly.engine import open_engine
from safelight.assembly.programs import WORKER, ZYGOTE
from safelight.catalog.catalog import Catalog
from safelight.cli import main
from safelight.devices import host
from safelight.errors import SafelightError, WorkerDiedError
from safelight.request.adapters import Lora
from safelight.request.schema import Request
from safelight.resolve.resolve import resolve
from safelight.settings_sources import load_settings
from safelight.workers.isolation import ForkingRunner, IsolatedEngine, SpawningRunner, forks
from safelight.workers.local_engine import LocalEngine
from safelight.workers.messages import Ended, Generate, Progressed

NAMES = ("starter-noto", "starter-fluent", "starter-noto")


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Generator[IsolatedEngine]:
    settings = load_settings(tmp_path_factory.mktemp("root"))
    made = IsolatedEngine(Catalog.under(settings.root), ForkingRunner(ZYGOTE, settings))
    yield made
    made.close()


def test_state_02_pixels_are_those_of_a_warm_engine(isolated: IsolatedEngine, engine: LocalEngine) -> None:
    for name in NAMES:
        request = Request("red apple", name, steps=3, seed=5, count=2)
        seen: list[safelight.Progress] = []
        there = list(isolated.generate(request, seen.append))
        here = list(engine.generate(request))
        assert [image.pixels for image in there] == [image.pixels for image in here]
        assert [image.metadata for image in there] == [image.metadata for image in here]
        assert {progress.image for progress in seen} == {0, 1}


def test_the_first_isolated_image_of_a_machine_is_made(tmp_path: Path) -> None:
    """Kernels have not been tested, and the process that forks must not begin to compute on several threads."""
    settings = load_settings(tmp_path / "empty", threads=2)
    made = IsolatedEngine(Catalog.under(settings.root), ForkingRunner(ZYGOTE, settings))
    late = threading.Timer(60, made.close)
    late.start()
    try:
        assert next(made.generate(Request("red apple", "starter-noto", steps=1)))
        assert (settings.root / "attention.json").exists()
    finally:
        late.cancel()
        made.close()


def test_an_isolated_image_with_a_lora_is_made(tiny: Path, tmp_path: Path) -> None:
    """The process that forks must not compute on several threads: its children would wait for them for ever."""
    settings = load_settings(tmp_path / "root", threads=2)
    catalog = Catalog.under(settings.root)
    catalog.library.add(tiny / "a.safetensors", "a")
    catalog.adapters.add(adapters.write(tmp_path / "one.safetensors", seed=1), "one")
    made, warm = IsolatedEngine(catalog, ForkingRunner(ZYGOTE, settings)), open_engine(settings)
    late = threading.Timer(60, made.close)
    late.start()
    try:
        for loras in ((Lora("one", 0.8),), (), (Lora("one", 0.3),)):
            ask = Request("red apple", "a", steps=2, width=64, height=64, seed=1, loras=loras)
            assert next(made.generate(ask)).pixels_sha256 == next(warm.generate(ask)).pixels_sha256
    finally:
        late.cancel()
        made.close()


def test_each_image_is_made_by_a_process_of_its_own(isolated: IsolatedEngine) -> None:
    pids: set[int] = set()

    def look(progress: safelight.Progress) -> None:
        if progress.step == 1:
            pids.add(isolated._isolated_runner._child.pid)

    for _ in range(3):
        list(isolated.generate(Request("x", "starter-noto", steps=2), look))
    assert len(pids) == 3


@pytest.mark.full
def test_who_takes_one_image_leaves_all_ready_for_the_next(isolated: IsolatedEngine) -> None:
    next(isolated.generate(Request("x", "starter-noto", steps=1)))
    assert isolated._isolated_runner._zygote is not None
    before = isolated._isolated_runner._zygote.pid
    first = next(isolated.generate(Request("x", "starter-noto", steps=20, count=3)))
    second = next(isolated.generate(Request("x", "starter-noto", steps=2, seed=9)))
    assert (first.seed, second.seed) == (0, 9)
    assert isolated._isolated_runner._zygote.pid == before


def test_it_can_be_cancelled_at_a_step(isolated: IsolatedEngine) -> None:
    with contextlib.closing(
        isolated._isolated_runner.run(
            Generate("j", resolve(Request("x", "starter-noto", steps=150), isolated.catalog), 0, ())
        )
    ) as messages:
        for message in messages:
            if isinstance(message, Progressed) and message.progress.step == 2:
                isolated._isolated_runner.cancel("j")
    assert isinstance(message, Ended)
    assert message.kind == "cancelled"


def run_until_the_second_step(isolated: IsolatedEngine, then: Callable[[ForkingRunner], None]) -> None:
    runner = isolated._isolated_runner
    assert isinstance(runner, ForkingRunner)
    wanted = Generate("j", resolve(Request("x", "starter-noto", steps=150), isolated.catalog), 0, ())
    with contextlib.closing(runner.run(wanted)) as messages:
        for message in messages:
            if isinstance(message, Progressed) and message.progress.step == 2:
                then(runner)


def test_a_child_that_dies_is_said_and_all_is_started_again(isolated: IsolatedEngine) -> None:
    """It may have sent a part of a message, so nothing more is read."""
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        run_until_the_second_step(isolated, lambda runner: runner._child.kill())
    assert next(isolated.generate(Request("x", "starter-noto", steps=1))).width == 64


def test_a_keeper_that_dies_between_two_jobs_gives_no_job_the_images_of_another(isolated: IsolatedEngine) -> None:
    """It holds the weights, so the system chooses it when memory runs out."""
    next(isolated.generate(Request("x", "starter-noto", steps=1)))
    assert isolated._isolated_runner._zygote is not None
    [keeper] = psutil.Process(isolated._isolated_runner._zygote.pid).children()
    keeper.kill()
    # Without a pause, the job that comes may still meet the old zygote. Then it fails, and the server tries it again.
    until = time.monotonic() + 20
    while isolated._isolated_runner._zygote.alive:
        assert time.monotonic() < until
        time.sleep(0.02)
    for seed in (3, 4, 5):
        made = next(isolated.generate(Request("x", "starter-noto", steps=1, seed=seed)))
        assert made.seed == seed


def test_a_job_that_hangs_can_be_killed(isolated: IsolatedEngine) -> None:
    def stop_and_kill(runner: ForkingRunner) -> None:
        runner._child.send_signal(signal.SIGSTOP)
        runner.kill()

    with pytest.raises(WorkerDiedError):
        run_until_the_second_step(isolated, stop_and_kill)
    assert next(isolated.generate(Request("x", "starter-noto", steps=1))).width == 64


@pytest.mark.full
def test_a_zygote_that_dies_with_all_of_its_own_is_said_and_replaced(isolated: IsolatedEngine) -> None:
    next(isolated.generate(Request("x", "starter-noto", steps=1)))
    assert isolated._isolated_runner._zygote is not None
    group = isolated._isolated_runner._zygote.pid

    def kill(progress: safelight.Progress) -> None:
        if progress.step == 2:
            os.killpg(group, signal.SIGKILL)

    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        list(isolated.generate(Request("x", "starter-noto", steps=150), kill))
    assert next(isolated.generate(Request("x", "starter-noto", steps=1))).width == 64


def test_errors_mean_what_they_mean(isolated: IsolatedEngine, engine: LocalEngine) -> None:
    with pytest.raises(safelight.ModelNotFoundError):
        next(isolated.generate(Request("x", "starter-nto")))
    root = isolated.catalog.library.root
    wanted = Generate("j", resolved(root, Request("x", "starter-noto"), "0" * 64), 0, ())
    (end,) = isolated._isolated_runner.run(wanted)
    assert isinstance(end, Ended)
    assert "its content changed after the job was accepted" in end.problem
    assert next(isolated.generate(Request("x", "starter-noto", steps=1))).width == 64


def test_nothing_is_left_when_it_is_closed(tmp_path: Path) -> None:
    settings = load_settings(tmp_path)
    made = IsolatedEngine(Catalog.under(settings.root), ForkingRunner(ZYGOTE, settings))
    next(made.generate(Request("x", "starter-noto", steps=1)))
    assert made._isolated_runner._zygote is not None
    group = made._isolated_runner._zygote.pid
    made.close()
    until = time.monotonic() + 5
    while any(_group(p) == group for p in psutil.process_iter()):
        assert time.monotonic() < until
        time.sleep(0.02)


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else 0
    except (ProcessLookupError, psutil.NoSuchProcess):
        return 0


def test_the_kernel_kills_who_writes_shared_weights() -> None:
    base = host.allocate(100_000)
    base.fill_(7)
    host.make_unwritable(base)
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        base[5] = 1
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    assert int(base[5]) == 7
    assert bool((base == 7).all())


def test_sealed_weights_are_not_used_again_as_memory(engine: LocalEngine, ask) -> None:
    right = next(engine.generate(ask())).pixels_sha256
    engine.resources.residency.seal()
    assert next(engine.generate(ask())).pixels_sha256 == right
    engine.loaded.unload(None)
    assert engine.resources.residency.pool.cached_bytes == 0
    assert next(engine.generate(ask())).pixels_sha256 == right
    assert torch.zeros(1).sum() == 0


def test_over_http_and_on_the_command_line(
    server: Server, http: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = []
    for isolate in (True, False):
        body = {"prompt": "red apple", "model": "starter-noto", "steps": 2, "seed": 1, "isolate": isolate}
        job = ended(http, http.post("/api/v1/generate", json=body).json()["id"])
        assert job["state"] == "done", job["reason"]
        (image,) = http.get(f"/api/v1/jobs/{job['id']}/images").json()
        pixels.append(image["pixels_sha256"])
    assert pixels[0] == pixels[1]
    arguments = ["generate", "red apple", "-m", "starter-noto", "--steps", "2", "--out", str(tmp_path / "out")]
    main.app([*arguments, "--server", server.url, "--prove"], standalone_mode=False)
    assert "the same: 1 of 1" in capsys.readouterr().out


@pytest.mark.full
def test_where_nothing_may_fork_each_job_has_a_new_process(engine: LocalEngine, root: Path) -> None:
    """For a Mac, where Accelerate and Metal do not survive a fork."""
    assert [forks(platform) for platform in ("linux", "darwin")] == [True, False]
    settings = load_settings(root)
    spawner = SpawningRunner(WORKER, settings)
    made = IsolatedEngine(Catalog.under(settings.root), spawner)
    request = Request("red apple", "starter-noto", steps=3, seed=5, count=2)
    pids: list[int] = []

    def look(progress: safelight.Progress) -> None:
        assert spawner._process is not None
        pids.append(spawner._process.pid)

    there = list(made.generate(request, look))
    assert [image.pixels for image in there] == [image.pixels for image in engine.generate(request)]
    assert len(set(pids)) == 1
    assert not psutil.pid_exists(pids[0])

    def cancel(_: safelight.Progress) -> None:
        raise safelight.Cancelled

    with pytest.raises(safelight.Cancelled):
        list(made.generate(request, cancel))
    assert spawner._process is None
    made.close()
    with pytest.raises(SafelightError, match="is stopping"):
        list(made.generate(request))
