"""The section of ``tools/gpu.py`` about quantised weights.

``docs/gpu.md`` explains it.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpu_machine import Finding, Machine
from gpu_sections import GB

WIDTH = 4096
"""Rows and columns of the weight that is dequantised: one of a large transformer."""

PIXELS = (("Q4_K", "flux"), ("scaled fp8, newer names", "z-image"), ("nf4, nested", "flux"), ("nvfp4", "qwen-image"))
"""Forms and families whose pictures are compared."""

SEED = 5


def forms(machine: Machine) -> Iterator[Finding]:
    """Each form of a weight: the numbers that the device computes beside the host's, its speed, and pictures."""
    for name, tensor, raw in weights(machine):
        yield from numbers(machine, name, tensor, raw)
    for form, label in PIXELS[:1] if machine.small else PIXELS:
        yield from pictures(machine, form, label)
    yield from pictures_with_a_lora(machine)


def weights(machine: Machine) -> Iterator[tuple[str, Any, Any]]:
    """Yield a random weight in each form: the form's name, the tensor of a manifest, its bytes."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from support.compact_files import FP8
    from support.gguf_files import random_blocks
    from support.packed_files import PACKERS, as_tensor, pack, packed_in, stored_bytes

    from safelight.files.blocks import BLOCKS
    from safelight.files.header import Packing
    from safelight.weights.manifest import ManifestTensor

    width = 256 if machine.small else WIDTH
    for form, block in BLOCKS.items():
        data = random_blocks(form, width * width // block.elements, np.random.default_rng(SEED))
        raw = torch.from_numpy(data).view(-1)
        yield form, ManifestTensor("w", form, (width, width), Path(), 0, raw.numel(), False, ""), raw
    values = torch.randn(width, width, generator=torch.Generator().manual_seed(SEED))
    for form, dtype in FP8.items():
        raw, packing = (values / 4).to(dtype).view(torch.uint8).view(-1), Packing(scale=0.3)
        name = "F8_E4M3" if "e4m3" in form else "F8_E5M2"
        yield form, ManifestTensor("w", name, (width, width), Path(), 0, raw.numel(), False, "", packing=packing), raw
    path = machine.folder / "packed.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    for form in PACKERS:
        packed = pack("layer.weight", values, form)
        if packed is None:
            continue
        save_file(packed[0], path)
        tensor = as_tensor(packed_in(path))
        yield form, tensor, stored_bytes(tensor)
        path.unlink()


def numbers(machine: Machine, name: str, tensor: Any, raw: Any) -> Iterator[Finding]:
    """Dequantise a weight on the device, to fp32 and to bf16, and compare with the host."""
    import torch

    from safelight.weights.block_decoding import dequantise

    place, different = machine.device.torch, 0
    there = raw.to(place)
    figures = dict[str, float]()
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        right, made = torch.empty(tensor.shape, dtype=dtype), torch.empty(tensor.shape, dtype=dtype, device=place)
        dequantise(tensor, raw, right)
        seconds = timed(machine, lambda made=made: dequantise(tensor, there, made))
        different += int((made.cpu().view(bits) != right.view(bits)).sum())
        figures = {"ms": seconds * 1e3, "GB/s": (raw.numel() + made.numel() * made.itemsize) / seconds / GB}
    words = f"{different} numbers differ from the host's" if different else "the host's numbers, bit for bit; to bf16"
    yield Finding(f"{name}, numbers", not different, words, figures)


def timed(machine: Machine, function: Callable[[], object]) -> float:
    """Return the median seconds of a function, after one call that does not count."""
    function()
    machine.wait()
    found: list[float] = []
    for _ in range(2 if machine.small else 7):
        start = time.perf_counter()
        function()
        machine.wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def pictures(machine: Machine, form: str, label: str) -> Iterator[Finding]:
    """A tiny model in a form: the pixels of the same numbers in fp32; quantised in memory, streamed."""
    import pytest
    import torch
    from support.compact_files import add, write_both
    from support.families import tiny_families

    row, place = tiny_families()[label], machine.folder / "forms"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch_of_row:
        row.make_references_small(patch_of_row)
        files = write_both(row, place, form, SEED)
        for name, some in files.items():
            add(place / f"root-{name}", row, some)
        request = row.ask("tiny", precision="bf16")
        with engine(machine, place / "root-fp32") as opened:
            right = next(opened.generate(request)).pixels_sha256
        wrong: list[str] = []
        with engine(machine, place / f"root-{form}") as opened:
            if next(opened.generate(request)).pixels_sha256 != right:
                wrong.append("dequantised in memory")
            whole = resident_bytes(opened)
        with (
            kept_quantised(),
            engine(machine, place / f"root-{form}") as opened,
        ):
            if next(opened.generate(request)).pixels_sha256 != right:
                wrong.append("quantised in memory")
            quantised = resident_bytes(opened)
            [model] = [one for one in opened.library.models() if one.origin == "added"]
            plan = opened.resources.residency.planner
            least = max(plan.min_weight_bytes(part, torch.bfloat16) for part in model.manifest.components)
        limits = machine.weights_within(1.01 * least)
        with engine(machine, place / f"root-{form}", **limits) as opened:
            if next(opened.generate(request)).pixels_sha256 != right:
                wrong.append("streamed")
    words = f"other pixels: {', '.join(wrong)}" if wrong else "the pixels of the same numbers in fp32, three ways"
    figures = {"MB dequantised": whole / 1e6, "MB quantised": quantised / 1e6, "limit MB": 1.01e-6 * least}
    yield Finding(f"{form} of {label}", not wrong, words, figures)


def pictures_with_a_lora(machine: Machine) -> Iterator[Finding]:
    """A tiny SD 1 in Q8_0 with a LoRA: the pixels of the same numbers in fp32, whichever way the LoRA is computed."""
    import torch
    from safetensors.torch import load_file, save_file
    from support.compact_files import write_compact

    from safelight.catalog.catalog import Catalog
    from safelight.request.schema import Request

    place = machine.folder / "lora-forms"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    tensors = {name: one for name, one in load_file(machine.tiny("a")).items() if one.is_floating_point()}
    compact, values = write_compact(place / "compact.safetensors", tensors, "Q8_0")
    save_file(dict(values), place / "numbers.safetensors")
    catalog = Catalog.under(place / "root")
    catalog.library.add(place / "numbers.safetensors", "numbers")
    model = catalog.library.add(compact, "compact")
    catalog.adapters.add(machine.lora(), "style")

    def drawn(opened: Any, name: str) -> list[str]:
        texts = ("an apple", "an apple <lora:style:0.8>", "an apple")
        requests = (Request(text, name, seed=3, steps=2, width=64, height=64, precision="bf16") for text in texts)
        return [next(opened.generate(one)).pixels_sha256 for one in requests]

    wrong: list[str] = []
    with engine(machine, place / "root") as opened:
        right = drawn(opened, "numbers")
        if drawn(opened, "compact") != right:
            wrong.append("dequantised in memory")
    with kept_quantised(), engine(machine, place / "root") as opened:
        if drawn(opened, "compact") != right:
            wrong.append("quantised in memory")
        plan = opened.resources.residency.planner
        least = max(plan.min_weight_bytes(part, torch.bfloat16) for part in model.manifest.components)
    with engine(machine, place / "root", **machine.weights_within(1.01 * least)) as opened:
        if drawn(opened, "numbers") != right:
            wrong.append("streamed")
    if right[0] != right[2] or right[0] == right[1]:
        wrong.append("the LoRA has no effect, or stays")
    words = f"other pixels: {', '.join(wrong)}" if wrong else "the pixels of the same numbers in fp32, three ways"
    yield Finding("Q8_0 of sd1 with a LoRA", not wrong, words)


def resident_bytes(opened: Any) -> int:
    """Return the bytes of the components that are in the memory of the device."""
    place = opened.memory()["places"][opened.resources.residency.place]
    return sum(one["nbytes"] for one in place["resident"])


def kept_quantised() -> contextlib.AbstractContextManager[object]:
    """Within the context, models of any size stay quantised in memory."""
    from safelight.memory.planner import Planner

    def nothing(*_: object) -> int:
        return 0

    return patch.object(Planner, "most_weight_bytes", nothing)


def quantised(machine: Machine) -> Iterator[Finding]:
    """The steps of FLUX.1 with a fifth of its layers: quantised in memory, and the same numbers in bf16."""
    from safelight.request.schema import Request

    bench: Any = importlib.import_module("forms")  # of benchmarks
    whole: Any = importlib.import_module("families")
    folder = machine.folder / "forms-large"
    shutil.rmtree(folder, ignore_errors=True)
    configs = dict(whole.tiny("flux") if machine.small else whole.sizes()["flux"][1])
    if not machine.small:
        configs["transformer"] = whole.narrowed(configs["transformer"], bench.FIFTH)
        configs["text_encoder_2"] = whole.narrowed(configs["text_encoder_2"], {"layers": 2})
    start = time.perf_counter()
    bench.write(folder / "Q4_K", configs, 2)
    bench.as_bf16(folder / "Q4_K", folder / "bf16")
    bench.add(folder / "root-Q4_K", folder / "Q4_K")
    whole.add_files(folder / "root-bf16", folder / "bf16", "dev")
    yield Finding("FLUX.1", None, "a fifth of the layers, random weights", {"s": time.perf_counter() - start})
    size, steps, turns = (64, 2, 2) if machine.small else (1024, 4, 4)
    times: dict[str, list[float]] = {"Q4_K": [], "bf16": []}
    pixels = set[tuple[int, str]]()
    with (
        kept_quantised(),
        engine(machine, folder / "root-Q4_K") as compact,
        engine(machine, folder / "root-bf16") as plain,
    ):
        for turn in range(turns):
            for form, opened in (("Q4_K", compact), ("bf16", plain)):
                [model] = [one for one in opened.library.models() if one.origin == "added"]
                request = Request(
                    "a cat", model.name, steps=steps, seed=turn, width=size, height=size, precision="bf16"
                )
                made = next(opened.generate(request))
                times[form].append(made.seconds.denoise / steps)
                pixels.add((turn, made.pixels_sha256))
    least = {form: min(seconds[1:]) for form, seconds in times.items()}
    figures = {f"{form} s": seconds for form, seconds in least.items()} | {"ratio": least["Q4_K"] / least["bf16"]}
    same = len(pixels) == turns
    words = f"a step of {size} x {size} pixels; {'equal' if same else 'other'} pixels"
    yield Finding("quantised in memory", same, words, figures)
    shutil.rmtree(folder)


def engine(machine: Machine, root: Path, **limits: float) -> Any:
    """Open an engine on the device, with a library of its own.

    The kernel of attention is named: by default each library measures which one is the fastest.
    """
    from safelight.assembly.engine import open_engine
    from safelight.settings_sources import load_settings

    given = {"device": machine.device.name, "attention_type": "torch-sdp", **limits}
    settings = load_settings(root, None, **given)
    return contextlib.closing(open_engine(settings, machine.device))
