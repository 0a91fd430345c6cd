"""Today's families: one denoiser call beside diffusers', what a switch moves, and real sizes in little memory.

``python benchmarks/families.py --part call``: one call of each family's denoiser, narrowed to about 300 million
parameters in fp32, 30 pairs: Safelight's, whose weights are leased and bound, then diffusers' own module with the same
weights and arguments. The ratio's mean, with its 95 % interval.

``--part switch``: Z-Image and FLUX.2 klein 4B with a quarter of their layers, and Qwen3-4B narrowed, A, B, A, B on the
simulated accelerator, which has memory for one of them and their text encoder: bytes moved at each switch, beside the
bytes of all components, which a program without shared components moves. Qwen3 comes once in klein's sharded folder,
once in its own file.

``--part real --size z-image`` (or ``flux``): files of the published size with seeded random weights (20 and 34 GB of
disk, removed afterwards), an image of 256x256 with one step in bf16 under ``max_cache_ram_gb: 6`` and 10: seconds,
the peak of anonymous memory, and whether the pixels are equal.

``--tiny`` takes the tests' tiny settings in place of the published ones, for a trial.

Predicted before the first run: call, a ratio of 1.01, since leasing costs a Python call for each module; switch, the
transformer and the VAE, so half of what a program without shared components moves; real, a peak of 6 GB and what
computing takes, equal pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

# As in Safelight's own processes. OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from memory import Peak
from safetensors.torch import load_file, save_file

from safelight.catalog.catalog import Catalog
from safelight.catalog.model import Model
from safelight.catalog.published import sizes
from safelight.devices.simulated import Simulated
from safelight.families.components import Config
from safelight.families.family import Family
from safelight.families.family_model import construct
from safelight.request.schema import Request
from safelight.weights.file_names import in_original_names

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
FOLDER = HERE.parent / "build/bench/families"
POOL = 1 << 26
"""Random numbers that the weights of a file are taken from, each tensor at its own place."""


def weights(config: Config, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a component's tensors in bf16: small random matrices, norms near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=generator).mul_(0.02).bfloat16()
    for row in config.published.rows():
        count = math.prod(row.shape)
        start = int(torch.randint(0, POOL - min(count, POOL) + 1, (1,), generator=generator))
        values = pool[start : start + count] if count <= POOL else pool.repeat(-(-count // POOL))[:count]
        is_scale = len(row.shape) == 1 and not row.name.endswith("bias")
        yield row.name, ((values + 1) if is_scale else values).reshape(row.shape)


def write_file(path: Path, config: Config, seed: int, prefix: str = "", original: bool = False) -> None:
    """Write a component as one safetensors file, tensor by tensor, so that memory holds one tensor.

    ``original``: under the original's names, which must have each tensor alone.
    """
    rows = list(config.published.rows())
    others = {piece.name: one.name for one in in_original_names(rows) for piece in one.pieces} if original else {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for row in rows:
        end = offset + math.prod(row.shape) * 2
        header[prefix + others.get(row.name, row.name)] = {
            "dtype": "BF16",
            "shape": row.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in weights(config, seed):
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def narrowed(config: Config, divide: Mapping[str, int]) -> Config:
    """Return settings with some of the values divided, and all others as they are."""
    return replace(config, **{name: max(1, getattr(config, name) // by) for name, by in divide.items()})


def write_files(folder: Path, configs: Mapping[str, Config], number: int) -> None:
    """Write each component as a file of its own, as ComfyUI lays them out."""
    for index, (role, config) in enumerate(configs.items()):
        place = {"transformer": "diffusion_models", "vae": "vae"}.get(role, "text_encoders")
        write_file(folder / place / f"{role}.safetensors", config, number * 10 + index)


def write_folder(home: Path, family: Family, configs: Mapping[str, Config], number: int) -> Path:
    """Write a diffusers folder. The text encoders are sharded."""
    index: dict[str, Any] = {"_class_name": family.pipeline_class, "is_distilled": True}
    for position, (role, config) in enumerate(configs.items()):
        with torch.device("meta"):
            module: Any = construct(family, config)
        is_text = type(module).__module__.startswith("transformers.")
        settings = module.config.to_dict() if is_text else dict(module.config)
        settings |= {key: value for place, key, value in family.folder_settings(configs) if place == role}
        tokenizer = family.component(role).tokenizer
        if tokenizer is not None and tokenizer.shipped is None:
            from support.ernie_image import tokenizer_file

            (home / tokenizer.place).parent.mkdir(parents=True, exist_ok=True)
            (home / tokenizer.place).write_text(tokenizer_file())
        index[role] = ["transformers" if is_text else "diffusers", type(module).__name__]
        path = home / role / ("model.safetensors" if is_text else "diffusion_pytorch_model.safetensors")
        write_file(path, config, number * 10 + position)
        if is_text:
            shard(path)
        (home / role / "config.json").write_text(
            json.dumps({**settings, "_class_name": type(module).__name__}, default=str)
        )
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (home / "scheduler").mkdir(exist_ok=True)
    (home / "scheduler/scheduler_config.json").write_text(
        json.dumps({"shift": family.noise.settings.get("shift", 3.0)})
    )
    (home / "model_index.json").write_text(json.dumps(index))
    return home


def shard(path: Path) -> None:
    """Split a file into two, with the index that names the file of each tensor."""
    tensors = load_file(path)
    path.unlink()
    names = list(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({one: tensors[one] for one in part}, path.with_name(name), {"format": "pt"})
        where |= dict.fromkeys(part, name)
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


NARROW: dict[str, dict[str, dict[str, int]]] = {
    "z-image": {"text_encoder": {"layers": 9}, "transformer": {"layers": 15, "refiner_layers": 2}},
    "flux": {"text_encoder_2": {"layers": 24}, "transformer": {"width": 2, "layers": 6, "single_layers": 9}},
    "flux2-klein-4b": {"text_encoder": {"layers": 1}, "transformer": {"double_layers": 5, "single_layers": 10}},
    "qwen-image": {"text_encoder": {"layers": 28}, "transformer": {"layers": 60}},
    "krea-2": {"text_encoder": {"intermediate": 16}, "transformer": {"layers": 28}},
    "chroma": {"text_encoder": {"layers": 24}, "transformer": {"layers": 19, "single_layers": 38}},
    "ernie-image": {"text_encoder": {"layers": 26}, "transformer": {"layers": 18}},
    "anima": {"text_encoder": {"layers": 14}, "transformer": {"layers": 5}},
}
"""By what layers and widths are divided for ``--part call``: 300 million parameters or more stay in the denoiser."""


VARIANTS = {"z-image": "turbo", "flux": "dev", "ernie-image": "turbo"}
"""Variants of checkpoints whose files do not say it."""


def tiny(size: str) -> dict[str, Config]:
    """Return the settings of the tests' checkpoints."""
    from support.families import tiny_families

    return tiny_families()[sizes()[size][0].name].configs()


