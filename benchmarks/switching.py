"""What a switch costs: A, B, A, B, …, side by side with plain diffusers, next to the floor.

``make bench`` runs all of it, each row in a process of its own, one after another, from a warm page cache, and prints
two tables. *floor*: the same bytes through the best read-and-cast loop into resident memory that this script finds
(pread, one and two threads), without hashing, names or modules. A diffusers row drops the old pipeline, collects
garbage, and loads the next. Every page of the new weights is touched within the time.

Predicted before the first run: Safelight within 1.5 times the floor, as hashing adds a sixth and opening, skeletons
and binding some 30 ms; diffusers five times slower in fp32, as it touches new memory for every byte and parses a
tokenizer; Safelight's memory flat from the second switch on, as slabs are reused.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parent / "build/bench"
ROWS = ("floor", "safelight-file", "safelight-folder", "diffusers-pretrained", "diffusers-single-file")


def resident() -> int:
    """Bytes of this process that are resident, without pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def measured(row: str, dtype_name: str, switches: int) -> dict[str, object]:
    """One row: seconds and resident bytes of each switch. The first switch, from nothing, is given apart."""
    rows: dict[str, Callable[[str], Callable[[str], None]]] = {
        "floor": floor,
        "safelight-file": lambda dtype: safelight(dtype, ".safetensors"),
        "safelight-folder": lambda dtype: safelight(dtype, ""),
        "diffusers-pretrained": lambda dtype: diffusers(dtype, single=False),
        "diffusers-single-file": lambda dtype: diffusers(dtype, single=True),
    }
    switch = rows[row](dtype_name)
    seconds, sizes = [], []
    for turn in range(switches + 1):
        start = time.perf_counter()
        switch("AB"[turn % 2])
        seconds.append(time.perf_counter() - start)
        sizes.append(resident())
    return {"first": seconds[0], "seconds": seconds[1:], "resident": sizes}


def floor(dtype_name: str) -> Callable[[str], None]:
    """Read a file's bytes in chunks and cast them into resident memory, on the better of one or two threads."""
    import torch

    goal = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    size = (FOLDER / "A.safetensors").stat().st_size // 2
    target = torch.zeros(size, dtype=goal)
    chunk = 1 << 18
    torch.set_num_threads(1)

    def part(descriptor: int, begin: int, end: int) -> None:
        raw, wide = torch.empty(chunk, dtype=torch.float16), torch.empty(chunk)
        view = memoryview(raw.view(torch.uint8).numpy().data)
        for at in range(begin, end, chunk):
            n = min(chunk, end - at)
            os.preadv(descriptor, [view[: n * 2]], at * 2)
            if goal == torch.bfloat16:
                wide[:n].copy_(raw[:n])
                target[at : at + n].copy_(wide[:n])
            else:
                target[at : at + n].copy_(raw[:n])

    pools = {1: ThreadPoolExecutor(1), 2: ThreadPoolExecutor(2)}

    def run(name: str, threads: int) -> None:
        descriptor = os.open(FOLDER / f"{name}.safetensors", os.O_RDONLY)
        share = -(-size // threads)
        futures = [
            pools[threads].submit(part, descriptor, i * share, min(size, (i + 1) * share)) for i in range(threads)
        ]
        for future in futures:
            future.result()
        os.close(descriptor)

    times = {}
    for threads in pools:
        run("A", threads)
        start = time.perf_counter()
        run("B", threads)
        times[threads] = time.perf_counter() - start
    best = min(times, key=times.__getitem__)
    return lambda name: run(name, best)


def safelight(dtype_name: str, suffix: str) -> Callable[[str], None]:
    """Make every component resident and bind it, with room for one checkpoint only."""
    from safelight.catalog.library import Library
    from safelight.devices.cpu import CPU
    from safelight.memory.budget import HOST, Ledger
    from safelight.memory.residency import Residency
    from safelight.memory.segments import split_into_segments
    from safelight.memory.source import FileSource
    from safelight.models.bind import bind
    from safelight.models.skeleton import SkeletonCache, SkeletonKey
    from safelight.pipeline.resources import TORCH_DTYPES

    dtype = TORCH_DTYPES[dtype_name]
    library = Library(FOLDER / "root")
    models = {name: library.find(str(FOLDER / f"{name}{suffix}") + ("" if suffix else "/")) for name in "AB"}
    one = sum(segment.nbytes for c in models["A"].manifest.components for segment in split_into_segments(c, dtype))
    residency = Residency(CPU(), Ledger({HOST: one}), HOST, FileSource(os.cpu_count() or 1))
    skeletons = SkeletonCache()

    def switch(name: str) -> None:
        model = library.ensure_unchanged(models[name])
        for component in model.manifest.components:
            key = SkeletonKey(model.base, component.role, component.config, dtype, "torch-sdp")
            with residency.lease(component, dtype) as lease, bind(skeletons, key, lease):
                pass

    return switch


def diffusers(dtype_name: str, single: bool) -> Callable[[str], None]:
    """Drop the old pipeline, collect garbage, load the next, and touch every page of its weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import diffusers
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    kept: list[object] = []

    def switch(name: str) -> None:
        kept.clear()
        gc.collect()
        if single:
            pipe = diffusers.StableDiffusionPipeline.from_single_file(
                str(FOLDER / f"{name}.safetensors"), config=str(FOLDER / name), torch_dtype=dtype
            )
        else:
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(FOLDER / name), torch_dtype=dtype)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            for parameter in module.parameters():
                parameter.view(-1)[:: 4096 // parameter.element_size()].sum()
        kept.append(pipe)

    return switch


def warm() -> None:
    """Read all files once, and touch memory, which an idle virtual machine takes seconds to give."""
    for path in (*FOLDER.glob("[AB].safetensors"), *FOLDER.glob("[AB]/*/*.safetensors")):
        with path.open("rb") as file:
            while file.read(16 << 20):
                pass
    subprocess.run([sys.executable, "-c", "bytearray(8 << 30)"], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--dtype", choices=("fp32", "bf16"))
    parser.add_argument("--switches", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measured(arguments.row, arguments.dtype, arguments.switches)))
        return
    subprocess.run([sys.executable, HERE / "checkpoints.py", FOLDER], check=True)
    results: dict[tuple[str, str], dict[str, list[float]]] = {}
    for dtype in ("fp32", "bf16"):
        for row in ROWS:
            warm()
            command = [sys.executable, __file__, "--row", row, "--dtype", dtype, "--switches", str(arguments.switches)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[dtype, row] = json.loads(done.stdout.splitlines()[-1])
    print("| dtype | | median s | min | max | times the floor |\n|---|---|---|---|---|---|")
    for (dtype, row), result in results.items():
        seconds = result["seconds"]
        base = statistics.median(results[dtype, "floor"]["seconds"])
        print(
            f"| {dtype} | {row} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {max(seconds):.3f} "
            f"| {statistics.median(seconds) / base:.2f} |"
        )
    print("\nAnonymous resident memory in GB after the first load and after each switch:\n")
    print("| dtype | | GB |\n|---|---|---|")
    for (dtype, row), result in results.items():
        print(f"| {dtype} | {row} | {' '.join(f'{size / 1e9:.2f}' for size in result['resident'])} |")


if __name__ == "__main__":
    main()
