"""The latents of FLUX.1's VAE, which Z-Image and other families share."""

from __future__ import annotations

from safelight.families.family import Latents
from safelight.families.parts.vae import VAEConfig

SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159

FLUX_VAE = VAEConfig(3, 3, 16, (128, 256, 512, 512), 2, quantised=False)

_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
    (-0.0329, -0.0718, -0.0851),
)
"""The map from latents to colours between -1 and 1 that is widely used for previews. The last row is the bias."""


def _preview_factors() -> tuple[tuple[float, float, float], ...]:
    """Return the map to colours between 0 and 1."""
    halves = [(r / 2, g / 2, b / 2) for r, g, b in _FACTORS]
    r, g, b = halves[-1]
    return (*halves[:-1], (r + 0.5, g + 0.5, b + 0.5))


FLUX_LATENTS = Latents(
    channels=16,
    vae_scale_factor=8,
    multiple=16,
    scaling_factor=SCALING_FACTOR,
    shift_factor=SHIFT_FACTOR,
    latent_rgb_factors=_preview_factors(),
    fp32=True,
)
"""Each token of the transformer has two by two latents, so sides are multiples of 16 pixels."""
