"""Memory decides where bytes are, never how sums are done: pixels are equal under every budget."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from pathlib import Path

import pytest
import torch
from support.forking import python
from support.scale import times

import safelight
from safelight.assembly.engine import open_engine
from safelight.boundary import pictures
from safelight.devices import machine
from safelight.memory.account import BUFFERS
from safelight.memory.budget import HOST
from safelight.models.streamed import StreamedParameter
from safelight.pipeline.drawing import ImagePipeline
from safelight.settings_sources import load_settings
from safelight.workers.local_engine import LocalEngine

STARTER = "starter-noto"


def ask(**more) -> safelight.Request:
    return safelight.Request(**{"prompt": "red apple", "model": STARTER, "steps": 2, **more})


def whole(engine: LocalEngine) -> int:
    engine.loaded.load(engine.library.get(STARTER))
    return engine.resources.residency.resident_bytes


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    engine = open_engine(load_settings(tmp_path_factory.mktemp("right")))
    return next(engine.generate(ask())).pixels_sha256, whole(engine)


def least(root: Path) -> float:
    """The least budget in GB, as the message says it."""
    tiny = open_engine(load_settings(root, max_cache_ram_gb=1e-6))
    answer = tiny.fits(ask(), tiny.library.get(STARTER))
    assert not answer["fits"]
    return max(float(str(problem).split("; at least ")[1].split(" ")[0]) for problem in [answer["summary"]])


def test_every_budget_gives_the_same_pixels(root: Path, right: tuple[str, int]) -> None:
    """The whole model, a half, a tenth, the least; in one process in a random order."""
    pixels, size = right
    shares = [1.0, 0.5, 0.3, 0.21, 0.9]
    random.Random(0).shuffle(shares)
    for share in shares[: times(3, 5)]:
        engine = open_engine(load_settings(root, max_cache_ram_gb=size * share / 2**30))
        assert next(engine.generate(ask())).pixels_sha256 == pixels, share
        # The modules' buffers are no weights: they are counted, and not limited.
        buffers = sum(entry.nbytes for entry in engine.resources.residency.ledger.entries() if entry.reason == BUFFERS)
        assert engine.memory()["places"][HOST]["peak"] <= size * share + buffers


def test_the_least_that_is_said_works_and_below_it_the_message_is_clear(root: Path, right: tuple[str, int]) -> None:
    enough = least(root)
    engine = open_engine(load_settings(root, max_cache_ram_gb=enough))
    assert next(engine.generate(ask())).pixels_sha256 == right[0]
    short = open_engine(load_settings(root, max_cache_ram_gb=enough * 0.9))
    with pytest.raises(safelight.OutOfMemoryError, match=r"max_cache_ram_gb is .*; at least .* is needed"):
        next(short.generate(ask()))


def test_partial_loading_off_loads_whole_or_says_so(root: Path, right: tuple[str, int]) -> None:
    pixels, size = right
    engine = open_engine(load_settings(root, enable_partial_loading=False))
    assert next(engine.generate(ask())).pixels_sha256 == pixels
    off = open_engine(load_settings(root, enable_partial_loading=False, max_cache_ram_gb=size * 0.3 / 2**30))
    with pytest.raises(safelight.OutOfMemoryError, match="enable_partial_loading"):
        next(off.generate(ask()))


def test_only_what_fits_is_resident(root: Path, right: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are counted segment by segment while the UNet runs, so that loading everything would be seen."""
    _, size = right
    engine = open_engine(load_settings(root, max_cache_ram_gb=size * 0.25 / 2**30))
    seen: list[tuple[int, int]] = []

    def look(progress: safelight.Progress) -> None:
        if progress.stage == "denoise":
            residency = engine.resources.residency
            seen.append((residency.resident_bytes, residency.pool.used_bytes))

    next(engine.generate(ask(), look))
    assert seen
    for resident, used in seen:
        assert 0 < resident < used <= size * 0.25