def engine(root: Path, simulated: Simulated | None = None, **settings: Any) -> Any:
    from safelight.assembly.engine import open_engine
    from safelight.settings_sources import load_settings

    # The choice of ``auto`` depends on times, which differ from one process to the next.
    return open_engine(load_settings(root, attention_type="torch-sdp", **settings), simulated)


def compare_calls(size: str, small: bool, pairs: int) -> dict[str, Any]:
    """Time a denoiser's call through a lease beside diffusers' module with the same weights and arguments."""
    from safelight.families.family_model import family_model

    family, configs = sizes()[size]
    narrow = tiny(size) if small else {r: narrowed(one, NARROW[size].get(r, {})) for r, one in configs.items()}
    folder = write_folder(FOLDER / size, family, narrow, 1)
    added = Catalog.under(FOLDER / "root").library.add(folder, "call", variant=VARIANTS.get(size, ""))
    made = engine(FOLDER / "root", precision="fp32")
    model: Any = family_model(family)
    predict = model.predict
    ours: list[float] = []
    theirs: list[float] = []

    def measure(denoiser: Any, call: Any) -> torch.Tensor:
        plain: Any = construct(family, narrow[family.denoiser]).float().eval().requires_grad_(False)
        plain.load_state_dict(denoiser.state_dict())
        seen: list[tuple[Any, Any]] = []

        def note(_: object, args: Any, named: Any) -> None:
            seen.append((args, named))

        hook = plain.register_forward_pre_hook(note, with_kwargs=True)
        predicted = predict(plain, call)
        hook.remove()
        (args, named), *_ = seen
        for _ in range(pairs):
            start = time.perf_counter()
            assert torch.equal(predict(denoiser, call), predicted)
            middle = time.perf_counter()
            plain(*args, **named)
            ours.append(middle - start)
            theirs.append(time.perf_counter() - middle)
        return predicted

    model.predict = measure
    try:
        request = Request("a cat", added.name, steps=1, width=256, height=256, precision="fp32")
        next(made.generate(request))
    finally:
        del model.predict
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    half = 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else math.nan
    mean = statistics.mean(ratios)
    return {
        "parameters in millions": sum(math.prod(row.shape) for row in narrow[family.denoiser].rows()) / 1e6,
        "s": statistics.median(ours),
        "diffusers s": statistics.median(theirs),
        "ratio": mean,
        "from": mean - half,
        "to": mean + half,
    }


