"""Marks images whose look is suspicious: constant, noise, or decoded by another VAE than the latents belong to.

A mark is no failure: a plain background is constant, and an image of one step is noise, and both can be right. What is
looked at: how alike neighbouring latents are (noise has neighbours that are not), the contrast, and whether the colours
are those that this VAE's latents had in the images before (a VAE is nearly a linear map from latents to colours, which
is also what previews use). ``tools/gates.py`` calibrates and reports.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch.nn import functional as F

CONSTANT = 1.0
"""Of 255: less contrast than this is one colour."""

NOISE = 0.30
"""Correlation of neighbouring latents: below it an image looks like noise."""

FOREIGN = 12.0
"""Times the residual of the best linear map of this very image: above it the colours are of another VAE."""

LEAST_RESIDUAL = 0.002
"""Of colours from 0 to 1, squared: what no map is expected to do better than."""

ENOUGH = 64
"""Latents with which a VAE's map is known well enough to be compared with."""


@dataclass(slots=True)
class _Map:
    """Sums for a least-squares map (5 to 3) from latents and a constant to colours, over the images so far."""

    squares: torch.Tensor
    products: torch.Tensor
    count: int

    def solved(self) -> torch.Tensor:
        regular = 1e-3 * torch.eye(5, dtype=torch.float64)
        return torch.linalg.solve(self.squares + regular, self.products)


class Looks:
    """Looks at finished images; knows each VAE by the images that it decoded without a mark. Thread-safe."""

    def __init__(self) -> None:
        self._maps: dict[str, _Map] = {}
        self._lock = threading.Lock()

    def marks(self, vae: str, latents: torch.Tensor, pixels: torch.Tensor) -> list[str]:
        """What is suspicious. ``vae``: the VAE's digest; ``latents``: (1, 4, h, w); ``pixels``: uint8 (8h, 8w, 3), in
        host memory."""
        values = latents[0].detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)
        colours = small(pixels, values.shape[1], values.shape[2])
        found: list[str] = []
        if contrast(pixels) < CONSTANT:
            found.append("it is of one colour")
        elif alike(values) < NOISE:
            found.append("it looks like noise")
        with self._lock:
            known = self._maps.get(vae)
            columns = _columns(values)
            if known is not None and known.count >= ENOUGH and foreign(columns, colours, known.solved()) > FOREIGN:
                found.append("its colours are not those that this VAE gave such latents before")
            if not found:
                self._learn(vae, columns, colours)
        return found

    def _learn(self, vae: str, columns: torch.Tensor, colours: torch.Tensor) -> None:
        squares, products = columns.T @ columns / len(columns), columns.T @ colours / len(columns)
        known = self._maps.setdefault(vae, _Map(torch.zeros_like(squares), torch.zeros_like(products), 0))
        known.squares += squares
        known.products += products
        known.count += len(columns)


def contrast(pixels: torch.Tensor) -> float:
    """The standard deviation of all values, of 255."""
    return float(pixels.float().std())


def alike(latents: torch.Tensor) -> float:
    """The correlation of latents (4, h, w) with their neighbours, right and below; 0 for noise, near 1 for images."""
    values = latents - latents.mean((1, 2), keepdim=True)
    variance = float((values * values).mean())
    if not variance:
        return 1.0
    beside = float((values[:, :, 1:] * values[:, :, :-1]).mean()) if values.shape[2] > 1 else 0.0
    below = float((values[:, 1:] * values[:, :-1]).mean()) if values.shape[1] > 1 else 0.0
    return (beside + below) / 2 / variance


def small(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The colours (h * w, 3), from 0 to 1, that each latent covers."""
    planes = pixels.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(planes, (height, width), mode="area")[0].flatten(1).T.double()


def foreign(columns: torch.Tensor, colours: torch.Tensor, known: torch.Tensor) -> float:
    """How much worse the known map explains the colours than the best map for this image does."""
    own = torch.linalg.lstsq(columns, colours, driver="gelsd").solution
    best = float(((columns @ own - colours) ** 2).mean())
    got = float(((columns @ known - colours) ** 2).mean())
    return got / (best + LEAST_RESIDUAL)


def _columns(latents: torch.Tensor) -> torch.Tensor:
    """(h * w, 5): the channels and a constant."""
    values = latents.flatten(1).T
    return torch.cat([values, torch.ones(len(values), 1, dtype=values.dtype)], 1)
