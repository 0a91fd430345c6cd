"""The sections of ``tools/gpu.py``: each examines one side of Safelight on a device, and yields what it found.

``docs/gpu.md`` explains each section.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpu_machine import TINY, Finding, Machine

HOME = Path(__file__).resolve().parents[1]

LEVELS = 2
"""Pixels of the GPU in fp32 may differ from those of the CPU by this many levels of 255: sums are added in another
order."""

GB = 1e9


def describe_machine(machine: Machine) -> Iterator[Finding]:
    """The hardware, the versions, and the speed of copies between host and device."""
    import torch

    from safelight import boundary
    from safelight.devices import choice

    yield Finding("hardware", None, choice.hardware(machine.device))
    libraries = f"diffusers {boundary.VERSION}, transformers {boundary.TRANSFORMERS}"
    yield Finding("software", None, f"Python {platform.python_version()}, torch {torch.__version__}, {libraries}")
    free = {"GB": machine.device.available() / GB}
    yield Finding("memory", None, "what this process can allocate", free)
    speeds = {f"{direction} GB/s": bus_speed(machine, direction) for direction in ("push", "pull")}
    size = bus_bytes(machine) >> 20
    yield Finding("bus", None, f"the best of 5 copies of {size} MiB: push is to the device, pull is back", speeds)
    if machine.device.has_own_memory:
        yield Finding("filling a staging buffer", None, "from ordinary host memory", staging_speeds(machine))


def staging_speeds(machine: Machine) -> dict[str, float]:
    """Return GB/s of copies from ordinary host memory to a staging buffer, by the number of threads."""
    import torch

    from safelight.devices.transfer import torch_threads

    size = machine.device.staging_buffer_bytes or 16 << 20
    buffer, source = machine.device.staging(size), torch.ones(bus_bytes(machine), dtype=torch.uint8)
    speeds: dict[str, float] = {}
    for threads in (1, 2, 4, 8):
        seconds: list[float] = []
        with torch_threads(threads):
            for _ in range(5):
                start = time.perf_counter()
                for at in range(0, source.numel(), size):
                    buffer[: source.numel() - at].copy_(source[at : at + size])
                seconds.append(time.perf_counter() - start)
        speeds[f"{threads} threads GB/s"] = source.numel() / min(seconds) / GB
    return speeds


def bus_bytes(machine: Machine) -> int:
    return (16 if machine.small else 512) << 20


def bus_speed(machine: Machine, direction: str) -> float:
    """Return GB/s of copies between staging memory and the device: the physical limit for streamed weights."""
    device, nbytes = machine.device, bus_bytes(machine)
    host, base = device.staging(nbytes), device.allocate(nbytes)
    seconds: list[float] = []
    for _ in range(5):
        machine.wait()
        start = time.perf_counter()
        (device.push(host, base) if direction == "push" else device.pull(base, host)).wait()
        seconds.append(time.perf_counter() - start)
    device.release(base)
    return nbytes / min(seconds) / GB


def models(machine: Machine) -> Iterator[Finding]:
    """Writes the models of the next sections, once."""
    start = time.perf_counter()
    for name in TINY:
        machine.tiny(name)
    machine.lora()
    if not machine.small:
        import checkpoints  # pyright: ignore[reportMissingImports] - of benchmarks

        for seed, name in enumerate("AB", 1):
            checkpoints.write(machine.folder, name, seed)
    size = sum(path.stat().st_size for path in machine.models().values()) / GB
    yield Finding("A and B", None, "seeded random weights", {"GB": size, "s": time.perf_counter() - start})


def copies(machine: Machine) -> Iterator[Finding]:
    """Whether copies arrive unchanged, and the best size of staging buffers."""
    from safelight.devices import selftest

    if not machine.device.has_own_memory:
        yield Finding("copies", None, "this device computes in host memory, so nothing is copied")
        return
    found = selftest.run_test(machine.device)
    how = "asynchronous" if found.asynchronous else "synchronous"
    figures = {"staging MiB": found.stage_bytes / (1 << 20)}
    yield Finding("asynchronous copies", found.asynchronous or None, f"{found.why}; Safelight's are {how}", figures)
    if not found.asynchronous:
        wrong = selftest._first_wrong(machine.device)
        yield Finding("synchronous copies", wrong is None, wrong or "copies of all sizes arrived unchanged")


def attention(machine: Machine) -> Iterator[Finding]:
    """Each attention kernel, compared with float64 in ten shapes."""
    import torch

    from safelight.boundary import kernels
    from safelight.models.attention import KERNELS, check_kernels
    from safelight.pipeline import numerics

    dtypes = (torch.float32,) if machine.small else (torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        for name in KERNELS:
            label = f"{name} in {str(dtype).removeprefix('torch.')}"
            if missing := kernels.missing_kernel(name, machine.device.torch):
                yield Finding(label, None, missing)
                continue
            try:
                with numerics.fixed(os.cpu_count() or 1, 0, machine.device.torch):
                    result = check_kernels([name], dtype, machine.device.torch)[name]
            except ImportError as error:
                yield Finding(label, None, f"its package is broken: {error}")
                continue
            # A kernel that fails is not used. Without this one, nothing would be left.
            is_last_resort = name == "torch-sdp" and dtype == torch.float32
            ok = True if result.passed else False if is_last_resort else None
            yield Finding(label, ok, result.why, {"ms": result.seconds * 1e3})


def contracts(machine: Machine) -> Iterator[Finding]:
    """The tests that every device must pass (``tests/contracts``)."""
    chosen = ["-k", "pushed or counts"] if machine.small else []
    command = [sys.executable, "-m", "pytest", str(HOME / "tests/contracts"), "-q", "--no-header", "-rfE", *chosen]
    # pytest leaves out the reason of a failure that does not fit into a line.
    environment = {**os.environ, "SAFELIGHT_CONTRACTS_DEVICE": machine.device.name, "COLUMNS": "400"}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=HOME, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")):
            yield Finding(line.split()[1], False, line.partition(" - ")[2] or "failed")
    yield Finding("all contracts", done.returncode == 0, lines[-1].strip("= "))


def switches(machine: Machine) -> Iterator[Finding]:
    """A, B and A again with everything in memory and with little of it, with a LoRA in between."""
    import safelight
    from safelight.request.adapters import Lora

    least = {"max_cache_vram_gb": 0.02} if machine.device.has_own_memory else {"max_cache_ram_gb": 0.03}
    first: dict[tuple[str, bool], str] = {}
    for label, limits in (("everything in memory", {}), ("little memory", least)):
        changed: list[str] = []
        with machine.engine(**limits) as engine:
            for name, adapted in (("a", False), ("b", False), ("a", True), ("a", False), ("b", True), ("a", False)):
                loras = (Lora(str(machine.lora()), 0.8),) if adapted else ()
                path = str(machine.tiny(name))
                engine.resources.embedding_cache.clear()
                request = safelight.Request("red apple", path, steps=2, width=64, height=64, loras=loras)
                digest = next(engine.generate(request)).pixels_sha256
                if first.setdefault((name, adapted), digest) != digest:
                    changed.append(f"{name}{' with the LoRA' if adapted else ''}")
        words = f"these images changed: {', '.join(changed)}" if changed else "6 images, all as when first made"
        yield Finding(label, not changed, words)
    count = len(set(first.values()))
    yield Finding("models and LoRA have an effect", count == 4, f"{count} of 4 pictures are different")
    yield streamed(machine)


def streamed(machine: Machine) -> Finding:
    """Make an image with all weights in memory, and with so little memory that weights are streamed at each step."""
    import safelight

    path = str(machine.models()["A"])
    request = safelight.Request("red apple", path, steps=2, width=128, height=128)
    with machine.engine() as engine:
        right = next(engine.generate(request)).pixels_sha256
        nbytes = bytes_in_memory(machine, engine, engine.library.find(path))
    share = 0.9 if machine.small else 0.3
    with machine.engine(**machine.weights_within(share * nbytes)) as engine:
        made = next(engine.generate(request))
    words = "equal" if made.pixels_sha256 == right else "the pixels changed"
    figures = {"limit GB": share * nbytes / GB, "model GB": nbytes / GB, "s": made.seconds.total}
    return Finding("streamed weights", made.pixels_sha256 == right, words, figures)


def parity(machine: Machine) -> Iterator[Finding]:
    """Images of tiny models in fp32, beside those of the CPU, and beside those of diffusers on the same device."""
    from support import oracle

    import safelight
    from safelight.assembly.engine import open_engine
    from safelight.pipeline import numerics

    cpu = open_engine(machine.settings(device="cpu"))
    with machine.engine() as engine:
        for name in ("a",) if machine.small else ("a", "sdxl"):
            base, seed = TINY[name]
            path = str(machine.tiny(name))
            request = safelight.Request("red apple", path, steps=4, seed=3, width=64, height=64, precision="fp32")
            made = next(engine.generate(request)).pixels
            yield compared(f"{base} beside the CPU", made, next(cpu.generate(request)).pixels)
            if not machine.diffusers_can_use_it:
                yield Finding(f"{base} beside diffusers", None, f"diffusers cannot use {machine.device.name}")
                continue
            pipe = oracle.pipeline(base, seed).to(machine.device.torch)
            # As exact as Safelight: no TF32, for one.
            with numerics.fixed(1, 0, machine.device.torch):
                theirs = oracle.pixels(pipe, request.prompt, None, 4, 3, request.guidance_scale)
            yield compared(f"{base} beside diffusers", made, theirs)
    cpu.close()


def compared(what: str, made: bytes, right: bytes) -> Finding:
    differences = [abs(one - other) for one, other in zip(made, right, strict=True)]
    most, count = max(differences), sum(map(bool, differences))
    words = f"{count} of {len(made)} bytes differ; {LEVELS} of 255 levels are allowed" if most else "equal bit for bit"
    return Finding(what, most <= LEVELS, words, {"largest difference in levels": most} if most else {})


def memory(machine: Machine) -> Iterator[Finding]:
    """Safelight's own count of the device's memory beside the allocator's and the driver's."""
    device = machine.device
    if not device.has_own_memory:
        yield Finding("memory", None, "this device computes in host memory")
        return
    path = str(machine.models()["A"])
    with machine.engine() as engine:
        model = engine.library.find(path)
        # The first binding makes buffers of modules and workspaces of libraries, which stay.
        bytes_in_memory(machine, engine, model)
        engine.resources.residency.drop()
        machine.free_caches()
        before, free = device.allocated(), device.available()
        nbytes = bytes_in_memory(machine, engine, model)
        after = device.allocated()
        figures = {"ledger GB": nbytes / GB, "less free GB": (free - device.available()) / GB}
        if before is None or after is None:
            yield Finding("a model in memory", None, "this allocator does not say what it has allocated", figures)
            return
        words = f"the ledger has {nbytes} bytes, the allocator {after - before}"
        yield Finding("a model in memory", after - before == nbytes, words, figures)
        engine.resources.residency.drop()
        machine.free_caches()
        left = (device.allocated() or 0) - before
        yield Finding("the model dropped", left == 0, f"{left} bytes are still allocated")


def bytes_in_memory(machine: Machine, engine: Any, model: Any) -> int:
    """Bind all components of a model. Returns the bytes that models have where the device computes."""
    from safelight.memory.account import BUFFERS

    bind_all(machine, engine, model)
    residency = engine.resources.residency
    return int(residency.ledger.stored(residency.place, besides=BUFFERS))


def bind_all(machine: Machine, engine: Any, model: Any) -> float:
    """Return the seconds from asking for a model's components until all are bound and their copies are done."""
    from safelight.models.bind import bind
    from safelight.models.skeleton import SkeletonKey
    from safelight.pipeline.resources import dtype_of

    resources, place = engine.resources, machine.device.torch
    settings = resources.run_settings
    start = time.perf_counter()
    for component in model.manifest.components:
        dtype = dtype_of(settings, model.family, component.role)
        key = SkeletonKey(model.base, component.role, component.config, dtype, settings.attention, device=place)
        with resources.residency.lease(component, dtype) as lease, bind(resources.skeletons, key, lease):
            machine.wait()
    return time.perf_counter() - start


