"""Right and spoiled images of the starters, for the table of ``tools/gates.py``.

``python tools/gate_images.py report`` writes ``build/gates/report.npz``: the final latents, the pixels, and the way in
which each was spoiled ("right" if it was not). It takes about ten minutes. ``calibrate`` makes fewer, of other seeds,
for trying other detectors.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import safelight
from safelight.boundary import kernels, pictures
from safelight.catalog.model import Model
from safelight.pipeline import model_stages, run
from safelight.pipeline.denoise import Denoised, DenoiseInputs
from safelight.resolve.contents import Contents
from safelight.workers.local_engine import LocalEngine

HOME = Path(__file__).parents[1]
KEPT = HOME / "build/gates"
SUBJECTS = [line.split("\t")[1] for line in (HOME / "starter/recipe/subjects.tsv").read_text().splitlines()]
SIDE = 64
"""Pixels per side. Starters with larger images are left out: all images are one array."""

STEPS = 8
SETS = {"calibrate": (100, 200, 1, 30), "report": (0, 200, 2, 60)}
"""By name: the first seed, subjects, seeds for each, and how many subjects of each model are spoiled in each way."""


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Generator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Maker:
    """Makes images, and keeps the latents that were decoded."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self.latents = torch.empty(0)

    def make(
        self,
        model: Model,
        prompt: str,
        seed: int,
        hook: Callable[[nn.Module], list[Any]] | None = None,
        change: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents,
    ) -> np.ndarray:
        """uint8 (h, w, 3); ``hook`` spoils the UNet for this image, ``change`` what the VAE is given."""
        denoise, decode = model_stages.denoise, pictures.decode

        def denoising(work: DenoiseInputs) -> Denoised:
            handles = hook(work.denoiser) if hook is not None else []
            try:
                return denoise(work)
            finally:
                for handle in handles:
                    handle.remove()

        def decoding(vae: nn.Module, latents: torch.Tensor, scale: int, tile: int) -> torch.Tensor:
            # The family has divided them by the factor already.
            self.latents = latents * model.family.latents.scaling_factor
            return decode(vae, change(latents), scale, tile)

        request = safelight.Request(prompt, model.name, seed=seed, steps=STEPS)
        with replaced(model_stages, "denoise", denoising), replaced(pictures, "decode", decoding):
            image = run.make_image(Contents.plain(request, model), model, self.engine.resources, 0, lambda _: None)
        return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def rolled(unet: nn.Module) -> list[Any]:
    """As if the first convolution's weights had been read one channel further (COPY 11)."""
    return [unet.conv_in.register_forward_hook(lambda _, __, out: out.roll(1, 1))]  # type: ignore[operator, union-attr]


def recycled(out: torch.Tensor, times: float) -> torch.Tensor:
    """What was in recycled memory: values of the same size as the right ones, at other places."""
    flat = out.flatten()
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(len(flat)))
    return (times * flat[order]).reshape(out.shape)


def junk(unet: nn.Module) -> list[Any]:
    """An attention kernel that returns recycled memory (ATTENTION 03). The starters draw their subject even when tokens
    are exchanged, so that junk of that kind spoils nothing of them."""
    found = [m for m in unet.modules() if isinstance(m, kernels.Attention)]

    def junked(_: nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        return recycled(out, 4.0)

    return [m.register_forward_hook(junked) for m in found]


def noise(unet: nn.Module) -> list[Any]:
    """The last convolution's results are at other places: every image is noise."""
    return [unet.conv_out.register_forward_hook(lambda _, __, out: recycled(out, 1.0))]  # type: ignore[operator, union-attr]


def of_another_vae(latents: torch.Tensor) -> torch.Tensor:
    """Latents in another basis: what a VAE gets that belongs to another model."""
    random = torch.randn(4, 4, generator=torch.Generator().manual_seed(4))
    basis, _ = torch.linalg.qr(random)
    return torch.einsum("ij,njhw->nihw", basis, latents)


def spoiled(maker: Maker, model: Model, prompt: str, seed: int) -> Iterator[tuple[str, np.ndarray, torch.Tensor]]:
    """The six ways."""
    pixels = maker.make(model, prompt, seed, noise)
    yield "noise", pixels, maker.latents
    pixels = maker.make(model, prompt, seed, rolled)
    yield "weights one channel off", pixels, maker.latents
    pixels = maker.make(model, prompt, seed, junk)
    yield "attention gives junk", pixels, maker.latents
    pixels = maker.make(model, prompt, seed, change=of_another_vae)
    yield "latents of another VAE", pixels, maker.latents
    right = maker.make(model, prompt, seed)
    yield "colours shifted", np.ascontiguousarray(right[..., [2, 0, 1]]), maker.latents
    yield "constant (overflow)", np.full_like(right, 0 if seed % 2 else 127), maker.latents


def main(name: str) -> None:
    first, subjects, seeds, ruined = SETS[name]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        engine = safelight.open_engine(root, attention_type="torch-sdp", threads=1)
        maker = Maker(engine)
        found: list[tuple[str, str, np.ndarray, np.ndarray]] = []
        for model in (model for model in engine.library.models() if model.resolution == SIDE):
            for number, prompt in enumerate(SUBJECTS[:subjects]):
                for seed in range(first, first + seeds):
                    pixels = maker.make(model, prompt, seed)
                    found.append(("right", model.name, pixels, maker.latents[0].numpy()))
                if number % (subjects // ruined) == 0:
                    for way, image, latents in spoiled(maker, model, prompt, first + 1000 + number):
                        found.append((way, model.name, image, latents[0].numpy()))
            print(model.name, len(found), flush=True)
        ways, models, pixels, latents = zip(*found, strict=True)
        KEPT.mkdir(parents=True, exist_ok=True)
        np.savez(
            KEPT / f"{name}.npz",
            way=np.array(ways),
            model=np.array(models),
            pixels=np.stack(pixels),
            latents=np.stack(latents),
        )


if __name__ == "__main__":
    main(sys.argv[1])
