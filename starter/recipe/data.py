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
from collections.abc import Iterable
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
PATHS = {"noto": "img/google/64/{}.png", "twemoji": "img/twitter/64/{}.png", "fluent": "assets/{}.webp"}


@dataclass(frozen=True)
class Images:
    """``pixels``: uint8, (styles, subjects, 3, height, width). ``subjects``: the caption of each subject."""

    pixels: torch.Tensor
    subjects: list[str]


def subjects() -> list[tuple[str, str]]:
    """(short name in emoji-data, caption) of every subject, in the file's order."""
    with SUBJECTS_FILE.open(newline="") as file:
        return [(row[0], row[1]) for row in csv.reader(file, delimiter="\t")]


def archive(packages: Path, package: str) -> Path:
    """Return where ``npm pack`` puts a package. ``package``: its name and version."""
    name, version = package.rsplit("@", 1)
    return packages / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def fetch(packages: Path, wanted: Iterable[str]) -> None:
    """Fetch the packages that are not there. ``wanted``: their names and versions."""
    packages.mkdir(parents=True, exist_ok=True)
    missing = [package for package in wanted if not archive(packages, package).exists()]
    if missing:
        subprocess.run(["npm", "pack", "--silent", *missing], cwd=packages, check=True)


def on_white(data: bytes, size: int = SIZE) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    found = tar.extractfile(name)
    if found is None:
        raise KeyError(f"{tar.name} has no file {name}")
    return found.read()


def file_stems(packages: Path) -> dict[str, str]:
    """Return each subject's code points, which the files of its pictures are named after, by its short name."""
    with tarfile.open(archive(packages, PACKAGES["noto"])) as tar:
        table = {entry["short_name"]: entry for entry in json.loads(read_member(tar, "package/emoji.json"))}
    return {short: table[short]["image"].removesuffix(".png") for short, _ in subjects()}


def read_pictures(packages: Path, style: str, files: dict[str, str]) -> list[bytes]:
    """Return the file of each subject in a style. Raises KeyError, naming the subject, when the package lacks one."""
    with tarfile.open(archive(packages, PACKAGES[style])) as tar:
        names, out = set(tar.getnames()), []
        for short, stem in files.items():
            candidates = [f"package/{PATHS[style].format(s)}" for s in (stem, stem.removesuffix("-fe0f"))]
            found = next((name for name in candidates if name in names), None)
            if found is None:
                raise KeyError(f"{PACKAGES[style]} has no image of {short}")
            out.append(read_member(tar, found))
    return out


def load(packages: Path) -> Images:
    """Every subject in every style. Raises KeyError, naming the subject, when a package lacks one."""
    fetch(packages, PACKAGES.values())
    files = file_stems(packages)
    pixels = [on_white(picture) for style in STYLES for picture in read_pictures(packages, style, files)]
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