def test_the_budget_shrinks_and_grows_within_a_generation(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another program takes and gives back: between two steps the model goes, and comes back."""
    engine = open_engine(load_settings(root))
    residency = engine.resources.residency
    pixels = next(engine.generate(ask(steps=6))).pixels_sha256
    resident: list[int] = []
    stored = engine.memory()["places"][HOST]["stored"]
    free = iter([1 << 40, 0, 1 << 19, 1 << 40, 1 << 40, 1 << 40])

    def look(progress: safelight.Progress) -> None:
        if progress.stage == "denoise":
            resident.append(residency.resident_bytes)
            bound = next(free)
            residency.planner.before_planning = lambda: residency.ledger.set_budget(HOST, bound)

    assert next(engine.generate(ask(steps=6), look)).pixels_sha256 == pixels
    assert min(resident) < stored / 4
    assert resident[-1] > stored / 3


def test_memory_ran_out_while_computing_is_tried_again(root: Path, right: tuple[str, int]) -> None:
    """MEMORY 03: the allocator fails in the middle of a stage; the next try has more room, and the pixels are right."""
    engine = open_engine(load_settings(root))
    at_rest = engine.memory()["places"][HOST]["promised"]
    original, calls = torch.nn.Conv2d.forward, [0]

    def failing(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] in (3, 40):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return original(self, x)

    torch.nn.Conv2d.forward = failing  # type: ignore[method-assign]
    try:
        assert next(engine.generate(ask())).pixels_sha256 == right[0]
        assert calls[0] > 40
    finally:
        torch.nn.Conv2d.forward = original  # type: ignore[method-assign]
    assert engine.memory()["places"][HOST]["promised"] == at_rest


def test_weights_that_change_in_memory_never_make_an_image(root: Path, right: tuple[str, int]) -> None:
    """Somebody writes into resident weights through ``.data``; the sum tells, and the stage is done again."""
    engine = open_engine(load_settings(root))
    original, written = ImagePipeline._decode_and_check, [0]

    def spoiling(self: ImagePipeline, latents: torch.Tensor) -> torch.Tensor:
        for held in list(engine.resources.residency.table.residents.values()):
            if held.buffer.segment.label.startswith("vae") and not written[0]:
                next(iter(held.buffer.tensors.values())).data.add_(0.5)
                written[0] += 1
        return original(self, latents)

    next(engine.generate(ask()))
    ImagePipeline._decode_and_check = spoiling  # type: ignore[method-assign]
    try:
        assert next(engine.generate(ask())).pixels_sha256 == right[0]
    finally:
        ImagePipeline._decode_and_check = original  # type: ignore[method-assign]
    assert written[0] == 1


def test_host_memory_stays_within_the_ledger(root: Path) -> None:
    """Anonymous memory above the start: what the ledger has stored, and at most 64 MB more."""
    engine = open_engine(load_settings(root))
    for model in ("starter-noto", "starter-twemoji"):
        next(engine.generate(ask(model=model)))
    engine.close()
    machine.trim_allocator()
    start = machine.anonymous_bytes()
    for model in ("starter-noto", "starter-twemoji", "starter-fluent", "starter-noto"):
        next(engine.generate(ask(model=model)))
        stored = engine.memory()["places"][HOST]["stored"]
        assert machine.anonymous_bytes() - start < stored + (64 << 20)


@pytest.mark.usefixtures("as_for_users")
def test_stream_parameters_are_gone_after_the_image(root: Path, right: tuple[str, int]) -> None:
    engine = open_engine(load_settings(root, max_cache_ram_gb=right[1] * 0.3 / 2**30))
    next(engine.generate(ask()))
    for skeleton in engine.resources.skeletons._free.values():
        assert not any(isinstance(p, StreamedParameter) for p in skeleton.module.parameters())


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -d counts other things elsewhere")
def test_under_ulimit_it_runs_or_says_the_least(root: Path, right: tuple[str, int], tmp_path: Path) -> None:
    """The bound is the process's own data; what cannot be had is refused beforehand, not died of."""
    program = (
        "import json, sys, resource, safelight\n"
        "engine = safelight.open_engine()\n"
        "request = safelight.Request('red apple', 'starter-noto', steps=2)\n"
        "next(engine.generate(request))\n"
        "engine.close()\n"
        "used = int(next(l for l in open('/proc/self/status') if l.startswith('VmData')).split()[1]) * 1024\n"
        "def limited(more):\n"
        "    resource.setrlimit(resource.RLIMIT_DATA, (used + more, -1))\n"
        "    try:\n"
        "        return next(engine.generate(request)).pixels_sha256\n"
        "    except safelight.OutOfMemoryError as error:\n"
        "        return str(error)\n"
        "print(json.dumps([limited(150 << 20), limited(70 << 20), limited(400 << 20)]))\n"
    )
    environment = {**os.environ, "SAFELIGHT_ROOT": str(root)}
    done = python("-c", program, environment=environment)
    assert done.returncode == 0, done.stderr
    some, none, plenty = json.loads(done.stdout.splitlines()[-1])
    assert plenty == right[0]
    assert some == right[0]
    assert none == right[0] or "; at least " in none
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_a_containers_limit_is_planned_for_beforehand(
    root: Path, right: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cgroup's files say how much is left: what fits in part is streamed, what does not fit is refused, never died
    of."""
    group, proc = tmp_path / "cgroup", tmp_path / "proc"
    group.mkdir()
    proc.mkdir()
    (proc / "cgroup").write_text("0::/\n")
    (group / "memory.stat").write_text("inactive_file 0\n")
    left = [0]
    tightest = machine.tightest_limit

    def within() -> machine.MemoryLimit:
        used = machine.anonymous_bytes()
        (group / "memory.current").write_text(str(used))
        (group / "memory.max").write_text(str(used + left[0]))
        return tightest(proc, group)

    monkeypatch.setattr(machine, "tightest_limit", within)
    for megabytes, outcome in ((400, "whole"), (130, "part"), (66, "refused")):
        left[0] = megabytes << 20
        engine = open_engine(load_settings(root))
        answer = engine.fits(ask(), engine.library.get(STARTER))
        assert answer["fits"] == (outcome != "refused"), answer["summary"]
        if outcome == "refused":
            with pytest.raises(safelight.OutOfMemoryError, match="This process can use"):
                next(engine.generate(ask()))
            continue
        assert next(engine.generate(ask())).pixels_sha256 == right[0]
        assert "the cgroup's limit" in engine.memory()["places"][HOST]["set_by"]


def test_a_weight_written_while_it_is_bound_makes_no_image(root: Path, right: tuple[str, int]) -> None:
    """The write is seen when the binding ends; the stage is done again with the weight read again."""
    engine = open_engine(load_settings(root, verify_transfers="off"))
    original, written = pictures.decode, [0]

    def writing(module: torch.nn.Module, latents: torch.Tensor, scale: int, tile: int) -> torch.Tensor:
        if not written[0]:
            written[0] = 1
            with torch.no_grad():
                module.post_quant_conv.weight.mul_(3)  # type: ignore[union-attr, operator]
        return original(module, latents, scale, tile)

    pictures.decode = writing  # type: ignore[assignment]
    try:
        assert next(engine.generate(ask())).pixels_sha256 == right[0]
    finally:
        pictures.decode = original  # type: ignore[assignment]
    assert written[0] == 1


def test_wrong_weights_of_a_pinned_model_are_read_again(root: Path, right: tuple[str, int]) -> None:
    engine = open_engine(load_settings(root))
    engine.loaded.pin(STARTER)
    unet = engine.library.get(STARTER).manifest.component("unet")
    with engine.resources.residency.lease(unet, torch.float32) as lease:
        name = next(iter(lease.shapes))
        lease.resident_tensor(name).data.mul_(1.5)  # type: ignore[union-attr]
        lease.mark_corrupted(name)
    for _ in range(2):
        assert next(engine.generate(ask())).pixels_sha256 == right[0]
    # It is still pinned.
    engine.loaded.unload(None)
    assert engine.loaded.resident()


def test_weights_that_another_lease_knows_to_be_wrong_make_no_image(root: Path, right: tuple[str, int]) -> None:
    """Nothing is verified here: what is known is enough."""
    engine = open_engine(load_settings(root, verify_transfers="off"))
    next(engine.generate(ask()))
    unet = engine.library.get(STARTER).manifest.component("unet")
    residency = engine.resources.residency
    with residency.lease(unet, torch.float32) as lease:
        name = next(iter(lease.shapes))
        lease.resident_tensor(name).data.mul_(1.5)  # type: ignore[union-attr]
        lease.mark_corrupted(name)
        with pytest.raises(safelight.IntegrityError, match="weights were corrupted in memory"):
            next(engine.generate(ask()))
    assert next(engine.generate(ask())).pixels_sha256 == right[0]
