"""Quantised files: how fast they are dequantised, and large models in the memory that they were made for.

``python benchmarks/forms.py --part decode``: gigabytes per second of each form to bf16 (bytes read and written), beside
gguf's functions, diffusers' functions in fp32, and a copy of as many bytes, each on all threads.

``--part flux``: FLUX.1's published shapes with random weights in Q4_K, with T5-XXL in Q4_K (10 GB of disk): an image of
256x256 with two steps in bf16 under ``max_cache_ram_gb`` 10 and 5: seconds, seconds a step, and the peak of anonymous
memory. The pixels must be equal. With ``--peer``, also stable-diffusion.cpp on the same files, in the environment of
``benchmarks/peers.py``.

``--part step``: the same layout with a fifth of the layers, in Q4_K which stays quantised in memory, in Q4_K with room
to dequantise half of it, and the same numbers in bf16: seconds a step, five images each, interleaved, equal pixels.

``--part lora``: that layout in Q4_K which stays quantised in memory, without an adapter and with a LoRA of rank 16 for
each matrix of its blocks: seconds a step and before the first step, three images each, interleaved.

``--part sdxl``: a checkpoint of SDXL's size in fp16 with all the memory that it needs, and the same one in fp8 (made by
``models compact``) under ``max_cache_ram_gb`` 2, both computed in bf16 (11 GB of disk), interleaved: 1024x1024, which
is SDXL's own size, two steps, three images each; and 512x512, four steps, five images each.

``--tiny`` takes the tests' tiny settings in place of the published ones, for a trial. The files are removed afterwards.

Predicted: decode, 5 GB/s for Q4_K, Q8_0 and fp8, a fifth of a copy; flux, peaks of 0.5 GB above the limits, and a step
that takes as long as in bf16 plus 3 s to dequantise; step, 1.25 times as long in Q4_K as in bf16, and 1.12 times with
half of it dequantised; lora, 1.3 times as long, because it adds to 2 billion numbers, at 1 to 2 billion a second; sdxl,
1.5 times as long under 2 GB, because each step brings 2.6 GB from the page cache, at 5 GB/s.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import numpy as np
import peers
import torch
from families import add_files, engine, narrowed, print_rows, sizes, tiny, write_file
from safetensors.torch import save_file

from safelight.catalog.catalog import Catalog
from safelight.families.components import Config
from safelight.files.blocks import BLOCKS
from safelight.files.header import Packing
from safelight.request.results import Seconds
from safelight.request.schema import Request
from safelight.weights.block_decoding import dequantise
from safelight.weights.file_names import in_original_names
from safelight.weights.manifest import ManifestTensor

FOLDER = families.FOLDER.with_name("forms")
QUANTISED = ("transformer", "text_encoder_2")
POOL_BYTES = 128 << 20
"""Bytes of the blocks that the weights of a file are taken from, each tensor at its own place."""

NUMBERS = 1 << 26
"""Numbers that ``--part decode`` dequantises at a time: more bytes than a processor's caches hold."""

FIFTH = {"layers": 5, "single_layers": 5}
RANK = 16


