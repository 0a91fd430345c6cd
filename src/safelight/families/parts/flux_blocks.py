"""The blocks of FLUX.1's transformer, which Chroma shares: their tensors, without the modulation.

Names are those of diffusers and of the original. The original fuses projections: the three of an attention into
``qkv``, and in single blocks also that of the feed-forward layer into ``linear1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from safelight.families.parts.tokens import shift_by_size
from safelight.families.tables import TensorRow, TensorSource, row, weight_and_bias

TEXT_TOKENS = 512

STREAMS = (
    ("", "img", "to_q", "to_k", "to_v", "to_out.0"),
    ("_context", "txt", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
"""For the image and for the text: the ending of diffusers' names, the original's, and diffusers' four projections."""

_FEWEST_TOKENS, _LEAST_MU = 256, 0.5
_MOST_TOKENS, _MOST_MU = 4096, 1.15


mu = shift_by_size((_FEWEST_TOKENS, _LEAST_MU), (_MOST_TOKENS, _MOST_MU))
"""The shift of the noise levels, by the number of tokens."""


def working_bytes(pixels: int, width: int, head_size: int, itemsize: int, quadratic: bool) -> int:
    """Estimate the bytes of activations in a forward pass; see :meth:`safelight.families.family.Config.working_bytes`.

    ``width``: of the transformer.
    ``head_size``: width of an attention head.
    """
    tokens = pixels // 256 + TEXT_TOKENS
    scores = width // head_size * tokens**2 * itemsize if quadratic else 0
    # Rotary embeddings compute in fp32.
    return tokens * 16 * width * itemsize + 4 * tokens * width * 4 + scores


def double_block(name: str, other: str, wide: int, head_size: int) -> Iterator[TensorRow]:
    """Yield the tensors of a block that has weights of its own for the text.

    ``name``, ``other``: diffusers' name and the original's.
    ``wide``: width of the transformer.
    """
    for end, stream, *projections, out in STREAMS:
        attention, original = f"{name}.attn", f"{other}.{stream}_attn"
        for index, projection in enumerate(projections):
            for kind, shape in (("weight", (wide, wide)), ("bias", (wide,))):
                yield row(f"{attention}.{projection}.{kind}", shape, TensorSource(f"{original}.qkv.{kind}", (index, 3)))
        added = "added_" if end else ""
        yield row(f"{attention}.norm_{added}q.weight", (head_size,), f"{original}.norm.query_norm.scale")
        yield row(f"{attention}.norm_{added}k.weight", (head_size,), f"{original}.norm.key_norm.scale")
        yield from weight_and_bias(f"{attention}.{out}", (wide, wide), f"{original}.proj")
    for end, stream, *_ in STREAMS:
        yield from weight_and_bias(f"{name}.ff{end}.net.0.proj", (4 * wide, wide), f"{other}.{stream}_mlp.0")
        yield from weight_and_bias(f"{name}.ff{end}.net.2", (wide, 4 * wide), f"{other}.{stream}_mlp.2")


def single_block(name: str, other: str, wide: int, head_size: int) -> Iterator[TensorRow]:
    """Yield the tensors of a block that has the same weights for image and text; see :func:`double_block`."""
    parts = (("proj_mlp", 3, 4 * wide), ("attn.to_q", 0, wide), ("attn.to_k", 1, wide), ("attn.to_v", 2, wide))
    for part, before, rows in parts:
        for kind, shape in (("weight", (rows, wide)), ("bias", (rows,))):
            fused = TensorSource(f"{other}.linear1.{kind}", rows=(before * wide, 7 * wide))
            yield row(f"{name}.{part}.{kind}", shape, fused)
    yield row(f"{name}.attn.norm_q.weight", (head_size,), f"{other}.norm.query_norm.scale")
    yield row(f"{name}.attn.norm_k.weight", (head_size,), f"{other}.norm.key_norm.scale")
    yield from weight_and_bias(f"{name}.proj_out", (wide, 5 * wide), f"{other}.linear2")


_LETTERS = {
    "transformer_blocks": "D",
    "double_blocks": "D",
    "single_transformer_blocks": "S",
    "single_blocks": "S",
}


def block_of(names: Iterable[str]) -> str:
    """Return the block that contains a module: ``D00`` for double blocks, ``S00`` for single ones, else ``BASE``."""
    for name in names:
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if kind in _LETTERS and number.isdecimal():
            return f"{_LETTERS[kind]}{int(number):02d}"
    return "BASE"