def add_files(root: Path, folder: Path, variant: str) -> Model:
    """Add the files of :func:`write_files` to the library below ``root``, which is empty before."""
    shutil.rmtree(root, ignore_errors=True)
    catalog = Catalog.under(root)
    for path in sorted(folder.glob("[tv]*/*.safetensors")):
        catalog.adapters.add(path)
    return catalog.library.add(folder / "diffusion_models/transformer.safetensors", "a", variant=variant)


def shared_models(small: bool) -> dict[str, dict[str, Config]]:
    """Return the settings of Z-Image and FLUX.2 klein with a quarter of their layers and the same text encoder.

    The text encoder has all of Qwen3's layers, which klein reads, and a quarter of their width between two matrices.
    """
    shares = {"layers": 4, "double_layers": 4, "single_layers": 4}
    configs = {
        name: tiny(name)
        if small
        else {
            role: narrowed(one, {key: by for key, by in shares.items() if hasattr(one, key) and role != "text_encoder"})
            for role, one in sizes()[name][1].items()
        }
        for name in ("z-image", "flux2-klein-4b")
    }
    shared = configs["flux2-klein-4b"]["text_encoder"]
    for one in configs.values():
        one["text_encoder"] = shared if small else narrowed(shared, {"intermediate": 4})
    return configs


def switch(small: bool) -> list[dict[str, Any]]:
    """Count the bytes that move at each switch between two models with one text encoder."""
    configs = shared_models(small)
    names = tuple(configs)
    shared = configs[names[1]]["text_encoder"]
    klein = write_folder(FOLDER / "switch-klein", sizes()[names[1]][0], configs[names[1]], 1)
    files = FOLDER / "switch-z-image"
    write_files(files, configs[names[0]], 2)
    # The same numbers as in the folder.
    write_file(files / "text_encoders/text_encoder.safetensors", shared, 10, "model.")
    nbytes = {name: {r: 2 * parameters(one) for r, one in configs[name].items()} for name in names}
    room = max(sum(one.values()) for one in nbytes.values()) * 1.1 + 3e8
    models = {
        names[0]: add_files(FOLDER / "root-switch", files, "turbo"),
        names[1]: Catalog.under(FOLDER / "root-switch").library.add(klein, "b"),
    }
    made = engine(
        FOLDER / "root-switch",
        Simulated(int(room * 1.5)),
        device="simulated",
        precision="bf16",
        max_cache_vram_gb=round(room / 2**30, 3),
        max_cache_ram_gb=3.0,
    )
    rows = list[dict[str, Any]]()
    for number, name in enumerate(names * 3):
        before = made.memory()["transfers"]["nbytes"]
        request = Request(f"a cat {number}", models[name].name, steps=1, width=64, height=64, precision="bf16")
        next(made.generate(request))
        moved = made.memory()["transfers"]["nbytes"] - before
        rows.append({"to": name, "moved GB": moved / 1e9, "all components GB": sum(nbytes[name].values()) / 1e9})
    return rows


def parameters(config: Config) -> int:
    return sum(math.prod(row.shape) for row in config.rows())


def real(size: str, small: bool) -> list[dict[str, Any]]:
    """Make one image of a published size under two limits, each in a process of its own."""
    write_files(FOLDER / f"real-{size}", tiny(size) if small else sizes()[size][1], 1)
    rows = list[dict[str, Any]]()
    for limit in (6.0, 10.0):
        command = [sys.executable, __file__, "--part", "image", "--size", size, "--limit", str(limit)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    assert rows[0]["pixels"] == rows[1]["pixels"]
    return rows


def image(size: str, limit: float) -> dict[str, Any]:
    folder = FOLDER / f"real-{size}"
    model = add_files(FOLDER / f"root-real-{size}", folder, VARIANTS[size])
    made = engine(FOLDER / f"root-real-{size}", precision="bf16", max_cache_ram_gb=limit)
    start = time.perf_counter()
    with Peak() as peak:
        drawn = next(made.generate(Request("a cat", model.name, steps=1, width=256, height=256, precision="bf16")))
    return {
        "limit GB": limit,
        "seconds": time.perf_counter() - start,
        "denoise": drawn.seconds.denoise,
        "peak GB": peak.most / 2**30,
        "pixels": drawn.pixels_sha256,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("call", "switch", "real", "image"), required=True)
    parser.add_argument("--size", choices=NARROW, default="z-image")
    parser.add_argument("--limit", type=float, default=6.0, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--pairs", type=int, default=30)
    arguments = parser.parse_args()
    if arguments.part == "image":
        print(json.dumps(image(arguments.size, arguments.limit)))
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        match arguments.part:
            case "call":
                print_rows([compare_calls(arguments.size, arguments.tiny, arguments.pairs)])
            case "switch":
                print_rows(switch(arguments.tiny))
            case _:
                print_rows(real(arguments.size, arguments.tiny))
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
