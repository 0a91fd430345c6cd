"""How long `safelight import` takes for a large folder of ComfyUI.

``python benchmarks/importing.py`` lays out 1,000 files as ComfyUI does: LoRAs and checkpoints of SD 1.5 and SDXL,
denoisers, text encoders and VAEs of the families with rectified flow, and a few files that are none. They have the real
headers of published files; the weights are holes in sparse files. Then it imports the folder by the command, and lists
the models. Nothing may be copied, and no weight may be read.

Predicted: 20 ms for each file, so 20 s; the list in 0.5 s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import adapters, naming
from support.families import LDM, PUBLISHED, Published

Shapes = Mapping[str, tuple[int, ...]]


def write_header(path: Path, shapes: Shapes) -> None:
    """Write a safetensors file in fp16 whose weights are a hole."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(one.shape) for name, one in tensors.items()}


def checkpoint(published: Published) -> Shapes:
    """Return a whole checkpoint of Stable Diffusion, in the original's names."""
    whole: dict[str, tuple[int, ...]] = {}
    for role, own in published.components.items():
        config, which = published.original.get(role, (own, LDM))
        named = naming.in_files(config, naming.on_meta(config), which)
        whole |= shapes_of(naming.prefixed(published.family.component(role).prefixes[0], named))
    return whole


def lora(published: Published, base: str) -> Shapes:
    """Return a LoRA of rank 32 in kohya's names."""
    made: dict[str, tuple[int, ...]] = {}
    for role, module, (rows, columns, *kernel) in adapters.modules(base, published.components):
        made[adapters.kohya(role, module, "down")] = (32, columns, *kernel)
        made[adapters.kohya(role, module, "up")] = (rows, 32, *(1 for _ in kernel))
        made[adapters.kohya(role, module, "alpha")] = ()
    return made


def kinds() -> Iterator[tuple[str, Shapes]]:
    """Yield a folder of ComfyUI and the tensors of a file in it; common ones several times."""
    for label, base in (("SD 1.5", "sd1"), ("SDXL", "sdxl")):
        for _ in range(12):
            yield "loras", lora(PUBLISHED[label], base)
        for _ in range(4):
            yield "checkpoints", checkpoint(PUBLISHED[label])
    for label, published in PUBLISHED.items():
        if label.startswith("SD"):
            continue
        for place, tensors in published.in_original_names().items():
            folder = {"transformer": "diffusion_models", "vae": "vae"}.get(place, "text_encoders")
            yield folder, shapes_of(tensors)


def lay_out(root: Path, count: int) -> None:
    (root / "custom_nodes").mkdir(parents=True)
    every = list(kinds())
    for number in range(count):
        folder, shapes = every[number % len(every)]
        path = root / "models" / folder / f"某 file {number}.safetensors"
        if number % 100 == 99:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"<!DOCTYPE html>" if number % 200 == 99 else b"\x10\0\0\0\0\0\0\0{}")
        else:
            write_header(path, shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, root = Path(place) / "ComfyUI", Path(place) / "root"
        lay_out(folder, asked.files)
        command = [sys.executable, "-m", "safelight.cli", "import", str(folder), "--json", "--root", str(root)]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        listing = [sys.executable, "-m", "safelight.cli", "models", "list", "--json", "--root", str(root)]
        start = time.perf_counter()
        listed = subprocess.run(listing, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        list_seconds = time.perf_counter() - start
        states = Counter(row["state"] for row in rows)
        written = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        blocks = sum(path.stat().st_blocks * 512 for path in folder.rglob("*.safetensors"))
        apparent = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    print("| files | TB | imported | refused | seconds | ms a file | models listed | seconds | MB written |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {asked.files} | {apparent / 1e12:.2f} | {states['imported']} | {states['refused']} | {seconds:.1f} "
        f"| {1e3 * seconds / len(rows):.1f} | {len(listed)} | {list_seconds:.2f} | {written / 1e6:.2f} |"
    )
    for row in rows:
        if row["state"] == "refused":
            print(row["note"])
    assert len(rows) == asked.files
    assert blocks < apparent / 10


if __name__ == "__main__":
    main()
