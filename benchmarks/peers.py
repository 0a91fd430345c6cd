"""The peers on the same files: InvokeAI's own model cache and loaders, and stable-diffusion.cpp, beside Safelight.

``make bench-peers`` makes a virtual environment for each under ``build/peers`` (InvokeAI takes 7 GB of disk, and
stable-diffusion.cpp ten minutes to build), then measures, each row in a process of its own, one after another, from a
warm page cache: seconds a switch for A, B, A, B, …, checkpoints of SD 1.5's size, and the most anonymous memory
meanwhile. diffusers is in ``benchmarks/switching.py``; its offloading (``enable_model_cpu_offload``,
``enable_sequential_cpu_offload``) asks for an accelerator, and what it says without one is printed here.

InvokeAI loads in fp32 on a CPU. *fits* gives it room for both checkpoints, *one* a limit of 6 GiB, in which one fits.
Every page of the new weights is touched within the time, for all alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"
FOLDER = BUILD / "bench"
VENVS = BUILD / "peers"

INSTALLS = {
    "invokeai": [
        ["torch==2.14.1", "torchvision==0.29.1"],
        ["--prefer-binary", "torch==2.14.1", "torchvision==0.29.1", "invokeai==6.14.2", "setuptools<81"],
    ],
    "sdcpp": [["stable-diffusion-cpp-python==0.4.7", "psutil", "numpy"]],
}
ROWS = {
    "safelight fp32": ("", "safelight", "fp32"),
    "safelight bf16": ("", "safelight", "bf16"),
    "InvokeAI, both fit": ("invokeai", "invokeai", "14"),
    "InvokeAI, one fits": ("invokeai", "invokeai", "6"),
    "stable-diffusion.cpp, fp16": ("sdcpp", "sdcpp", ""),
    "diffusers, model offload": ("", "offload", "enable_model_cpu_offload"),
    "diffusers, sequential offload": ("", "offload", "enable_sequential_cpu_offload"),
}


def anonymous(field: str = "RssAnon") -> int:
    """Bytes of anonymous memory. With ``VmRSS``, also those of files that are mapped into memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def measured(switch: Callable[[str], None], switches: int) -> dict[str, object]:
    most, mapped, stop = [0], [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.003):
            most[0], mapped[0] = max(most[0], anonymous()), max(mapped[0], anonymous("VmRSS"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    seconds = []
    for turn in range(switches + 2):
        start = time.perf_counter()
        switch("AB"[turn % 2])
        seconds.append(time.perf_counter() - start)
    stop.set()
    watcher.join()
    times = {"median": statistics.median(seconds[2:]), "most": max(seconds[2:])}
    return {**times, "peak": most[0], "with_files": mapped[0], "end": anonymous()}


def touch(module: object) -> None:
    for tensor in module.state_dict().values():  # type: ignore[attr-defined]
        if tensor.is_floating_point():
            tensor.view(-1)[:: 4096 // tensor.element_size()].sum()


def safelight(dtype: str) -> Callable[[str], None]:
    from switching import safelight as made

    return made(dtype, ".safetensors")


def invokeai_cache(limit: str, folder: Path = FOLDER) -> tuple[Any, Any, dict[str, Any]]:
    """InvokeAI's settings, its model cache of ``limit`` gigabytes, and its configurations of the checkpoints A and B in
    ``folder``."""
    os.environ.setdefault("INVOKEAI_ROOT", str(VENVS / "invokeai-root"))
    import logging

    import torch
    from invokeai.app.services.config.config_default import get_config  # type: ignore[import-not-found]

    settings = get_config()
    settings.device = "cpu"
    settings.max_cache_ram_gb = float(limit)
    import invokeai.backend.model_manager.load.model_loaders.stable_diffusion  # type: ignore[import-not-found]
    import invokeai.backend.model_manager.load.model_loaders.vae  # type: ignore[import-not-found] # noqa: F401
    from invokeai.backend.model_manager.configs.factory import ModelConfigFactory  # type: ignore[import-not-found]
    from invokeai.backend.model_manager.load.model_cache.model_cache import ModelCache  # type: ignore[import-not-found]
    from invokeai.backend.model_manager.load.model_cache.ram_budget import RamBudget  # type: ignore[import-not-found]
    from invokeai.backend.model_manager.load.model_cache.shared_cpu_weights import (  # type: ignore[import-not-found]
        SharedCpuWeightsStore,
    )

    log = logging.getLogger("peers")
    log.setLevel(logging.ERROR)
    store = SharedCpuWeightsStore()
    store.enable_shell_capture = False
    cache = ModelCache(
        execution_device_working_mem_gb=3,
        enable_partial_loading=settings.enable_partial_loading,
        keep_ram_copy_of_weights=settings.keep_ram_copy_of_weights,
        max_ram_cache_size_gb=float(limit),
        max_vram_cache_size_gb=None,
        execution_device=torch.device("cpu"),
        storage_device="cpu",
        logger=log,
        shared_cpu_weights=store,
    )
    cache.set_ram_budget(RamBudget(max_bytes=cache.local_ram_cache_size_bytes, shared_store=store))
    return settings, cache, {n: ModelConfigFactory.from_model_on_disk(str(folder / n)).config for n in "AB"}


def invokeai(limit: str) -> Callable[[str], None]:
    import logging

    import torch
    from invokeai.backend.model_manager.load import ModelLoaderRegistry  # type: ignore[import-not-found]
    from invokeai.backend.model_manager.taxonomy import SubModelType  # type: ignore[import-not-found]

    settings, cache, configs = invokeai_cache(limit)
    log = logging.getLogger("peers")
    parts = (
        SubModelType.Tokenizer,
        SubModelType.TextEncoder,
        SubModelType.Scheduler,
        SubModelType.UNet,
        SubModelType.VAE,
    )

    def switch(name: str) -> None:
        for part in parts:
            kind, config, sub = ModelLoaderRegistry.get_implementation(configs[name], part)
            loaded = kind(app_config=settings, logger=log, ram_cache=cache).load_model(config, sub)
            with loaded.model_on_device() as (_, module):
                if isinstance(module, torch.nn.Module):
                    touch(module)

    return switch


def sdcpp(_: str) -> Callable[[str], None]:
    import stable_diffusion_cpp  # type: ignore[import-not-found]

    kept: list[object] = []

    def switch(name: str) -> None:
        if kept:
            kept.pop().close()  # type: ignore[attr-defined]
            gc.collect()
        path = str(FOLDER / f"{name}.safetensors")
        kept.append(stable_diffusion_cpp.StableDiffusion(model_path=path, n_threads=2, verbose=False))

    return switch


def offload(method: str) -> Callable[[str], None]:
    import diffusers

    def switch(name: str) -> None:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(FOLDER / name))
        getattr(pipe, method)()

    return switch


def install(venv: str) -> Path:
    home = VENVS / venv
    if not (home / ".done").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        environment = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        for wanted in INSTALLS[venv]:
            subprocess.run([home / "bin/pip", "install", "--quiet", *wanted], check=True, env=environment)
        (home / ".done").touch()
    return home / "bin/python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--switches", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.row:
        _, function, argument = ROWS[arguments.row]
        print(json.dumps(measured(globals()[function](argument), arguments.switches)))
        return
    subprocess.run([sys.executable, HERE / "checkpoints.py", FOLDER], check=True)
    print("| | median s a switch | most s | peak GB | GB at the end |\n|---|---|---|---|---|")
    for row, (venv, _, _) in ROWS.items():
        python = install(venv) if venv else Path(sys.executable)
        for path in (*FOLDER.glob("[AB].safetensors"), *FOLDER.glob("[AB]/*/*.safetensors")):
            with path.open("rb") as file:
                while file.read(16 << 20):
                    pass
        subprocess.run([sys.executable, "-c", "bytearray(8 << 30)"], check=False)
        command = [python, __file__, "--row", row, "--switches", str(arguments.switches)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            print(f"| {row} | {' '.join(done.stderr.strip().splitlines()[-1:])[:200]} | | | |", flush=True)
            continue
        got = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {row} | {got['median']:.3f} | {got['most']:.3f} | {got['peak'] / 1e9:.2f} | {got['end'] / 1e9:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
