"""Marks images that look suspicious: constant colour, noise, or not what the VAE decodes from their latents.

A mark is not a failure. A plain background is constant, and an image after one step is noise; both can be correct.

Three things are checked: the contrast of the image; the standard deviation of the latents and the correlation of
neighbouring latents, which is low for noise in every channel; and whether the VAE decodes the same latents to the same
pixels again. A decoder is deterministic, so the last check never marks a correct image, for any content and any VAE,
and it needs no calibration. It does not find errors that are the same each time; the canary does.

Decoding again costs as much as decoding. So only the most doubtful images of each VAE are decoded again. For this, a
least-squares map from latents to colours is learnt from earlier images. It says how far an image is from the expected
colours, and whether the image would fit better with its RGB channels permuted. The map only selects images; it never
marks one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch.nn import functional as F

MIN_CONTRAST = 1.0
"""Of 255. An image with less contrast than this has a single colour."""

NORMAL_DEVIATION = (0.15, 4.0)
"""The normal range of the standard deviation of an image's latents. They are scaled to about 1."""

MIN_NEIGHBOUR_CORRELATION = 0.1
"""Correlation of neighbouring latents. If it is lower in every channel, an image of :data:`MIN_LATENTS` latents or more
looks like noise."""

MAX_CHANNEL_CORRELATION = 0.5
"""Correlation of two channels. Above it an image is not noise but a fine texture (gravel, grass, a QR code)."""

MIN_LATENTS = 1024
"""The number of latents from which these correlations are distinguishable from chance."""

ALWAYS_CHECKED = 100
"""All images are decoded again until a VAE has made this many. After that, only doubtful ones are."""

MIN_MAP_IMAGES = 50
"""After this many images, a VAE's map is good enough that its scores are comparable with later ones."""

SCORE_WINDOW = 200
"""How many earlier scores an image is compared with."""

DOUBTFUL_SHARES = (0.25, 0.05)
"""Which share of a VAE's images is decoded again: of those whose colours fit best with exchanged channels, and of those
that fit the map worst."""

MAP_SAMPLES = 1024
"""About how many latents of an image, evenly spaced, the map uses."""

MAX_COLOUR_DIFFERENCE = 3.0
"""Of 255. If the mean colour under one latent differs by more than this, the second decoding is different."""

_PERMUTED = [list(order) for order in permutations(range(3))][1:]


@dataclass(slots=True)
class _Map:
    """A least-squares map from :func:`_features` to colours, for one VAE.

    ``feature_gram``, ``feature_colour_gram``, ``colour_gram``: the normal equations of the least-squares fit. They are
    sums over images of X^T X, X^T Y and Y^T Y, each divided by the image's number of samples. X: features, Y: colours.
    ``count``: number of images.
    ``scores``: scores of the latest images.
    """

    feature_gram: torch.Tensor
    feature_colour_gram: torch.Tensor
    colour_gram: torch.Tensor
    count: int = 0
    scores: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SCORE_WINDOW))

    def learn(self, features: torch.Tensor, colours: torch.Tensor) -> None:
        self.feature_gram += features.T @ features / len(features)
        self.feature_colour_gram += features.T @ colours / len(features)
        self.colour_gram += colours.T @ colours / len(features)
        self.count += 1

    def score(self, features: torch.Tensor, colours: torch.Tensor) -> tuple[float, float]:
        """Return (permutation, misfit).

        ``permutation``: how much better the image would fit with its RGB channels permuted; negative if worse.
        ``misfit``: how badly the image fits the map.
        """
        identity = torch.eye(len(self.feature_gram), dtype=torch.float64)
        coefficients = torch.linalg.solve(self.feature_gram + 1e-3 * identity, self.feature_colour_gram)
        residual_covariance = (self.colour_gram - coefficients.T @ self.feature_colour_gram) / max(1, self.count)
        precision = torch.linalg.inv((residual_covariance + residual_covariance.T) / 2 + 1e-4 * identity[:3, :3])
        expected = features @ coefficients

        def misfit(shown: torch.Tensor) -> torch.Tensor:
            return (((expected - shown) @ precision) * (expected - shown)).sum(1)

        own = misfit(colours)
        permuted = [float((torch.log1p(own / 3) - torch.log1p(misfit(colours[:, o]) / 3)).mean()) for o in _PERMUTED]
        return max(permuted), float(own.mean())

    def doubts(self, scores: tuple[float, float]) -> bool:
        """Whether these scores are among the most doubtful. True for the first :data:`ALWAYS_CHECKED` images."""
        if self.count < ALWAYS_CHECKED:
            return True
        before = torch.tensor(list(self.scores), dtype=torch.float64)
        return any(
            score >= float(before[:, number].quantile(1 - share))
            for number, (score, share) in enumerate(zip(scores, DOUBTFUL_SHARES, strict=True))
        )


