"""The table of Z-Image's transformer. Names are those of ``diffusers.ZImageTransformer2DModel`` and of the original.

The original fuses the three projections of an attention into ``attention.qkv``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import (
    NotThisArchitecture,
    Shapes,
    TensorRow,
    TensorSource,
    count_indexed,
    row,
    weight_and_bias,
)

PATCH = 2
"""Latents per token in each direction."""

TIME_WIDTH, TIME_HIDDEN = 256, 1024
"""Widths of the time embedding: of its input (and output, in models at least that wide), and of its hidden layer."""

TEXT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class ZImageConfig(Config):
    """Settings of a Z-Image transformer.

    ``layers``: blocks that compute on image and text together.
    ``refiner_layers``: blocks before them, as many for the image alone as for the text alone.
    ``head_size``: width of an attention head.
    ``text_width``: width of the text encoder's hidden states.
    """

    architecture: ClassVar[str] = "z-image"
    channels: int
    width: int
    layers: int
    refiner_layers: int
    head_size: int
    text_width: int

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        tokens = 2 * (pixels // 256 + TEXT_TOKENS)
        scores = self.width // self.head_size * tokens**2 // 2 * itemsize if quadratic else 0
        # Rotary embeddings compute in fp32.
        return (
            tokens * (6 * self.width + 3 * feed_forward_width(self.width)) * itemsize
            + 4 * tokens * self.width * 4
            + scores
        )

    def rows(self) -> Iterator[TensorRow]:
        yield from weight_and_bias("t_embedder.mlp.0", (TIME_HIDDEN, TIME_WIDTH))
        yield from weight_and_bias("t_embedder.mlp.2", (time_width(self.width), TIME_HIDDEN))
        patch = self.channels * PATCH**2
        yield from weight_and_bias("all_x_embedder.2-1", (self.width, patch), "x_embedder")
        yield row("x_pad_token", (1, self.width))
        for n in range(self.refiner_layers):
            yield from block(f"noise_refiner.{n}", self.width, self.head_size, modulated=True)
        yield row("cap_embedder.0.weight", (self.text_width,))
        yield from weight_and_bias("cap_embedder.1", (self.width, self.text_width))
        yield row("cap_pad_token", (1, self.width))
        for n in range(self.refiner_layers):
            yield from block(f"context_refiner.{n}", self.width, self.head_size, modulated=False)
        for n in range(self.layers):
            yield from block(f"layers.{n}", self.width, self.head_size, modulated=True)
        last = "all_final_layer.2-1", "final_layer"
        for name, shape in (
            ("adaLN_modulation.1", (self.width, time_width(self.width))),
            ("linear", (patch, self.width)),
        ):
            yield from weight_and_bias(f"{last[0]}.{name}", shape, f"{last[1]}.{name}")


def block(name: str, width: int, head_size: int, modulated: bool) -> Iterator[TensorRow]:
    """Yield the tensors of a block. ``modulated``: it reads the time."""
    attention, hidden = f"{name}.attention", feed_forward_width(width)
    if modulated:
        yield from weight_and_bias(f"{name}.adaLN_modulation.0", (4 * width, time_width(width)))
    yield row(f"{name}.attention_norm1.weight", (width,))
    for index, part in enumerate(("to_q", "to_k", "to_v")):
        fused = TensorSource(f"{attention}.qkv.weight", (index, 3))
        yield row(f"{attention}.{part}.weight", (width, width), fused)
    yield row(f"{attention}.norm_q.weight", (head_size,), f"{attention}.q_norm.weight")
    yield row(f"{attention}.norm_k.weight", (head_size,), f"{attention}.k_norm.weight")
    yield row(f"{attention}.to_out.0.weight", (width, width), f"{attention}.out.weight")
    yield row(f"{name}.attention_norm2.weight", (width,))
    yield row(f"{name}.ffn_norm1.weight", (width,))
    yield row(f"{name}.feed_forward.w1.weight", (hidden, width))
    yield row(f"{name}.feed_forward.w3.weight", (hidden, width))
    yield row(f"{name}.feed_forward.w2.weight", (width, hidden))
    yield row(f"{name}.ffn_norm2.weight", (width,))


def feed_forward_width(width: int) -> int:
    """Return the width of the feed-forward layers of blocks of a width."""
    return int(width / 3 * 8)


def time_width(width: int) -> int:
    """Return the width of the time embedding that blocks of a width read."""
    return min(width, TIME_WIDTH)


def infer(shapes: Shapes) -> ZImageConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    try:
        width, text_width = shapes["cap_embedder.1.weight"]
        embedder = shapes.get("all_x_embedder.2-1.weight") or shapes["x_embedder.weight"]
        attention = "context_refiner.0.attention"
        norm = shapes.get(f"{attention}.norm_q.weight") or shapes[f"{attention}.q_norm.weight"]
        return ZImageConfig(
            embedder[1] // PATCH**2,
            width,
            count_indexed(shapes, "layers."),
            count_indexed(shapes, "context_refiner."),
            norm[0],
            text_width,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise NotThisArchitecture(f"the transformer has no tensor {error}") from error


def block_of(names: Iterable[str]) -> str:
    """Return the block that contains a module: ``L00`` and so on for the common layers, else ``BASE``."""
    for name in names:
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if kind == "layers" and number.isdecimal():
            return f"L{int(number):02d}"
    return "BASE"
