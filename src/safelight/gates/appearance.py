"""Marks images whose look is suspicious: constant, noise, or not what the VAE makes of their latents.

A mark is no failure: a plain background is constant, and an image of one step is noise, and both can be right. What is
looked at: the contrast; the latents' spread, and how alike neighbours are (noise has neighbours that are not); and
whether the VAE makes the same pixels of the same latents once more. A decoder is deterministic, so that this is known
and not guessed: no right image is marked by it, whatever it shows and whatever its VAE, and nothing is calibrated.
What is wrong in the same way each time is not seen so: the canary sees it.

Decoding again costs as much as decoding, so it is done for the images of a VAE that fit least what is known of it: a
least-squares map from latents to colours, learnt from the images before, says how far an image is from what is
expected, and how well its colours would fit if they were exchanged. A doubtful image costs time; it is never marked by
the map.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch.nn import functional as F

CONSTANT = 1.0
"""Of 255: less contrast than this is one colour."""

SPREAD = (0.15, 4.0)
"""The standard deviation of an image's latents; they are scaled to about 1."""

NOISE = 0.1
"""Correlation of neighbouring latents: below it an image looks like noise, if it has latents enough to tell."""

APART = 0.5
"""Correlation of two channels: above it an image is no noise, but a fine texture (gravel, grass, a code)."""

TELLING = 1024
"""Latents from which those correlations can be told from chance."""

FIRST = 100
"""So many images of a VAE are all decoded again; later only those that are in doubt."""

SURE = 50
"""Images after which a VAE's map is known so well that its scores are like later ones."""

WINDOW = 200
"""Images by whose scores it is told which are in doubt."""

DOUBTED = (0.25, 0.05)
"""Shares of a VAE's images that are decoded again: as exchanged colours would fit well; as the map fits badly."""

FEW = 1024
"""So many latents of an image, evenly over it, are enough for the map."""

DIFFERENT = 3.0
"""Of 255: by how much the mean colour of what one latent covers differs when other pixels come out."""

_EXCHANGED = [list(order) for order in permutations(range(3))][1:]


@dataclass(slots=True)
class _Map:
    """Sums over a VAE's images, each image counting once, for a least-squares map from :func:`_columns` to colours;
    and the scores of the last images."""

    squares: torch.Tensor
    products: torch.Tensor
    colours: torch.Tensor
    count: int = 0
    scores: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def learn(self, columns: torch.Tensor, colours: torch.Tensor) -> None:
        self.squares += columns.T @ columns / len(columns)
        self.products += columns.T @ colours / len(columns)
        self.colours += colours.T @ colours / len(columns)
        self.count += 1

    def score(self, columns: torch.Tensor, colours: torch.Tensor) -> tuple[float, float]:
        """By how much the best exchange of the colours fits better than none (below 0: worse); how badly they fit."""
        one = torch.eye(len(self.squares), dtype=torch.float64)
        known = torch.linalg.solve(self.squares + 1e-3 * one, self.products)
        errors = (self.colours - known.T @ self.products) / max(1, self.count)
        precision = torch.linalg.inv((errors + errors.T) / 2 + 1e-4 * one[:3, :3])
        expected = columns @ known

        def far(shown: torch.Tensor) -> torch.Tensor:
            return (((expected - shown) @ precision) * (expected - shown)).sum(1)

        own = far(colours)
        exchanged = [float((torch.log1p(own / 3) - torch.log1p(far(colours[:, o]) / 3)).mean()) for o in _EXCHANGED]
        return max(exchanged), float(own.mean())

    def doubts(self, scores: tuple[float, float]) -> bool:
        """Whether an image of these scores is among the most doubtful; always while little is known."""
        if self.count < FIRST:
            return True
        before = torch.tensor(list(self.scores), dtype=torch.float64)
        return any(
            score >= float(before[:, number].quantile(1 - share))
            for number, (score, share) in enumerate(zip(scores, DOUBTED, strict=True))
        )


class Looks:
    """Looks at finished images; knows each VAE by the images that it decoded without a mark. Thread-safe."""

    def __init__(self) -> None:
        self._maps: dict[str, _Map] = {}
        self._lock = threading.Lock()

    def marks(
        self, vae: str, latents: torch.Tensor, pixels: torch.Tensor, again: Callable[[], torch.Tensor]
    ) -> list[str]:
        """What is suspicious. ``vae``: the VAE's digest; ``latents``: (1, 4, h, w); ``pixels``: uint8 (8h, 8w, 3), in
        host memory; ``again``: decodes the latents once more, to such pixels."""
        values = latents[0].detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)
        height, width = values.shape[1:]
        spread = float(values.std())
        if contrast(pixels) < CONSTANT:
            return ["it is of one colour"]
        if not SPREAD[0] <= spread <= SPREAD[1]:
            return [f"its latents spread by {spread:.2f}, where those of images spread by about 1"]
        if height * width >= TELLING and alike(values) < NOISE and related(values) < APART:
            return ["it looks like noise"]
        every = max(1, height * width // FEW) | 1  # Odd, so as not to fall on the same columns in each row.
        columns, colours = _columns(values)[::every], small(pixels, height, width)[::every]
        with self._lock:
            known = self._maps.setdefault(vae, _empty(columns.shape[1]))
            scores = known.score(columns, colours)
            doubted = known.doubts(scores)
        if doubted and differ(pixels, again(), height, width) > DIFFERENT:
            return ["its VAE makes another picture of the same latents"]
        with self._lock:
            known.learn(columns, colours)
            if known.count > SURE:
                known.scores.append(scores)
        return []


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


def related(latents: torch.Tensor) -> float:
    """The highest correlation, of either sign, of two channels of latents (4, h, w); 0 for noise."""
    values = (latents - latents.mean((1, 2), keepdim=True)).flatten(1)
    values = values / values.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return float((values @ values.T).triu(1).abs().max())


def small(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The colours (h * w, 3), from 0 to 1, that each latent covers."""
    planes = pixels.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(planes, (height, width), mode="area")[0].flatten(1).T.double()


def differ(one: torch.Tensor, other: torch.Tensor, height: int, width: int) -> float:
    """The largest difference, of 255, of the mean colours that a latent covers."""
    return float((small(one, height, width) - small(other, height, width)).abs().max()) * 255


def _empty(count: int) -> _Map:
    squares, products, colours = (
        torch.zeros(shape, dtype=torch.float64) for shape in ((count, count), (count, 3), (3, 3))
    )
    return _Map(squares, products, colours)


def _columns(latents: torch.Tensor) -> torch.Tensor:
    """(h * w, 75), from latents (4, h, w): each latent and its 8 neighbours, its products, and how it is to the image's
    mean and spread, since a decoder's normalisations make one depend on all."""
    own = latents.flatten(1).T
    around = F.unfold(F.pad(latents[None], (1, 1, 1, 1), mode="replicate"), 3)[0].T
    first, second = torch.triu_indices(4, 4)
    mean, spread = own.mean(0), own.std(0)
    whole = torch.cat([mean, spread, mean / (spread + 0.1), torch.ones(1, dtype=own.dtype)]).expand(len(own), -1)
    normal = [own * mean, own * spread, own / (spread + 0.1), (own - mean) / (spread + 0.1)]
    return torch.cat([around, own[:, first] * own[:, second], *normal, whole], 1)