def switch_times(machine: Machine) -> Iterator[Finding]:
    """Seconds of a switch when both models fit, and when there is room for one, beside the bus."""
    turns = 4 if machine.small else 12
    with machine.engine() as engine:
        paths = {name: str(path) for name, path in machine.models().items()}
        nbytes = bytes_in_memory(machine, engine, engine.library.find(paths["A"]))
        seconds, _ = median_switch(machine, engine, paths, turns)
        yield Finding("both in memory", None, f"the median of {turns} switches", {"ms": seconds * 1e3})
    if not machine.device.has_own_memory:
        return
    with machine.engine(max_cache_vram_gb=1.05 * nbytes / (1 << 30)) as engine:
        seconds, moved = median_switch(machine, engine, paths, turns)
    speed, bus = moved / seconds / GB, bus_speed(machine, "push")
    figures = {"s": seconds, "GB/s": speed, "share of the bus": speed / bus}
    words = f"the median of {turns} switches that copy {moved / GB:.3g} GB from host memory; verification is as in use"
    yield Finding("room for one", None, words, figures)


def median_switch(machine: Machine, engine: Any, paths: Mapping[str, str], turns: int) -> tuple[float, float]:
    """Return the median of the seconds of switches, and the bytes that one of them copies to the device."""
    models = [engine.library.find(path) for path in paths.values()]
    for model in models * 2:
        bind_all(machine, engine, model)
    before = engine.memory()["transfers"]["nbytes"]
    seconds = [bind_all(machine, engine, models[turn % 2]) for turn in range(turns)]
    return statistics.median(seconds), (engine.memory()["transfers"]["nbytes"] - before) / turns


