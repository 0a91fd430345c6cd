"""Marks images whose look is suspicious: constant, noise, or decoded by another VAE than the latents belong to.

A mark is no failure: a plain background is constant, and an image of one step is noise, and both can be right. What is
looked at: the contrast; the latents' spread, and how alike neighbours are (noise has neighbours that are not); and
whether the colours are those that this VAE gave such latents in the images before. A VAE is nearly a linear map from
latents to colours, which is also what previews use; how far a right image may be from it was fitted to right and
spoiled images of the starters (``tools/gates.py``, which also makes the table in docs/gates.md).
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

CONSTANT = 1.0
"""Of 255: less contrast than this is one colour."""

SPREAD = (0.15, 4.0)
"""The standard deviation of an image's latents; they are scaled to about 1."""

NOISE = 0.1
"""Correlation of neighbouring latents: below it an image looks like noise, if it has latents enough to tell."""

TELLING = 1024
"""Latents from which that correlation can be told from chance."""

ENOUGH = 1024
"""Latents with which a VAE's map is known well enough to be compared with."""

FITTED = Path(__file__).with_name("appearance.json")


@dataclass(slots=True)
class _Map:
    """Sums for a least-squares map (5 to 3) from latents and a constant to colours, over the images so far."""

    squares: torch.Tensor
    products: torch.Tensor
    count: int

    def solved(self) -> torch.Tensor:
        regular = 1e-3 * torch.eye(5, dtype=torch.float64)
        return torch.linalg.solve(self.squares + regular, self.products)

    def differs(self, columns: torch.Tensor, colours: torch.Tensor) -> bool:
        """Whether an image's colours are others than this map's; never before the map is known well."""
        if self.count < ENOUGH:
            return False
        return _FITTED.score(agreement(columns, colours, self.solved())) > _FITTED.threshold


class Looks:
    """Looks at finished images; knows each VAE by the images that it decoded without a mark. Thread-safe."""

    def __init__(self) -> None:
        self._maps: dict[str, _Map] = {}
        self._lock = threading.Lock()

    def marks(self, vae: str, latents: torch.Tensor, pixels: torch.Tensor) -> list[str]:
        """What is suspicious. ``vae``: the VAE's digest; ``latents``: (1, 4, h, w); ``pixels``: uint8 (8h, 8w, 3), in
        host memory."""
        values = latents[0].detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)
        height, width = values.shape[1:]
        columns, colours = _columns(values), small(pixels, height, width)
        found: list[str] = []
        spread = float(values.std())
        if contrast(pixels) < CONSTANT:
            found.append("it is of one colour")
        elif not SPREAD[0] <= spread <= SPREAD[1]:
            found.append(f"its latents spread by {spread:.2f}, where those of images spread by about 1")
        elif height * width >= TELLING and alike(values) < NOISE:
            found.append("it looks like noise")
        with self._lock:
            known = self._maps.get(vae)
            if not found and known is not None and known.differs(columns, colours):
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


AGREEMENT = ("residual", "chroma", "luminance", "chroma error", "luminance error", "chroma error by chroma")

WORSE = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
"""The direction in which each of them gets worse."""


def agreement(columns: torch.Tensor, colours: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """How an image's colours agree with what the known map makes of its latents: the values of :data:`AGREEMENT`.

    How much worse the known map is than the best one for this image (a logarithm); the correlations of chroma and of
    luminance; the logarithms of their errors, and of the chroma's relative to how much there is.
    """
    told = columns @ known
    best = torch.linalg.lstsq(columns, colours, driver="gelsd").solution
    own = ((columns @ best - colours) ** 2).mean()
    got = ((told - colours) ** 2).mean()
    chroma_told, chroma = told - told.mean(1, keepdim=True), colours - colours.mean(1, keepdim=True)
    luma_told, luma = told.mean(1), colours.mean(1)
    error, luma_error = _size(chroma - chroma_told), _size(luma - luma_told)
    values = (
        torch.log(got / (own + 5e-4)),
        _correlation(chroma_told.flatten(), chroma.flatten(), 1e-2),
        _correlation(luma_told - luma_told.mean(), luma - luma.mean(), 1e-3),
        torch.log(error + 1e-3),
        torch.log(luma_error + 1e-3),
        torch.log((error + 5e-3) / (_size(chroma) + 2e-2)),
    )
    return torch.stack(values)


def _size(values: torch.Tensor) -> torch.Tensor:
    return (values * values).mean().sqrt()


def _correlation(one: torch.Tensor, other: torch.Tensor, regular: float) -> torch.Tensor:
    return (one @ other) / (one.norm() * other.norm() + regular)


@dataclass(frozen=True)
class Fit:
    """A logistic regression on :func:`agreement` and what is worse than usual in it, squared: ``weights`` and a bias,
    after ``centre`` and ``scale``. No weight is negative, so that who agrees better never scores higher. A ``score``
    above ``threshold`` is a mark."""

    centre: torch.Tensor
    scale: torch.Tensor
    weights: torch.Tensor
    threshold: float

    @classmethod
    def read(cls, path: Path = FITTED) -> Fit:
        """What ``tools/gates.py calibrate`` wrote."""
        values = json.loads(path.read_text())
        centre, scale, weights = (
            torch.tensor(values[name], dtype=torch.float64) for name in ("centre", "scale", "weights")
        )
        return cls(centre, scale, weights, float(values["threshold"]))

    def score(self, values: torch.Tensor) -> float:
        """Above 0 an image is more like the spoiled ones."""
        return float(design(((values - self.centre) / self.scale)[None]) @ self.weights)


def design(values: torch.Tensor) -> torch.Tensor:
    """(n, k) to (n, k + k (k + 1) / 2 + 1): the values, the products of what is worse than usual, and 1."""
    values = values.clamp(-6, 6) * WORSE
    worse = values.clamp(min=0)
    count = values.shape[1]
    products = [worse[:, i] * worse[:, j] for i in range(count) for j in range(i, count)]
    return torch.cat([values, torch.stack(products, 1), torch.ones(len(values), 1, dtype=values.dtype)], 1)


def _columns(latents: torch.Tensor) -> torch.Tensor:
    """(h * w, 5): the channels and a constant."""
    values = latents.flatten(1).T
    return torch.cat([values, torch.ones(len(values), 1, dtype=values.dtype)], 1)


_FITTED = Fit.read()