def in_files(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of a component's tensors in a file that the peers read, too."""
    rows = list(config.published.rows())
    if config.architecture == "t5":
        return [(row.name, row.shape) for row in rows]
    return [(tensor.name, tensor.shape) for tensor in in_original_names(rows)]


def write_gguf(path: Path, config: Config, seed: int) -> None:
    """Write a component as a GGUF file: matrices in Q4_K, norms near one, biases near zero."""
    from gguf import GGUFWriter
    from support.gguf_files import kind_of, random_blocks

    generator, block = np.random.default_rng(seed), BLOCKS["Q4_K"]
    rows = in_files(config)
    most = max(math.prod(shape) for _, shape in rows) // block.elements
    pool = random_blocks("Q4_K", max(most, 1), generator, size=0.06).reshape(-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "any")
    for name, shape in rows:
        count = math.prod(shape)
        if len(shape) == 2 and shape[1] % block.elements == 0:
            nbytes = count // block.elements * block.nbytes
            first = int(generator.integers(0, (len(pool) - nbytes) // block.nbytes + 1)) * block.nbytes
            data = pool[first : first + nbytes].reshape(shape[0], -1)
            writer.add_tensor(name, data, raw_dtype=kind_of("Q4_K"))
        else:
            values = generator.normal(0, 0.02, shape).astype(np.float32)
            is_scale = len(shape) == 1 and not name.endswith("bias")
            writer.add_tensor(name, values + 1 if is_scale else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(folder: Path, configs: Mapping[str, Config], number: int) -> None:
    """Write a model as ComfyUI has it: the denoiser and T5 in GGUF, the others in bf16."""
    for index, (role, config) in enumerate(configs.items()):
        place = {"transformer": "diffusion_models", "vae": "vae"}.get(role, "text_encoders")
        if role in QUANTISED:
            write_gguf(folder / place / f"{role}.gguf", config, number * 10 + index)
        else:
            write_file(folder / place / f"{role}.safetensors", config, number * 10 + index, original=True)


def decode(small: bool) -> list[dict[str, Any]]:
    """Time the dequantising of each form, and a copy."""
    from diffusers.quantizers.gguf import utils
    from gguf.quants import dequantize
    from support.gguf_files import kind_of, random_blocks

    numbers = NUMBERS >> 8 if small else NUMBERS
    source = torch.randint(0, 255, (numbers,), dtype=torch.uint8)
    target = torch.empty_like(source)
    rows = list[dict[str, Any]]()
    for form in (*BLOCKS, "F8_E4M3"):
        if form in BLOCKS:
            block = BLOCKS[form]
            raw = random_blocks(form, numbers // block.elements, np.random.default_rng(1))
            theirs: Any = utils.dequantize_functions.get(kind_of(form))
            packing = None
        else:
            packing = Packing(scale=0.5)
            raw, theirs = np.random.default_rng(1).integers(0, 120, (numbers, 1), dtype=np.uint8), None
        tensor = ManifestTensor("w", form, (numbers,), Path(), 0, raw.nbytes, False, "", packing=packing)
        data = torch.from_numpy(raw)
        moved = raw.nbytes + 2 * numbers
        row: dict[str, Any] = {"form": form}
        flat = data.view(-1)
        out = torch.empty(numbers, dtype=torch.bfloat16)
        ours, copies = seconds_in_turns(
            lambda tensor=tensor, flat=flat, out=out: dequantise(tensor, flat, out), lambda: target.copy_(source)
        )
        row["GB/s"] = moved / statistics.median(ours) / 1e9
        row["a copy"] = 2 * numbers / statistics.median(copies) / 1e9
        shares = [moved / one / (2 * numbers / other) for one, other in zip(ours, copies, strict=True)]
        row["of a copy"] = statistics.median(shares)
        row["gguf"] = row["diffusers"] = ""
        if form in BLOCKS:
            by_gguf = seconds(lambda raw=raw, form=form: dequantize(raw, kind_of(form)), 1)
            row["gguf"] = moved / by_gguf / 1e9
        if theirs is not None:
            size = BLOCKS[form].elements, BLOCKS[form].nbytes

            def by_theirs(theirs: Any = theirs, data: torch.Tensor = data, size: Any = size) -> object:
                return theirs(data, *size, dtype=torch.float32).bfloat16()

            by_diffusers = seconds(by_theirs, 2)
            row["diffusers"] = moved / by_diffusers / 1e9
        rows.append(row)
    return rows


def seconds_in_turns(
    one: Callable[[], object], other: Callable[[], object], times: int = 15
) -> tuple[list[float], list[float]]:
    """Return the seconds of two functions that run in turns, because what else the machine does changes quickly."""
    pairs = [(seconds(one, 1), seconds(other, 1)) for _ in range(times)]
    return [first for first, _ in pairs], [second for _, second in pairs]


def seconds(function: Callable[[], object], times: int = 5) -> float:
    """Return the median seconds of a function, after one call that does not count."""
    function()
    found: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def flux(small: bool, peer: bool = False) -> list[dict[str, Any]]:
    """Make an image of the published size under two limits, each in a process of its own.

    ``peer``: stable-diffusion.cpp makes one, too, of the same files, which it copies into memory, or maps.
    """
    write(FOLDER / "flux", tiny("flux") if small else sizes()["flux"][1], 1)
    model = add(FOLDER / "root-flux", FOLDER / "flux")
    script, rows = families.HERE / "one_image.py", list[dict[str, Any]]()
    for limit in (10.0, 5.0):
        command = [sys.executable, str(script), str(FOLDER / "root-flux"), model.name, str(limit), "256"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    assert rows[0]["pixels"] == rows[1]["pixels"]
    for way in ("copied", "mapped") if peer else ():
        script = families.HERE / "sdcpp_image.py"
        command = [str(peers.install("sdcpp")), str(script), str(FOLDER / "flux"), "256", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        names = {"limit GB": f"stable-diffusion.cpp, files {way}", "quantised in memory": "", "pixels": ""}
        rows.append({key: found.get(key, names.get(key, "")) for key in rows[0]})
        print(rows[-1], found, flush=True)
    return rows


def add(root: Path, folder: Path) -> Any:
    """Add the files of :func:`write` to the library below ``root``, which is empty before."""
    shutil.rmtree(root, ignore_errors=True)
    catalog = Catalog.under(root)
    for path in sorted(folder.glob("[tv]*/*.*")):
        catalog.adapters.add(path)
    return catalog.library.add(folder / "diffusion_models/transformer.gguf", "a", variant="dev")


def step(small: bool) -> list[dict[str, Any]]:
    """Time the steps of a model that stays quantised in memory, and of the same numbers in bf16."""
    configs = dict(tiny("flux") if small else sizes()["flux"][1])
    if not small:
        configs["transformer"] = narrowed(configs["transformer"], FIFTH)
        configs["text_encoder_2"] = narrowed(configs["text_encoder_2"], {"layers": 12})
    write(FOLDER / "step", configs, 2)
    as_bf16(FOLDER / "step", FOLDER / "bf16")
    models = {
        "Q4_K": add(FOLDER / "root-q4", FOLDER / "step"),
        "bf16": add_files(FOLDER / "root-bf16", FOLDER / "bf16", "dev"),
    }
    whole = 2 * sum(math.prod(row.shape) for row in configs["transformer"].rows())
    # As large as the files, and with room for half of the transformer's numbers in bf16.
    stored = 1.03 * sum(path.stat().st_size for path in (FOLDER / "step").rglob("*.*"))
    quantised = (FOLDER / "step/diffusion_models/transformer.gguf").stat().st_size
    half = stored + (whole - quantised) / 2
    # The tests' tiny models need more than their size, because of the ring's slots.
    limits = {"Q4_K": stored, "half": half, "bf16": whole * 1.3 + 3 * 2**30}
    engines = {
        name: engine(
            FOLDER / ("root-bf16" if name == "bf16" else "root-q4"),
            precision="bf16",
            max_cache_ram_gb=0.02 if small and name != "bf16" else limit / 2**30,
        )
        for name, limit in limits.items()
    }
    models["half"] = models["Q4_K"]
    times: dict[str, list[float]] = {name: [] for name in engines}
    pixels = set[str]()
    for number in range(6):
        for name, made in engines.items():
            request = Request(f"a cat {number}", models[name].name, steps=2, width=256, height=256, precision="bf16")
            drawn = next(made.generate(request))
            times[name].append(drawn.seconds.denoise / 2)
            pixels.add(f"{number} {drawn.pixels_sha256}")
    assert len(pixels) == 6
    rows = list[dict[str, Any]]()
    for name, limit in limits.items():
        ratios = [one / other for one, other in zip(times[name][1:], times["bf16"][1:], strict=True)]
        forms = [why for role, why in engines[name].memory()["forms"].items() if role.startswith("transformer")]
        rows.append(
            {
                "transformer": "".join(forms).partition(":")[0] or name,
                "parameters in millions": whole / 2e6,
                "limit GB": limit / 2**30,
                "a step s": statistics.median(times[name][1:]),
                "ratio": statistics.median(ratios),
                "most": max(ratios),
            }
        )
    return rows


def lora(small: bool) -> list[dict[str, Any]]:
    """Time the steps of a model that stays quantised in memory, without an adapter and with a LoRA."""
    configs = dict(tiny("flux") if small else sizes()["flux"][1])
    if not small:
        configs["transformer"] = narrowed(configs["transformer"], FIFTH)
        configs["text_encoder_2"] = narrowed(configs["text_encoder_2"], {"layers": 12})
    write(FOLDER / "lora", configs, 2)
    model = add(FOLDER / "root-lora", FOLDER / "lora")
    generator, tensors = torch.Generator().manual_seed(3), dict[str, torch.Tensor]()
    for row in configs["transformer"].rows():
        if len(row.shape) == 2 and "blocks." in row.name:
            module = "transformer." + row.name.removesuffix(".weight")
            for part, shape in (("lora_A", (RANK, row.shape[1])), ("lora_B", (row.shape[0], RANK))):
                tensors[f"{module}.{part}.weight"] = (torch.randn(shape, generator=generator) * 0.01).bfloat16()
    save_file(tensors, FOLDER / "style.safetensors")
    catalog = Catalog.under(FOLDER / "root-lora")
    catalog.adapters.add(FOLDER / "style.safetensors", "style")
    stored = 1.03 * sum(path.stat().st_size for path in (FOLDER / "lora").rglob("*.*"))
    adapter = 4 * sum(one.numel() for one in tensors.values())
    limit = 0.03 if small else (stored + 1.1 * adapter) / 2**30
    made = engine(FOLDER / "root-lora", precision="bf16", max_cache_ram_gb=limit)
    kinds = {"none": "a cat", f"LoRA, rank {RANK}": "a cat <lora:style:{strength}>"}
    drawn: dict[str, list[Seconds]] = {name: [] for name in kinds}
    for number in range(4):
        for name, prompt in kinds.items():
            # Each strength is new, so nothing of an earlier image can be used.
            text = prompt.format(strength=0.5 + number / 10)
            request = Request(text, model.name, steps=2, width=256, height=256, precision="bf16")
            drawn[name].append(next(made.generate(request)).seconds)
    steps = {name: [one.denoise / 2 for one in found[1:]] for name, found in drawn.items()}
    return [
        {
            "adapter": name,
            "limit GB": limit,
            "a step s": statistics.median(found),
            "switch s": statistics.median(one.switch for one in drawn[name][1:]),
            "ratio": statistics.median(one / other for one, other in zip(found, steps["none"], strict=True)),
        }
        for name, found in steps.items()
    ]


def sdxl(small: bool) -> list[dict[str, Any]]:
    """Draw with a checkpoint in fp16 with much memory, and with its fp8 file under 2 GB, in turns."""
    from checkpoints import write_sdxl

    from safelight.assembly import compacting

    root = FOLDER / "root-sdxl"
    library = Catalog.under(root).library
    if small:
        from safelight.catalog.starters import models

        whole = next(one for one in models() if one.base == "sd1")
    else:
        FOLDER.mkdir(parents=True)
        write_sdxl(FOLDER)
        [path] = FOLDER.glob("*.safetensors")
        whole = library.add(path, "whole")
    _, compact = compacting.make(library, whole, "fp8", FOLDER / "small.safetensors")
    # The tests' tiny models need more than their size, because of the ring's slots.
    limits = {whole.name: 12.0, compact.name: 0.1 if small else 2.0}
    engines = {name: engine(root, precision="bf16", max_cache_ram_gb=limit) for name, limit in limits.items()}
    rows = list[dict[str, Any]]()
    for side, steps, count in ((128, 2, 2),) if small else ((1024, 2, 3), (512, 4, 5)):
        times: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(count + 1):
            for name, made in engines.items():
                request = Request(f"a cat {number}", name, steps=steps, width=side, height=side, precision="bf16")
                times[name].append(next(made.generate(request)).seconds.denoise / steps)
        ratios = [one / other for one, other in zip(times[compact.name][1:], times[whole.name][1:], strict=True)]
        rows += [
            {
                "size": f"{side}x{side}",
                "file": name,
                "limit GB": limits[name],
                "a step s": statistics.median(times[name][1:]),
                "peak GB": engines[name].memory()["places"]["host"]["peak"] / 1e9,
                "ratio": statistics.median(ratios) if name == compact.name else 1.0,
            }
            for name in engines
        ]
    return rows


def as_bf16(source: Path, target: Path) -> None:
    """Write the numbers of a model's GGUF files in bf16, and copy its other files."""
    from safetensors.torch import save_file

    from safelight.files.gguf import read_header

    for path in source.glob("*/*.*"):
        copy = (target / path.relative_to(source)).with_suffix(".safetensors")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            shutil.copy(path, copy)
            continue
        tensors: dict[str, torch.Tensor] = {}
        with path.open("rb") as file:
            for name, info in read_header(path).tensors.items():
                file.seek(info.offset)
                raw = torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch.uint8)
                stored = ManifestTensor(name, info.dtype, info.shape, path, 0, info.nbytes, False, "")
                tensors[name] = torch.empty(info.shape, dtype=torch.bfloat16)
                dequantise(stored, raw, tensors[name])
        save_file(tensors, copy, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("decode", "flux", "step", "lora", "sdxl"), required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peer", action="store_true", help="with --part flux: also stable-diffusion.cpp (ten minutes)")
    arguments = parser.parse_args()
    if arguments.peer and arguments.part != "flux":
        parser.error("--peer is for --part flux")
    parts = {"decode": decode, "flux": flux, "step": step, "lora": lora, "sdxl": sdxl}
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        print_rows(flux(arguments.tiny, True) if arguments.peer else parts[arguments.part](arguments.tiny))
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