def generation(machine: Machine) -> Iterator[Finding]:
    """The time and the memory of an image beside diffusers, with the same weights, dtype and scheduler."""
    import safelight

    size, steps = (64, 2) if machine.small else (512, 20)
    model = str(machine.models()["A"])
    request = safelight.Request("a cat", model, steps=steps, seed=1, width=size, height=size, cfg=7.5)
    with machine.engine() as engine:
        ours = timed(machine, partial(make_image, engine, request))
        run = engine.resources.run_settings
    words = f"{size} x {size} pixels, {steps} steps, {run.dtype}, {run.attention}; decoded twice, as the first 100 are"
    yield Finding("Safelight", None, words, ours)
    if machine.small or not machine.diffusers_can_use_it:
        yield Finding("diffusers", None, "not compared: tiny models, or a device that it cannot use")
        return
    import diffusers
    import torch

    from safelight.pipeline.resources import TORCH_DTYPES

    machine.free_caches()
    pipeline: Any = diffusers.StableDiffusionPipeline
    pipe = pipeline.from_pretrained(machine.folder / "A", torch_dtype=TORCH_DTYPES[run.dtype])
    pipe = pipe.to(machine.device.torch)
    pipe.set_progress_bar_config(disable=True)

    def make_theirs() -> None:
        noise = torch.Generator("cpu").manual_seed(1)
        pipe("a cat", num_inference_steps=steps, guidance_scale=request.cfg, width=size, height=size, generator=noise)

    theirs = timed(machine, make_theirs)
    figures = {**theirs, "Safelight's time / diffusers' time": ours["s"] / theirs["s"]}
    yield Finding("diffusers", None, f"{diffusers.__version__}, as it comes", figures)


