"""The training images: three emoji sets from the npm registry, 64×64 pixels on white.

``python -m recipe.data --packages DIR`` fetches them with ``npm pack`` (about 150 MB) when they are not there.
Nothing of them enters the repository; what may be done with them is in ``LICENSES.md`` beside this folder.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = 64
STYLES = ("noto", "twemoji", "fluent")
SUBJECTS_FILE = Path(__file__).with_name("subjects.tsv")
JUDGED = 100
"""The first hundred lines of ``subjects.tsv`` are the ones that the figure in the model cards is about."""

PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}


@dataclass(frozen=True)
class Images:
    """``pixels``: uint8, (styles, subjects, 3, 64, 64). ``subjects``: the caption of each subject."""

    pixels: torch.Tensor
    subjects: list[str]


def subjects() -> list[tuple[str, str]]:
    """(short name in emoji-data, caption) of every subject, in the file's order."""
    with SUBJECTS_FILE.open(newline="") as file:
        return [(row[0], row[1]) for row in csv.reader(file, delimiter="\t")]


def archive(packages: Path, style: str) -> Path:
    name, version = PACKAGES[style].rsplit("@", 1)
    return packages / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def fetch(packages: Path) -> None:
    packages.mkdir(parents=True, exist_ok=True)
    missing = [PACKAGES[style] for style in STYLES if not archive(packages, style).exists()]
    if missing:
        subprocess.run(["npm", "pack", "--silent", *missing], cwd=packages, check=True)


def on_white(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    found = tar.extractfile(name)
    if found is None:
        raise KeyError(f"{tar.name} has no file {name}")
    return found.read()


def load(packages: Path) -> Images:
    """Every subject in every style. Raises KeyError, naming the subject, when a package lacks one."""
    fetch(packages)
    with tarfile.open(archive(packages, "noto")) as tar:
        table = {entry["short_name"]: entry for entry in json.loads(_read(tar, "package/emoji.json"))}
    files = {short: table[short]["image"].removesuffix(".png") for short, _ in subjects()}
    sets = {"noto": "img/google/64/{}.png", "twemoji": "img/twitter/64/{}.png", "fluent": "assets/{}.webp"}
    pixels = []
    for style in STYLES:
        with tarfile.open(archive(packages, style)) as tar:
            names = set(tar.getnames())
            for short, stem in files.items():
                candidates = [f"package/{sets[style].format(s)}" for s in (stem, stem.removesuffix("-fe0f"))]
                found = next((name for name in candidates if name in names), None)
                if found is None:
                    raise KeyError(f"{PACKAGES[style]} has no image of {short}")
                pixels.append(on_white(_read(tar, found)))
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    captions = [caption for _, caption in subjects()]
    return Images(stacked.reshape(len(STYLES), len(captions), 3, SIZE, SIZE).contiguous(), captions)


def as_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0…255 to float32 -1…1."""
    return pixels.float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    images = load(parser.parse_args().packages)
    print("images", tuple(images.pixels.shape), "first subjects", images.subjects[:5])


if __name__ == "__main__":
    main()
