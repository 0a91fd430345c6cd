"""The table of FLUX.2's transformer. Names are those of ``diffusers.Flux2Transformer2DModel`` and of the original.

The original fuses the three projections of an attention into ``qkv``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, TensorSource, count_indexed, row

TIME_WIDTH = 256
"""Width of the time embedding's input."""

HIDDEN_RATIO = 3
"""Width of the feed-forward layers by that of the transformer."""

TEXT_TOKENS = 512

_GUIDANCE = ("time_guidance_embed.guidance_embedder.", "guidance_in.")

_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
"""The projections of the text in an attention."""

_NUMBERED = re.compile(r"(double_blocks|transformer_blocks|single_blocks|single_transformer_blocks)\.([0-9]+)\.")


@dataclass(frozen=True, slots=True)
class Flux2Config(Config):
    """Settings of a transformer of FLUX.2 that has no guidance scale as an input.

    ``double_layers``: blocks with separate weights for text and image; ``single_layers``: blocks after them, with the
    same weights for both.
    ``head_size``: width of an attention head.
    ``text_width``: width of the text that it reads.
    """

    architecture: ClassVar[str] = "flux2"
    channels: int
    width: int
    double_layers: int
    single_layers: int
    head_size: int
    text_width: int

    @property
    def label(self) -> str:
        return f"{self.width}x{self.double_layers}+{self.single_layers}"

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers."""
        return self.width * HIDDEN_RATIO

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        # A call has one row. A single block holds its input, its normalised input, the fused projection, and the
        # concatenation of attention and feed-forward layer at once.
        tokens = pixels // 256 + TEXT_TOKENS
        scores = self.width // self.head_size * tokens**2 * itemsize if quadratic else 0
        # Rotary embeddings compute in fp32.
        return tokens * (10 * self.width + 4 * self.hidden) * itemsize + 4 * tokens * self.width * 4 + scores

    def rows(self) -> Iterator[TensorRow]:
        wide = self.width
        time = "time_guidance_embed.timestep_embedder"
        yield row(f"{time}.linear_1.weight", (wide, TIME_WIDTH), "time_in.in_layer.weight")
        yield row(f"{time}.linear_2.weight", (wide, wide), "time_in.out_layer.weight")
        for name, count in (
            ("double_stream_modulation_img", 6),
            ("double_stream_modulation_txt", 6),
            ("single_stream_modulation", 3),
        ):
            yield row(f"{name}.linear.weight", (count * wide, wide), f"{name}.lin.weight")
        yield row("x_embedder.weight", (wide, self.channels), "img_in.weight")
        yield row("context_embedder.weight", (wide, self.text_width), "txt_in.weight")
        for n in range(self.double_layers):
            yield from self._double(f"transformer_blocks.{n}", f"double_blocks.{n}")
        for n in range(self.single_layers):
            yield from self._single(f"single_transformer_blocks.{n}", f"single_blocks.{n}")
        # Its halves are scale and shift; the original has the shift first.
        last = TensorSource("final_layer.adaLN_modulation.1.weight", swap_halves=True)
        yield row("norm_out.linear.weight", (2 * wide, wide), last)
        yield row("proj_out.weight", (self.channels, wide), "final_layer.linear.weight")

    def _double(self, ours: str, theirs: str) -> Iterator[TensorRow]:
        square, attention = (self.width, self.width), f"{ours}.attn"
        for stream, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", _ADDED)):
            for index, part in enumerate(parts):
                fused = TensorSource(f"{theirs}.{stream}_attn.qkv.weight", (index, 3))
                yield row(f"{attention}.{part}.weight", square, fused)
        for stream, query, key in (("img", "norm_q", "norm_k"), ("txt", "norm_added_q", "norm_added_k")):
            yield from self._norms(attention, f"{theirs}.{stream}_attn.norm", query, key)
        yield row(f"{attention}.to_add_out.weight", square, f"{theirs}.txt_attn.proj.weight")
        yield row(f"{attention}.to_out.0.weight", square, f"{theirs}.img_attn.proj.weight")
        for part, stream in (("ff", "img"), ("ff_context", "txt")):
            yield row(
                f"{ours}.{part}.linear_in.weight", (2 * self.hidden, self.width), f"{theirs}.{stream}_mlp.0.weight"
            )
            yield row(f"{ours}.{part}.linear_out.weight", (self.width, self.hidden), f"{theirs}.{stream}_mlp.2.weight")

    def _single(self, ours: str, theirs: str) -> Iterator[TensorRow]:
        attention = f"{ours}.attn"
        fused = 3 * self.width + 2 * self.hidden
        yield row(f"{attention}.to_qkv_mlp_proj.weight", (fused, self.width), f"{theirs}.linear1.weight")
        yield from self._norms(attention, f"{theirs}.norm", "norm_q", "norm_k")
        yield row(f"{attention}.to_out.weight", (self.width, self.width + self.hidden), f"{theirs}.linear2.weight")

    def _norms(self, ours: str, theirs: str, query: str, key: str) -> Iterator[TensorRow]:
        for name, other in ((query, "query_norm"), (key, "key_norm")):
            yield row(f"{ours}.{name}.weight", (self.head_size,), f"{theirs}.{other}.scale")


def adapter_sources(name: str) -> Iterator[TensorSource]:
    """Yield the name of a double block's fused projection in diffusers, which LoKr adapters change as a whole."""
    block, _, rest = name.rpartition(".attn.")
    for fused, parts in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_added_qkv", _ADDED)):
        for index, part in enumerate(parts):
            if rest == f"{part}.weight" and block.startswith("transformer_blocks."):
                yield TensorSource(f"{block}.attn.{fused}.weight", (index, len(parts)))


def infer(shapes: Shapes) -> Flux2Config:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    if any(name.startswith(_GUIDANCE) for name in shapes):
        raise NotThisArchitecture("the transformer has a guidance scale as an input, as FLUX.2 dev")

    def of(name: str, other: str) -> tuple[int, ...]:
        return shapes[name] if name in shapes else shapes[other]

    try:
        # FLUX.1 has many of these names, but each of its blocks has a modulation of its own.
        width = of("single_stream_modulation.linear.weight", "single_stream_modulation.lin.weight")[1]
        return Flux2Config(
            of("x_embedder.weight", "img_in.weight")[1],
            width,
            count_indexed(shapes, "transformer_blocks.") or count_indexed(shapes, "double_blocks."),
            count_indexed(shapes, "single_transformer_blocks.") or count_indexed(shapes, "single_blocks."),
            of("transformer_blocks.0.attn.norm_q.weight", "double_blocks.0.img_attn.norm.query_norm.scale")[0],
            of("context_embedder.weight", "txt_in.weight")[1],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise NotThisArchitecture(f"the transformer has no tensor {error}") from error


def block_of(names: Iterable[str]) -> str:
    """Return the block that contains a module: ``D00`` and so on for blocks with separate weights for text and image,
    ``S00`` and so on for the blocks after them, else ``BASE``."""
    for name in names:
        found = _NUMBERED.match(name)
        if found is not None:
            return f"{'S' if found[1].startswith('single') else 'D'}{int(found[2]):02d}"
    return "BASE"
