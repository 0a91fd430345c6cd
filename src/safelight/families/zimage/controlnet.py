"""Z-Image's ControlNets (Alibaba PAI's Fun-Controlnet-Union): blocks beside the transformer, with which they share its
embedders and refiners. Their outputs are added to those of some of its layers.

Names are those of ``diffusers.ZImageControlNetModel`` and of the published files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, weight_and_bias
from safelight.families.zimage.transformer import PATCH, TEXT_TOKENS, ZImageConfig, block, feed_forward_width

EMBEDDER = "control_all_x_embedder.2-1"


@dataclass(frozen=True, slots=True)
class ZImageControlNetConfig(Config):
    """Settings of a ControlNet.

    ``channels``: channels that it reads: latents of the picture, and in some also a mask and a second picture's.
    ``layers``: its blocks, each of which adds to one layer of the transformer.
    ``refiner_layers``: blocks before them.
    ``refines``: those also add to the refiner of the image (versions 2.0 and 2.1).
    """

    architecture: ClassVar[str] = "z-image-controlnet"
    channels: int
    width: int
    layers: int
    refiner_layers: int
    head_size: int
    refines: bool

    @property
    def label(self) -> str:
        return f"{self.channels}-{self.width}x{self.layers}"

    @property
    def reads_latents(self) -> bool:
        return True

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        tokens = 2 * (pixels // 256 + TEXT_TOKENS)
        scores = self.width // self.head_size * tokens**2 // 2 * itemsize if quadratic else 0
        activations = tokens * (6 * self.width + 3 * feed_forward_width(self.width)) * itemsize
        # Each block stacks the outputs of all blocks before it, so there are two stacks at a time.
        return activations + 2 * (self.layers + 1) * tokens * self.width * itemsize + scores

    def rows(self) -> Iterator[TensorRow]:
        yield from weight_and_bias(EMBEDDER, (self.width, self.channels * PATCH**2))
        for n in range(self.refiner_layers):
            yield from self._block(f"control_noise_refiner.{n}", n, self.refines)
        for n in range(self.layers):
            yield from self._block(f"control_layers.{n}", n, True)

    def _block(self, name: str, number: int, adds: bool) -> Iterator[TensorRow]:
        square = (self.width, self.width)
        if adds and not number:
            yield from weight_and_bias(f"{name}.before_proj", square)
        yield from block(name, self.width, self.head_size, modulated=True)
        if adds:
            yield from weight_and_bias(f"{name}.after_proj", square)


def infer(shapes: Shapes) -> ZImageControlNetConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    try:
        embedder = shapes[f"{EMBEDDER}.weight"]
        attention = "control_layers.0.attention"
        norm = shapes.get(f"{attention}.norm_q.weight") or shapes[f"{attention}.q_norm.weight"]
        return ZImageControlNetConfig(
            embedder[-1] // PATCH**2,
            embedder[0],
            count_indexed(shapes, "control_layers."),
            count_indexed(shapes, "control_noise_refiner."),
            norm[0],
            any(name.startswith("control_noise_refiner.0.after_proj.") for name in shapes),
        )
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the ControlNet has no tensor {error}") from error


def places(layers: int, count: int) -> list[int]:
    """Return the layers of a transformer to which ``count`` blocks add: evenly spaced, from the first one on.

    The published settings are those for 30 layers: every fifth for 6 blocks, every second for 15, every tenth for 3.
    """
    return [n * (layers // count) for n in range(count)]


def find_mismatch(control: Config, denoiser: Config) -> str | None:
    """Return why a ControlNet does not fit a transformer, None if it does."""
    if not isinstance(control, ZImageControlNetConfig) or not isinstance(denoiser, ZImageConfig):
        return "is a ControlNet of another architecture than {model}"
    for what, its, ours in (
        ("has blocks of width", control.width, denoiser.width),
        ("has heads of width", control.head_size, denoiser.head_size),
        ("refiner layers are", control.refiner_layers, denoiser.refiner_layers),
    ):
        if its != ours:
            return f"{what} {its}, but {ours} in {{model}}"
    if control.layers > denoiser.layers:
        return f"has {control.layers} blocks, but {{model}} has only {denoiser.layers} layers"
    if control.channels < denoiser.channels:
        return f"reads {control.channels} channels, but the latents of {{model}} have {denoiser.channels}"
    return None
