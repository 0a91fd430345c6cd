"""The vision encoder of Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): the table of its tensors.

Its files are those of the language model: the names of its tensors begin with ``visual.``. The size of the grid in
which it sees a picture is here, too, because the number of a text's tokens depends on it. No torch here.
"""

from __future__ import annotations

import math
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

PREFIXES = ("visual.", "model.visual.")
"""What the names of its tensors begin with: in the published files, and in those of transformers 5."""

PATTERN = r"(model\.)?visual\."
"""Matches each of :data:`PREFIXES`."""

HEAD_SIZE = 80
"""Width of an attention head. Shapes do not tell it."""

WINDOW = 112
"""Pixels per side of a window of attention."""

FULL_ATTENTION = 8
"""Every eighth block attends to the whole picture, the others to windows."""

PATCH, MERGED, FRAMES, CHANNELS = 14, 2, 2, 3
"""Pixels per patch in each direction, patches per token in each direction, frames per patch, colours."""

LEAST_PIXELS, MOST_PIXELS = 56 * 56, 28 * 28 * 16384
"""The bounds of a picture's size in the published ``preprocessor_config.json``."""

MOST_RATIO = 200
"""How many times as long as the other a side may be."""

Grid = tuple[int, int]
"""Rows and columns of a picture's patches. Both are divisible by :data:`MERGED`."""


@dataclass(frozen=True, slots=True)
class Qwen25VisionConfig(Config):
    """Settings of the vision encoder of a Qwen2.5-VL.

    ``returned``: width of what it returns, which is that of the language model.
    """

    architecture: ClassVar[str] = "qwen2.5-vision"
    width: int
    intermediate: int
    layers: int
    returned: int

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    @property
    def heads(self) -> int:
        return self.width // HEAD_SIZE

    @property
    def full_attention_blocks(self) -> list[int]:
        return [n for n in range(self.layers) if n % FULL_ATTENTION == FULL_ATTENTION - 1]

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        patches = pixels // PATCH**2
        states = patches * (8 * self.width + 3 * self.intermediate) * itemsize
        # Pictures, norms and rotary embeddings are fp32.
        fp32 = patches * (2 * CHANNELS * FRAMES * PATCH**2 + 5 * self.width) * 4
        return states + fp32 + (self.heads * patches**2 * itemsize if quadratic else 0)

    def rows(self) -> Iterator[TensorRow]:
        wide, merged = self.width, self.width * MERGED**2
        yield row("patch_embed.proj.weight", (wide, CHANNELS, FRAMES, PATCH, PATCH), *_files("patch_embed.proj.weight"))
        for n in range(self.layers):
            block = f"blocks.{n}"
            yield row(f"{block}.norm1.weight", (wide,), *_files(f"{block}.norm1.weight"))
            yield from _layer(f"{block}.attn.qkv", (3 * wide, wide))
            yield from _layer(f"{block}.attn.proj", (wide, wide))
            yield row(f"{block}.norm2.weight", (wide,), *_files(f"{block}.norm2.weight"))
            yield from _layer(f"{block}.mlp.gate_proj", (self.intermediate, wide))
            yield from _layer(f"{block}.mlp.up_proj", (self.intermediate, wide))
            yield from _layer(f"{block}.mlp.down_proj", (wide, self.intermediate))
        yield row("merger.ln_q.weight", (wide,), *_files("merger.ln_q.weight"))
        yield from _layer("merger.mlp.0", (merged, merged))
        yield from _layer("merger.mlp.2", (self.returned, merged))


def _files(name: str) -> Iterable[TensorSource]:
    return (TensorSource(prefix + name) for prefix in PREFIXES)


def _layer(name: str, weight: tuple[int, int]) -> Iterator[TensorRow]:
    return weight_and_bias(name, weight, *(prefix + name for prefix in PREFIXES))


def infer(shapes: Shapes) -> Qwen25VisionConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    try:
        prefix = next((one for one in ("", *PREFIXES) if any(name.startswith(f"{one}blocks.") for name in shapes)), "")
        layers = count_indexed(shapes, f"{prefix}blocks.")
        if any(_number(name, f"{prefix}blocks.") >= layers for name in shapes):
            raise KeyError(f"{prefix}blocks.{layers}.norm1.weight")
        return Qwen25VisionConfig(
            shapes[f"{prefix}patch_embed.proj.weight"][0],
            shapes[f"{prefix}blocks.0.mlp.gate_proj.weight"][0],
            layers,
            shapes[f"{prefix}merger.mlp.2.weight"][0],
        )
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the vision encoder has no tensor {error}") from error


def _number(name: str, prefix: str) -> int:
    """Return the number that follows a prefix in a name, -1 if the name begins otherwise."""
    number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
    return int(number) if number.isdecimal() and len(number) <= 4 else -1


def grid_of(size: tuple[int, int]) -> Grid:
    """Return the grid in which a picture is seen, as transformers' ``smart_resize`` chooses it.

    ``size``: width and height of the picture in pixels.
    """
    width, height = size
    token = PATCH * MERGED
    rows, columns = round(height / token), round(width / token)
    pixels = rows * columns * token**2
    if pixels > MOST_PIXELS:
        scale = math.sqrt(height * width / MOST_PIXELS)
        rows, columns = (max(1, math.floor(side / scale / token)) for side in (height, width))
    elif pixels < LEAST_PIXELS:
        scale = math.sqrt(LEAST_PIXELS / (height * width))
        rows, columns = (math.ceil(side * scale / token) for side in (height, width))
    return rows * MERGED, columns * MERGED


def count_tokens(grid: Grid) -> int:
    """Return how many tokens of a text a picture has."""
    return grid[0] * grid[1] // MERGED**2
