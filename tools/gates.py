"""Count how often a mark of ``gates`` is right, and write ``docs/gates.md``: ``python tools/gates.py``.

It reads ``build/gates/report.npz``, which ``tools/gate_images.py`` writes. It examines the images one after another, as
an engine does: each with what the correct images before it have taught. Where the gate decodes again, the starters' VAE
does it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import safelight
from safelight.boundary import pictures
from safelight.families.registry import family
from safelight.models.bind import bind
from safelight.pipeline.checks.appearance import AppearanceCheck
from safelight.pipeline.stages import skeleton_key

HOME = Path(__file__).parents[1]
KEPT = HOME / "build/gates"
LEARNT = 100
"""Correct images from which the map of the VAE is learnt before the count; no row counts them."""

Pair = tuple[torch.Tensor, torch.Tensor]


def loaded(name: str) -> tuple[np.ndarray, list[Pair]]:
    """The fault of each image, and its latents and pixels."""
    data = np.load(KEPT / f"{name}.npz")
    both = zip(data["latents"], data["pixels"], strict=True)
    return data["way"], [(torch.from_numpy(z)[None], torch.from_numpy(p)) for z, p in both]


@contextlib.contextmanager
def starters_vae() -> Generator[Any]:
    """The VAE that the starters share, as a module."""
    with tempfile.TemporaryDirectory() as root:
        engine = safelight.open_engine(root, attention_type="torch-sdp", threads=1)
        model, resources = engine.library.get("starter-noto"), engine.resources
        component = model.manifest.component("vae")
        key = skeleton_key(model, component, torch.float32, resources, "")
        with (
            resources.residency.lease(component, torch.float32) as lease,
            bind(resources.skeletons, key, lease) as module,
            torch.no_grad(),
        ):
            yield module


class Counting:
    """Examines images, and counts those that it decodes a second time."""

    def __init__(self, vae: Any) -> None:
        self._vae, self._check = vae, AppearanceCheck()
        self.again = 0

    def marked(self, latents: torch.Tensor, pixels: torch.Tensor) -> bool:
        def again() -> torch.Tensor:
            self.again += 1
            return self.decoded(latents)

        return bool(self._check.marks("vae", latents, pixels, again))

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return pictures.to_pixels(pictures.decode(self._vae, latents / family("sd1").latents.scaling_factor, 8))[0]

    def row(self, what: str, pairs: list[Pair]) -> tuple[str, int, int, int]:
        before = self.again
        marked = sum(self.marked(*pair) for pair in pairs)
        return what, len(pairs), marked, self.again - before


def report(name: str = "report", most: int | None = None, target: Path | None = HOME / "docs/gates.md") -> list[str]:
    """Count, and write the page. ``most``: the most images of each fault, for a quick look."""
    torch.set_num_threads(1)
    ways, pairs = loaded(name)
    right = np.flatnonzero(ways == "right")
    known = right[:: max(1, len(right) // LEARNT)][:LEARNT]
    with starters_vae() as vae:
        looks = Counting(vae)
        for number in known:
            looks.marked(*pairs[number])
        counted = np.setdiff1d(np.arange(len(ways)), known)
        rows = [
            looks.row(str(way), [pairs[number] for number in counted if ways[number] == way][:most])
            for way in dict.fromkeys(ways)
        ]
        spoiled = rows[1:]
        rows += [looks.row(what, encoded(vae, looks.decoded, some[:most])) for what, some in pictures_of().items()]
    lines = page(rows, spoiled)
    if target is not None:
        target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return lines


def page(rows: list[tuple[str, int, int, int]], spoiled: list[tuple[str, int, int, int]]) -> list[str]:
    total, found = sum(row[1] for row in spoiled), sum(row[2] for row in spoiled)
    right = rows[0]
    return [
        "# Marks: how often they are right",
        "",
        "`python tools/gates.py` writes this page. It reads images of the starters, which",
        "`python tools/gate_images.py report` makes. A mark never fails a job.",
        "",
        "The row *right* counts correct images. The rows from *noise* to *constant* count images with a fault. The",
        "last rows count other pictures of 512 by 512 pixels, which the starters' VAE encodes and decodes; the",
        "photographs come from three packages. *Decoded again* counts the images that the VAE decoded a second time,",
        "to compare the pixels: the first 100 images of each VAE, and later only the most doubtful ones. An image is",
        "doubtful if its colours do not fit its latents, or fit them better when the colour channels are exchanged.",
        "",
        "| images | number | marked | share marked | share decoded again |",
        "|---|---|---|---|---|",
        *(f"| {what} | {n} | {marked} | {marked / n:.1%} | {again / n:.1%} |" for what, n, marked, again in rows if n),
        "",
        f"Correct images that are marked: {right[2] / right[1]:.2%} (aim: at most 0.1 %). Images with a fault that are",
        f"marked: {found / total:.1%} (aim: 97 %, and at least 85 % of each fault).",
        "",
        "Marks find constant images, faults in the latents, and faults that differ between two decodings. If the",
        "decoder is wrong in the same way each time, it gives the same pixels again, and no mark finds the fault. The",
        "canary (`canary: switch`, `safelight doctor`) compares the image with one from another process, and finds",
        "this fault every time: `tests/pipeline/checks/test_appearance.py`.",
    ]


def encoded(vae: Any, decoded: Callable[[torch.Tensor], torch.Tensor], some: list[Image.Image]) -> list[Pair]:
    """Encode pictures with the VAE; their latents, and the pixels that it decodes from them."""
    found: list[Pair] = []
    for picture in some:
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = vae.encode(values).latent_dist.mode() * vae.config.scaling_factor
        found.append((latents, decoded(latents)))
    return found


def pictures_of() -> dict[str, list[Image.Image]]:
    chance = np.random.default_rng(0)

    def grain(amount: float) -> Image.Image:
        base = np.linspace(60, 190, 512)[None, :, None].repeat(512, 0).repeat(3, 2)
        return Image.fromarray((base + chance.normal(0, amount, (512, 512, 1))).clip(0, 255).astype(np.uint8))

    def code(size: int) -> Image.Image:
        modules = chance.integers(0, 2, (size, size), dtype=np.uint8) * 255
        return Image.fromarray(modules).resize((512, 512), Image.Resampling.NEAREST).convert("RGB")

    plain = [Image.new("RGB", (512, 512), tuple(int(v) for v in chance.integers(0, 256, 3))) for _ in range(20)]
    cards = []
    for colour in plain:
        card = colour.copy()
        ImageDraw.Draw(card).ellipse((100, 100, 400, 420), fill=(255, 255, 255))
        cards.append(card)
    return {
        "photographs": photographs(),
        "film grain over a gradient": [grain(amount) for amount in (2, 4, 8, 12, 16, 24, 32, 48)],
        "QR codes (random squares)": [code(size) for size in (21, 25, 29, 33, 37, 41, 57, 77)],
        "plain colours": plain,
        "a white disc on plain colours": cards,
    }


def photographs() -> list[Image.Image]:
    """The photographs in the packages scikit-image, scikit-learn and matplotlib, cut to squares."""
    folder = KEPT / "packages"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, "scikit-image", "scikit-learn", "matplotlib"], check=True)
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.stat().st_size > 60_000 and "data" in str(path):
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
            side = min(picture.size)
            if side >= 200:
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                found.append(picture.crop((left, top, left + side, top + side)).resize((512, 512)))
    return found


if __name__ == "__main__":
    report()