class AppearanceCheck:
    """Checks finished images. It learns a map for each VAE from its unmarked images. Thread-safe."""

    def __init__(self) -> None:
        self._maps: dict[str, _Map] = {}
        self._lock = threading.Lock()

    def marks(
        self, vae_digest: str, latents: torch.Tensor, pixels: torch.Tensor, again: Callable[[], torch.Tensor]
    ) -> list[str]:
        """Return a phrase for each suspicious property of an image.

        ``latents``: (1, channels, h, w).
        ``pixels``: uint8 (height, width, 3), in host memory.
        ``again``: decodes the latents again and returns their pixels in the same form.
        """
        values = latents[0].detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)
        height, width = values.shape[1:]
        spread = float(values.std())
        if contrast(pixels) < MIN_CONTRAST:
            return ["it has a single colour"]
        if not NORMAL_DEVIATION[0] <= spread <= NORMAL_DEVIATION[1]:
            return [f"the standard deviation of its latents is {spread:.2f}; about 1 is normal"]
        if (
            height * width >= MIN_LATENTS
            and neighbour_correlation(values) < MIN_NEIGHBOUR_CORRELATION
            and channel_correlation(values) < MAX_CHANNEL_CORRELATION
        ):
            return ["it looks like noise"]
        # An odd stride, so that the samples are not at the same x positions in every row of latents.
        stride = max(1, height * width // MAP_SAMPLES) | 1
        features, colours = _features(values, stride), mean_colours(pixels, height, width)[::stride]
        with self._lock:
            known = self._maps.setdefault(vae_digest, _empty_map(features.shape[1]))
            scores = known.score(features, colours)
            doubtful = known.doubts(scores)
        if doubtful and largest_colour_difference(pixels, again(), height, width) > MAX_COLOUR_DIFFERENCE:
            return ["its VAE decodes the same latents to a different picture"]
        with self._lock:
            known.learn(features, colours)
            if known.count > MIN_MAP_IMAGES:
                known.scores.append(scores)
        return []


def contrast(pixels: torch.Tensor) -> float:
    """Return the standard deviation of all values, of 255."""
    return float(pixels.float().std())


def neighbour_correlation(latents: torch.Tensor) -> float:
    """Return the correlation of latents (channels, h, w) with their right and lower neighbours, in the best channel.

    Noise: 0 in every channel. Images: near 1 in some channel. Where a VAE has many channels, most of them may have high
    frequencies (Skorokhodov et al. 2025, arXiv 2502.14831).
    """
    values = latents - latents.mean((1, 2), keepdim=True)
    variance = (values * values).mean((1, 2))
    if not variance.any():
        return 1.0
    zero = variance.new_zeros(len(values))
    beside = (values[:, :, 1:] * values[:, :, :-1]).mean((1, 2)) if values.shape[2] > 1 else zero
    below = (values[:, 1:] * values[:, :-1]).mean((1, 2)) if values.shape[1] > 1 else zero
    return float(((beside + below) / 2 / variance.clamp(min=1e-18)).max())


def channel_correlation(latents: torch.Tensor) -> float:
    """Return the largest absolute correlation of two channels of latents (channels, h, w). Noise: 0."""
    values = (latents - latents.mean((1, 2), keepdim=True)).flatten(1)
    values = values / values.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return float((values @ values.T).triu(1).abs().max())


def mean_colours(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the mean colours under each latent, (h * w, 3), from 0 to 1."""
    planes = pixels.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(planes, (height, width), mode="area")[0].flatten(1).T.double()


def largest_colour_difference(one: torch.Tensor, other: torch.Tensor, height: int, width: int) -> float:
    """Return the largest difference, of 255, between two images' mean colours under a latent."""
    return float((mean_colours(one, height, width) - mean_colours(other, height, width)).abs().max()) * 255


def _empty_map(count: int) -> _Map:
    feature_gram, feature_colour_gram, colour_gram = (
        torch.zeros(shape, dtype=torch.float64) for shape in ((count, count), (count, 3), (3, 3))
    )
    return _Map(feature_gram, feature_colour_gram, colour_gram)


def _features(latents: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Compute the map's inputs, (samples, count), of every ``stride``-th of the latents (channels, h, w).

    They are each latent, its 8 neighbours, the products of each pair of its channels, and its relation to the image's
    mean and standard deviation. The last are needed because a decoder's normalisations make each colour depend on all
    latents. Those of all latents would take gigabytes for a large image of a VAE with many channels.
    """
    every = latents.flatten(1).T
    mean, spread = every.mean(0), every.std(0, correction=0)  # An image may have a single latent.
    at = torch.arange(0, len(every), stride)
    own, rows, columns = every[at], at // latents.shape[2], at % latents.shape[2]
    padded = F.pad(latents[None], (1, 1, 1, 1), mode="replicate")[0]
    around = torch.stack([padded[:, rows + down, columns + right] for down in range(3) for right in range(3)], 1)
    first, second = torch.triu_indices(own.shape[1], own.shape[1])
    whole = torch.cat([mean, spread, mean / (spread + 0.1), torch.ones(1, dtype=own.dtype)]).expand(len(own), -1)
    normal = [own * mean, own * spread, own / (spread + 0.1), (own - mean) / (spread + 0.1)]
    return torch.cat([around.flatten(0, 1).T, own[:, first] * own[:, second], *normal, whole], 1)
