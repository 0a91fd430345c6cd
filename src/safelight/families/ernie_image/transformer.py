"""The table of ERNIE-Image's transformer. The original has the names of ``diffusers.ErnieImageTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row, weight_and_bias

TEXT_TOKENS = 512
"""The usual number of tokens of a prompt, for the estimate of the working memory."""


@dataclass(frozen=True, slots=True)
class ErnieImageConfig(Config):
    """Settings of an ERNIE-Image transformer.

    ``channels``: of the latents.
    ``hidden``: width of the feed-forward layers.
    ``head_size``: width of an attention head.
    ``text_width``: width of the text encoder's hidden states.
    """

    architecture: ClassVar[str] = "ernie-image"
    channels: int
    width: int
    hidden: int
    layers: int
    head_size: int
    text_width: int

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        # A call has the rows of both prompts. The modulation of every token is stored, and applied in fp32.
        tokens = 2 * (pixels // 256 + TEXT_TOKENS)
        scores = self.width // self.head_size * tokens**2 // 2 * itemsize if quadratic else 0
        return tokens * (12 * self.width + 3 * self.hidden) * itemsize + 3 * tokens * self.width * 4 + scores

    def rows(self) -> Iterator[TensorRow]:
        wide = self.width
        yield from weight_and_bias("x_embedder.proj", (wide, self.channels, 1, 1))
        yield row("text_proj.weight", (wide, self.text_width))
        yield from weight_and_bias("time_embedding.linear_1", (wide, wide))
        yield from weight_and_bias("time_embedding.linear_2", (wide, wide))
        yield from weight_and_bias("adaLN_modulation.1", (6 * wide, wide))
        for n in range(self.layers):
            yield from self._block(f"layers.{n}")
        yield from weight_and_bias("final_norm.linear", (2 * wide, wide))
        yield from weight_and_bias("final_linear", (self.channels, wide))

    def _block(self, name: str) -> Iterator[TensorRow]:
        wide, attention = self.width, f"{name}.self_attention"
        yield row(f"{name}.adaLN_sa_ln.weight", (wide,))
        for part in ("to_q", "to_k", "to_v"):
            yield row(f"{attention}.{part}.weight", (wide, wide))
        for part in ("norm_q", "norm_k"):
            yield row(f"{attention}.{part}.weight", (self.head_size,))
        yield row(f"{attention}.to_out.0.weight", (wide, wide))
        yield row(f"{name}.adaLN_mlp_ln.weight", (wide,))
        yield row(f"{name}.mlp.gate_proj.weight", (self.hidden, wide))
        yield row(f"{name}.mlp.up_proj.weight", (self.hidden, wide))
        yield row(f"{name}.mlp.linear_fc2.weight", (wide, self.hidden))


def infer(shapes: Shapes) -> ErnieImageConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    try:
        # No unpacking: a wrong number of axes is better named as a wrong shape.
        norm = shapes["layers.0.self_attention.norm_q.weight"]
        embedder = shapes["x_embedder.proj.weight"]
        return ErnieImageConfig(
            shapes["final_linear.weight"][0],
            embedder[0],
            shapes["layers.0.mlp.gate_proj.weight"][0],
            count_indexed(shapes, "layers."),
            norm[0],
            shapes["text_proj.weight"][-1],
        )
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the transformer has no tensor {error}") from error


def block_of(names: Iterable[str]) -> str:
    """Return the block that contains a module: ``L00`` and so on, else ``BASE``."""
    for name in names:
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if kind == "layers" and number.isdecimal():
            return f"L{int(number):02d}"
    return "BASE"
