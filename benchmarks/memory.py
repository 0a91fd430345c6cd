"""What memory costs: switching when both fit, generating when a model does not, copying behind computing, and growth.

``make bench`` runs it after ``benchmarks/switching.py``, each row in a process of its own. Rows:

- *both fit*: from the lease to the bound model, checkpoints of SD 1.5's size, A, B, A, B; no bytes move.
- *a quarter*: SD 1.5's size, bf16, 256×256, 4 steps, all resident against a quarter of the model in memory.
- *sdxl*: SDXL's size, bf16, 512×512, 2 steps, without a limit against ``max_cache_ram_gb: 2`` (only with ``--sdxl``).
- *overlap*: the simulated accelerator, whose copies take about as long as computing; the aim is the longer of the two.
- *slope*: bytes of anonymous memory a switch, over switches 200 to 2,000 between the starters, with room for one.
- *process*: a new process for each switch, from one that has imported everything.

Predicted before the first run: both fit, under 30 ms, as Python handles 1,100 parameters; a quarter, 1.3 times as long,
as 1.6 GB are read and cast at each step at about 5 GB/s; sdxl, 1.4 times; overlap, 1.1 times the longer; slope, none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE.parent / "build/bench"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Peak:
    """The most anonymous memory of this process while a context lasts, in bytes."""

    def __enter__(self) -> Peak:
        from safelight.devices import machine

        self._look = machine.anonymous_bytes
        self.most = self._look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.003):
            self.most = max(self.most, self._look())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def engine(**settings: Any) -> Any:
    from safelight.assembly.engine import open_engine
    from safelight.settings_sources import load_settings

    return open_engine(load_settings(FOLDER / "root", **settings))


def bind_all(made: Any, model: Any) -> float:
    """Seconds from asking for a model's components to having each bound, one after another."""
    from safelight.models.bind import bind
    from safelight.models.skeleton import SkeletonKey
    from safelight.pipeline.resources import dtype_of

    total = 0.0
    for component in model.manifest.components:
        dtype = dtype_of(made.resources.run_settings, model.family, component.role)
        key = SkeletonKey(model.base, component.role, component.config, dtype, "torch-sdp")
        start = time.perf_counter()
        with made.resources.residency.lease(component, dtype) as lease, bind(made.resources.skeletons, key, lease):
            total += time.perf_counter() - start
    return total


def both_fit() -> dict[str, Any]:
    made = engine(precision="bf16")
    models = [made.library.find(str(FOLDER / f"{name}.safetensors")) for name in "AB"]
    for model in models * 2:
        bind_all(made, model)
    stored = made.memory()["places"]["host"]["stored"]
    seconds = [bind_all(made, models[turn % 2]) for turn in range(20)]
    assert made.memory()["places"]["host"]["stored"] == stored
    return {"median ms from lease to bound": statistics.median(seconds) * 1e3, "most ms": max(seconds) * 1e3}


def generation(name: str, size: int, steps: int, **settings: Any) -> dict[str, float | str]:
    import safelight

    made = engine(precision="bf16", **settings)
    model = str(FOLDER / f"{name}.safetensors")
    request = safelight.Request("a cat", model, steps=steps, width=size, height=size)
    next(made.generate(safelight.Request("a cat", model, steps=1, width=64, height=64)))
    made.close()
    start = time.perf_counter()
    with Peak() as peak:
        image = next(made.generate(request))
    seconds = image.seconds
    return {
        "seconds": time.perf_counter() - start,
        "denoise": seconds.denoise,
        "switch": seconds.switch,
        "peak GB": peak.most / 1e9,
        "pixels": image.pixels_sha256[:16],
    }


