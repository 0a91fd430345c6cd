"""The sections of ``tools/gpu.py`` about the families with rectified flow.

``docs/gpu.md`` explains each section.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpu_machine import Finding, Machine, written
from gpu_sections import GB, Section, bytes_in_memory, compared, make_image, timed

LEAST, TINY_LEAST = 6e9, 25e6
"""Bytes for the weights of Z-Image in ``large``: of the published size, and of a tiny one."""


def families(machine: Machine) -> Iterator[Finding]:
    """A tiny model of each of today's families: beside the CPU in fp32, and with little memory in the usual dtype."""
    import pytest
    from support.families import tiny_families

    rows = tiny_families()
    for label in list(rows)[:1] if machine.small else list(rows):
        with pytest.MonkeyPatch.context() as patch_of_row:
            rows[label].make_references_small(patch_of_row)
            yield from family(machine, rows[label], label)


def tiny_folder(machine: Machine, row: Any, label: str) -> Path:
    """Return a folder of a tiny checkpoint of a row of ``support.families``."""
    path = machine.folder / "tiny" / label
    return path if path.exists() else written(path, lambda part: row.write_folder(part, 1))


def family(machine: Machine, row: Any, label: str) -> Iterator[Finding]:
    from safelight.assembly.engine import open_engine

    path = tiny_folder(machine, row, label)
    cpu = open_engine(machine.settings(device="cpu"))
    with machine.engine() as engine:
        model = engine.library.add(path, label, variant=row.variant)
        request = row.ask(model.name, precision="fp32")
        made = next(engine.generate(request)).pixels
        yield compared(f"{label} beside the CPU", made, next(cpu.generate(request)).pixels)
        cpu.close()
        right = next(engine.generate(row.ask(model.name)))
        nbytes = bytes_in_memory(machine, engine, model)
    with machine.engine(**machine.weights_within(0.7 * nbytes)) as engine:
        changed = 0
        for _ in range(2):
            engine.resources.embedding_cache.clear()
            changed += next(engine.generate(row.ask(model.name))).pixels_sha256 != right.pixels_sha256
    words = f"{changed} of 2 images changed" if changed else "2 images, both as with all weights in memory"
    figures = {"limit MB": 0.7 * nbytes / 1e6, "model MB": nbytes / 1e6}
    yield Finding(f"{label} with streamed weights", not changed, words, figures)


def large(machine: Machine) -> Iterator[Finding]:
    """Z-Image in its published size: all in memory, with 6 GB of it, and by diffusers."""
    import safelight

    size, steps, least = (64, 2, TINY_LEAST) if machine.small else (1024, 8, LEAST)
    start = time.perf_counter()
    path = z_image(machine)
    yield Finding("Z-Image", None, "the folder is there", {"s": time.perf_counter() - start})
    digests, times = dict[str, bytes](), dict[str, float]()
    for label, limits in (("all in memory", {}), ("little memory", machine.weights_within(least))):
        with machine.engine(**limits) as engine:
            name = engine.library.add(path, "z-image", variant="turbo").name
            request = safelight.Request("a cat", name, steps=steps, seed=1, width=size, height=size)
            start = time.perf_counter()
            digests[label] = next(engine.generate(request)).pixels
            first = time.perf_counter() - start
            figures = timed(machine, partial(make_image, engine, request))
            again = next(engine.generate(request)).pixels
            moved = engine.memory()["transfers"]["nbytes"]
            times[label] = figures["s"]
            words = f"{size} x {size} pixels, {steps} steps, {engine.resources.run_settings.dtype}"
        figures = {"first s": first, **figures, "GB to the device in 6 images": moved / GB}
        same = digests[label] == again == digests["all in memory"]
        yield Finding(label, same, f"{words}; {'equal pixels' if same else 'the pixels changed'}", figures)
    if machine.diffusers_can_use_it:
        yield from large_by_diffusers(machine, path, (size, steps), digests["all in memory"], times["all in memory"])


def z_image(machine: Machine) -> Path:
    """Return a folder of Z-Image with seeded random weights, in its published size unless ``machine`` is small."""
    from support.families import tiny_families

    from safelight.catalog.published import sizes

    if machine.small:
        return tiny_folder(machine, tiny_families()["z-image"], "z-image")
    benchmark: Any = importlib.import_module("families")  # of benchmarks
    family, configs = sizes()["z-image"]
    path = machine.folder / "z-image"
    return path if path.exists() else written(path, lambda part: benchmark.write_folder(part, family, configs, 1))


def large_by_diffusers(
    machine: Machine, path: Path, shape: tuple[int, int], right: bytes, seconds: float
) -> Iterator[Finding]:
    """Make the same image by diffusers with the same weights, dtype, noise and scheduler."""
    import torch
    from support import zimage

    from safelight.pipeline import numerics
    from safelight.pipeline.resources import TORCH_DTYPES

    size, steps = shape
    with machine.engine() as engine:
        dtype = engine.resources.run_settings.dtype
    machine.free_caches()
    pipe = zimage.loaded(path, TORCH_DTYPES[dtype]).to(machine.device.torch)
    pipe.set_progress_bar_config(disable=True)
    made: list[bytes] = []

    def make() -> None:
        noise = torch.Generator("cpu").manual_seed(1)
        call = {"num_inference_steps": steps, "guidance_scale": 0.0, "width": size, "height": size}
        made.append(pipe("a cat", generator=noise, **call).images[0].tobytes())

    theirs = timed(machine, make)
    with numerics.fixed(1, 0, machine.device.torch):
        make()
    figures = {**theirs, "Safelight's time / diffusers' time": seconds / theirs["s"]}
    words = f"with Safelight's numeric settings: {compared('', made[-1], right).words()}"
    yield Finding("diffusers", None, words, figures)


FAMILY_SECTIONS: Mapping[str, Section] = {"families": families}