def timed(machine: Machine, make: Callable[[], None]) -> dict[str, float]:
    """Return the least seconds of three calls after a first one and, on CUDA, the allocator's peak."""
    import torch

    make()
    peaks: list[int] = []
    reset = torch.cuda.reset_peak_memory_stats

    def note_and_reset(device: Any = None) -> None:
        # Safelight resets the allocator's count at each stage.
        peaks.append(torch.cuda.max_memory_allocated(device))
        reset(device)

    if machine.device.name == "cuda":
        reset()
    seconds: list[float] = []
    with patch.object(torch.cuda, "reset_peak_memory_stats", note_and_reset):
        for _ in range(3):
            machine.wait()
            start = time.perf_counter()
            make()
            machine.wait()
            seconds.append(time.perf_counter() - start)
    figures = {"s": min(seconds)}
    if machine.device.name == "cuda":
        figures["peak GB"] = max([*peaks, torch.cuda.max_memory_allocated()]) / GB
    return figures


def make_image(engine: Any, request: Any) -> None:
    engine.resources.embedding_cache.clear()
    next(engine.generate(request))


def doctor(machine: Machine) -> Iterator[Finding]:
    """`safelight doctor` for two tiny models."""
    from safelight.assembly import doctor as examining

    with examining.doctor(machine.settings()) as found:
        added = [found.engine.library.add(machine.tiny(name), f"gpu-{name}") for name in "ab"]
        for finding in found.examine(added).findings:
            yield Finding(f"{finding.suspect}: {finding.what}", finding.ok, f"{finding.evidence} {finding.todo}")


Section = Callable[[Machine], Iterator[Finding]]
SECTIONS: Mapping[str, Section] = {
    "machine": describe_machine,
    "models": models,
    "copies": copies,
    "attention": attention,
    "contracts": contracts,
    "switches": switches,
    "parity": parity,
    "memory": memory,
    "times": switch_times,
    "generation": generation,
    "doctor": doctor,
}
