"""Switches between Z-Image and FLUX.2 klein in InvokeAI's own model cache and loaders, beside Safelight.

Both models are diffusers folders in bf16 with a quarter of their layers. They have the same Qwen3-4B, with a quarter of
its ``intermediate_size`` (``shared_models`` of ``benchmarks/families.py``). Each row runs in a process of its own, one
after another, from a warm page cache, with A, B, A, B, …: seconds a switch, and the most memory meanwhile, without and
with the files that are mapped into memory, as InvokeAI does. A switch loads each text encoder, transformer and VAE and
touches every page. *both fit* and *one fits* say for how many models there is room.

InvokeAI 6.14.2 needs 7 GB of disk; ``benchmarks/peers.py`` installs it. ``--python`` names an environment that has it.
``--tiny`` takes the tests' tiny settings in place of the published ones, and measures Safelight alone, for a trial.

Predicted: with room for both, both programs switch in a tenth of a second. With room for one, InvokeAI loads all of it
again, 2 to 3 s, and Safelight all but the text encoder, half of that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peers

FOLDER = peers.FOLDER / "peer-families"
ROWS = {
    "Safelight, both fit": ("safelight", 2.1),
    "Safelight, one fits": ("safelight", 1.1),
    "InvokeAI, both fit": ("invokeai", 2.1),
    "InvokeAI, one fits": ("invokeai", 1.1),
}
"""For each row the program, and its memory limit as a multiple of the larger model."""


def safelight(limit_bytes: float) -> Callable[[str], None]:
    """Return a function that makes every component of a model resident and binds it."""
    import torch

    from safelight.catalog.library import Library
    from safelight.devices.cpu import CPU
    from safelight.memory.budget import HOST, Ledger
    from safelight.memory.residency import Residency
    from safelight.memory.source import FileSource
    from safelight.models.bind import bind
    from safelight.models.skeleton import SkeletonCache, SkeletonKey

    library = Library(FOLDER / "root")
    models = {name: library.get(name) for name in "AB"}
    residency = Residency(CPU(), Ledger({HOST: int(limit_bytes)}), HOST, FileSource(os.cpu_count() or 1))
    skeletons = SkeletonCache()

    def switch(name: str) -> None:
        model = library.ensure_unchanged(models[name])
        for component in model.manifest.components:
            key = SkeletonKey(model.base, component.role, component.config, torch.bfloat16, "torch-sdp")
            with residency.lease(component, torch.bfloat16) as lease, bind(skeletons, key, lease):
                pass

    return switch


def invokeai(limit_bytes: float) -> Callable[[str], None]:
    """Return a function that loads every component of a model through InvokeAI's registry and touches it."""
    import logging

    # Registers the loaders.
    import invokeai.backend.model_manager.load.model_loaders.flux  # type: ignore[import-not-found]
    import invokeai.backend.model_manager.load.model_loaders.z_image  # type: ignore[import-not-found] # noqa: F401
    from invokeai.backend.model_manager.load import ModelLoaderRegistry  # type: ignore[import-not-found]
    from invokeai.backend.model_manager.taxonomy import SubModelType  # type: ignore[import-not-found]

    settings, cache, configs = peers.invokeai_cache(str(limit_bytes / 2**30), FOLDER)
    log = logging.getLogger("peers")

    def switch(name: str) -> None:
        for part in (SubModelType.TextEncoder, SubModelType.Transformer, SubModelType.VAE):
            kind, config, sub = ModelLoaderRegistry.get_implementation(configs[name], part)
            loaded = kind(app_config=settings, logger=log, ram_cache=cache).load_model(config, sub)
            with loaded.model_on_device() as (_, module):
                peers.touch(module)

    return switch


def write(small: bool) -> float:
    """Write both models, add them to a library, and return the bytes of the larger one."""
    # Not above: InvokeAI's environment lacks Safelight.
    import families

    from safelight.catalog.catalog import Catalog

    shutil.rmtree(FOLDER, ignore_errors=True)
    configs = families.shared_models(small)
    library = Catalog.under(FOLDER / "root").library
    for number, (name, size) in enumerate(zip("AB", configs, strict=True), 1):
        folder = families.write_folder(FOLDER / name, families.sizes()[size][0], configs[size], number)
        if number == 2:
            shutil.rmtree(folder / "text_encoder")
            shutil.copytree(FOLDER / "A/text_encoder", folder / "text_encoder")
        library.add(folder, name, variant=families.VARIANTS.get(size, ""))
    return max(2.0 * sum(map(families.parameters, one.values())) for one in configs.values())


def warm() -> None:
    """Read all files, so that the page cache has them."""
    for path in FOLDER.glob("[AB]/*/*.safetensors"):
        with path.open("rb") as file:
            while file.read(16 << 20):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--switches", type=int, default=10)
    parser.add_argument("--python", type=Path, help="of an environment with InvokeAI")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.row:
        switch = globals()[ROWS[arguments.row][0]](arguments.limit)
        print(json.dumps(peers.measured(switch, arguments.switches)))
        return
    try:
        larger = write(arguments.tiny)
        print(f"The larger model has {larger / 1e9:.2f} GB.\n")
        print("| | median s a switch | most s | peak GB | with mapped files |\n|---|---|---|---|---|")
        for row, (program, times) in ROWS.items():
            if program == "invokeai" and arguments.tiny:
                continue
            theirs = program == "invokeai"
            python = (arguments.python or peers.install("invokeai")) if theirs else Path(sys.executable)
            warm()
            # The tests' tiny models have segments that are as large as the models.
            limit = times * larger + (1e9 if arguments.tiny else 0)
            command = [python, __file__, "--row", row, "--limit", str(limit), "--switches", str(arguments.switches)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "INVOKEAI_ROOT": str(FOLDER / "invokeai-root")}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            got = json.loads(done.stdout.splitlines()[-1])
            cells = (f"{got[key]:.3f}" for key in ("median", "most"))
            memory = (f"{got[key] / 1e9:.2f}" for key in ("peak", "with_files"))
            print(f"| {row} | {' | '.join((*cells, *memory))} |", flush=True)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