def against(name: str, size: int, steps: int, limit: float) -> dict[str, Any]:
    """Unlimited and limited, in two processes; the page cache is warm in both."""
    rows = {}
    for label, gigabytes in (("all", 0.0), ("limited", limit)):
        command = [sys.executable, __file__, "--generate", name, str(size), str(steps), str(gigabytes)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[label] = json.loads(done.stdout.splitlines()[-1])
    assert rows["all"]["pixels"] == rows["limited"]["pixels"]
    return {
        "all resident s": rows["all"]["seconds"],
        f"limit {limit} GB s": rows["limited"]["seconds"],
        "ratio": rows["limited"]["seconds"] / rows["all"]["seconds"],
        "denoising ratio": rows["limited"]["denoise"] / rows["all"]["denoise"],
        "peak GB all": rows["all"]["peak GB"],
        "peak GB limited": rows["limited"]["peak GB"],
    }


def overlap(even: bool) -> dict[str, Any]:  # noqa: PLR0915
    """Everything streamed through the simulated accelerator: copying alone, computing alone, both.

    ``even``: sixteen equal layers, which shows the mechanism; else SD 1.5's UNet at 256×256, whose deep blocks have
    most of the bytes and little of the computing, so that some waiting is in its nature.
    """
    import torch
    from torch import nn

    from safelight.catalog.library import Library
    from safelight.devices.cpu import CPU
    from safelight.devices.simulated import Simulated
    from safelight.devices.transfer import Transfers, checksum_of
    from safelight.devices.verification import Verification
    from safelight.memory.budget import HOST, Ledger
    from safelight.memory.host_source import HostSource
    from safelight.memory.lease import Use
    from safelight.memory.residency import Residency
    from safelight.memory.segments import split_into_segments
    from safelight.memory.source import FileSource
    from safelight.models.bind import bind
    from safelight.models.skeleton import SkeletonCache, SkeletonKey, build
    from safelight.weights.manifest import ComponentManifest, ManifestTensor

    # One core computes, as an accelerator would by itself; the other is left to the copies.
    torch.set_num_threads(1)
    dtype = torch.bfloat16
    component = Library(FOLDER / "root").find(str(FOLDER / "A.safetensors")).manifest.component("unet")
    inputs = (torch.randn(2, 4, 32, 32).to(dtype), torch.tensor(500), torch.randn(2, 77, 768).to(dtype))
    make = build
    if even:
        width, count, path = 3072, 16, FOLDER / "even"
        weight = torch.randn(width, width).div(width**0.5).to(dtype)
        data = weight.view(torch.uint8).numpy().tobytes()
        path.write_bytes(data)
        tensors = tuple(
            ManifestTensor(f"{n}.weight", "BF16", (width, width), path, 0, len(data), False, checksum_of(weight))
            for n in range(count)
        )
        component = ComponentManifest("unet", component.config, tensors, "even")
        inputs = (torch.randn(192, width).to(dtype),)

        def make(key: SkeletonKey) -> nn.Module:  # noqa: ARG001
            with torch.device("meta"):
                layers = [nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(count)]
                return nn.Sequential(*layers).requires_grad_(False)

    size = sum(segment.nbytes for segment in split_into_segments(component, dtype))
    largest = max(segment.nbytes for segment in split_into_segments(component, dtype))

    def run(bandwidth: float | None, budget: int, compute: bool) -> float:
        device = Simulated(nbytes=8 << 30, bandwidth=bandwidth, staging_buffer_bytes=8 << 20)
        ledger = Ledger({HOST: 16 << 30, device.name: budget})
        host = Residency(CPU(), ledger, HOST, FileSource(2))
        there = Residency(device, ledger, device.name, HostSource(host, Transfers(device, Verification("off")), True))
        key = SkeletonKey("sd1", "unet", component.config, dtype, "torch-sdp", device.torch)
        moved = [value.to(device.torch) for value in inputs]
        seconds = []
        with (
            there.lease(component, dtype, Use(forward_passes=5)) as lease,
            bind(SkeletonCache(build=make), key, lease) as module,
            torch.no_grad(),
        ):
            for _ in range(4):
                start = time.perf_counter()
                if compute:
                    module(*moved)
                else:
                    for segment in lease.segments:
                        with lease.use_tensors([segment.tensors[0].name]):
                            pass
                seconds.append(time.perf_counter() - start)
        device.close()
        return min(seconds[1:])

    computing = run(None, size * 2, True)
    bandwidth = size / computing
    copying = run(bandwidth, largest * 3, False)
    both = run(bandwidth, largest * 3, True)
    longer = max(computing, copying)
    return {"computing s": computing, "copying s": copying, "both s": both, "times the longer": both / longer}


def slope() -> dict[str, Any]:
    """Least squares over switches 200 to 2,000, with the interval of two standard errors."""
    import gc

    import numpy as np

    from safelight.devices import machine

    made = engine(max_cache_ram_gb=0.07)
    names = ("starter-noto", "starter-twemoji", "starter-fluent")
    models = [made.library.get(name) for name in names]
    at, sizes = [], []
    for turn in range(2001):
        bind_all(made, models[turn % 3])
        if turn >= 200 and turn % 20 == 0:
            gc.collect()
            machine.trim_allocator()
            at.append(turn)
            sizes.append(machine.anonymous_bytes())
    x, y = np.array(at, float), np.array(sizes, float)
    (rate, start), covariance = np.polyfit(x, y, 1, cov=True)
    del start
    error = 2 * float(covariance[0][0]) ** 0.5
    return {"bytes a switch": float(rate), "plus or minus": error, "MB at 200": y[0] / 1e6, "MB at 2000": y[-1] / 1e6}


def process() -> dict[str, Any]:
    """A new process for each switch: forked from one that has imported everything and holds no model."""
    made = engine(precision="bf16")
    models = [made.library.find(str(FOLDER / f"{name}.safetensors")) for name in "AB"]
    seconds = []
    for turn in range(6):
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            bind_all(made, models[turn % 2])
            os._exit(0)
        os.waitpid(child, 0)
        seconds.append(time.perf_counter() - start)
    return {"median s a switch": statistics.median(seconds), "most s": max(seconds)}


ROWS = {
    "both fit": both_fit,
    "a quarter": lambda: against("A", 256, 4, 0.53),
    "sdxl": lambda: against("XL", 512, 2, 2.0),
    "overlap, equal layers": lambda: overlap(even=True),
    "overlap, UNet": lambda: overlap(even=False),
    "slope": slope,
    "process": process,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--sdxl", action="store_true")
    parser.add_argument("--generate", nargs=4, metavar=("NAME", "SIZE", "STEPS", "GB"))
    arguments = parser.parse_args()
    if arguments.generate:
        name, size, steps, gigabytes = arguments.generate
        settings = {"max_cache_ram_gb": float(gigabytes)} if float(gigabytes) else {}
        print(json.dumps(generation(name, int(size), int(steps), **settings)))
        return
    if arguments.row:
        print(json.dumps(ROWS[arguments.row]()))
        return
    extra = ["--sdxl"] if arguments.sdxl else []
    subprocess.run([sys.executable, HERE / "checkpoints.py", FOLDER, *extra], check=True)
    print("| what | | |\n|---|---|---|")
    for row in ROWS:
        if row == "sdxl" and not arguments.sdxl:
            continue
        for path in FOLDER.glob("XL.safetensors" if row == "sdxl" else "[AB].safetensors"):
            with path.open("rb") as file:
                while file.read(16 << 20):
                    pass
        command = [sys.executable, __file__, "--row", row]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        for name, value in json.loads(done.stdout.splitlines()[-1]).items():
            print(f"| {row} | {name} | {value:.3f} |", flush=True)


if __name__ == "__main__":
    main()
