"""CLIP text encoders. Infers their settings from a file's shapes, and their tensors from the settings.

Names are those of ``transformers.CLIPTextModel`` (with and without ``text_model.``, which version 5 drops when it
saves) and of OpenCLIP, in whose form SD 2 and SDXL's second encoder are published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, TensorSource, count_indexed, row
from safelight.families.tokenizer_file import ShippedTokenizer, TokenizerFile
from safelight.request.prompts.tokens import VOCABULARY


def tokenizer(role: str = "text_encoder") -> TokenizerFile:
    """Return where a checkpoint has the tokenizer of a CLIP. ``role``: that of the text encoder."""
    return TokenizerFile(f"{role.replace('text_encoder', 'tokenizer')}/tokenizer.json", shipped=_SHIPPED)


_SHIPPED = ShippedTokenizer("CLIP", VOCABULARY, replaceable=False)
# The grammars of prompts count CLIP's tokens before the checkpoint is known.

PATTERN = r"(text_model\.)?embeddings\.(token|position)_embedding\."
"""Matches tensors that a CLIP in a file of its own has."""


@dataclass(frozen=True, slots=True)
class CLIPConfig(Config):
    """Settings of a CLIP text encoder. ``projection``: width of the pooled output, None if there is none."""

    architecture: ClassVar[str] = "clip"

    width: int
    intermediate: int
    layers: int
    vocabulary: int
    positions: int
    projection: int | None
    activation: str

    def rows(self) -> Iterator[TensorRow]:
        return tensors(self)

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    @property
    def encoder_layers(self) -> int:
        return self.layers

    @property
    def hidden_size(self) -> int:
        return self.width

    @property
    def depends_on_size(self) -> bool:
        return False

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        del pixels, quadratic
        return self.positions * self.intermediate * 4 * itemsize


def infer(shapes: Shapes, activation: str, drop_last: bool = False) -> CLIPConfig:
    """Infer a text encoder's settings from its tensors' shapes.

    ``activation``: from the base (``quick_gelu`` for OpenAI's encoder, ``gelu`` for OpenCLIP's).
    ``drop_last``: leave out the last layer of an OpenCLIP encoder, because SD 2 was trained on the output before it.
    Raises NotThisArchitecture.
    """
    names = set(shapes)
    open_clip = "positional_embedding" in names
    prefix = "text_model." if "text_model.embeddings.token_embedding.weight" in names else ""
    try:
        if open_clip:
            layers = count_indexed(names, "transformer.resblocks.") - (1 if drop_last else 0)
            fc = shapes["transformer.resblocks.0.mlp.c_fc.weight"]
            token, position = shapes["token_embedding.weight"], shapes["positional_embedding"]
            projection = shapes["text_projection"][1] if "text_projection" in names else None
        else:
            layers = count_indexed(names, f"{prefix}encoder.layers.")
            fc = shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"]
            token = shapes[f"{prefix}embeddings.token_embedding.weight"]
            position = shapes[f"{prefix}embeddings.position_embedding.weight"]
            projection = shapes["text_projection.weight"][0] if "text_projection.weight" in names else None
        return CLIPConfig(token[1], fc[0], layers, token[0], position[0], projection, activation)
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the text encoder has no tensor {error}") from error


def without_projection(config: CLIPConfig) -> CLIPConfig:
    """Return the settings of the same encoder without its pooled output."""
    return replace(config, projection=None)


def tensors(config: CLIPConfig) -> Iterator[TensorRow]:
    """Yield every tensor of the text encoder, in the order of use.

    With a projection the names start with ``text_model.``, as in ``CLIPTextModelWithProjection``.
    """
    width, inner = config.width, config.intermediate
    prefix = "" if config.projection is None else "text_model."

    def hf(name: str, shape: tuple[int, ...], *others: str | TensorSource) -> TensorRow:
        spellings = [spelling for spelling in (name, f"text_model.{name}") if spelling != prefix + name]
        return row(prefix + name, shape, *spellings, *others)

    yield hf("embeddings.token_embedding.weight", (config.vocabulary, width), "token_embedding.weight")
    yield hf("embeddings.position_embedding.weight", (config.positions, width), "positional_embedding")
    for number in range(config.layers):
        ours, theirs = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for part, matrix in enumerate(("q_proj", "k_proj", "v_proj")):
            name = f"{ours}.self_attn.{matrix}"
            yield hf(f"{name}.weight", (width, width), TensorSource(f"{theirs}.attn.in_proj_weight", (part, 3)))
            yield hf(f"{name}.bias", (width,), TensorSource(f"{theirs}.attn.in_proj_bias", (part, 3)))
        for mine, other, shape in (
            ("self_attn.out_proj", "attn.out_proj", (width, width)),
            ("layer_norm1", "ln_1", (width,)),
            ("mlp.fc1", "mlp.c_fc", (inner, width)),
            ("mlp.fc2", "mlp.c_proj", (width, inner)),
            ("layer_norm2", "ln_2", (width,)),
        ):
            yield hf(f"{ours}.{mine}.weight", shape, f"{theirs}.{other}.weight")
            yield hf(f"{ours}.{mine}.bias", shape[:1], f"{theirs}.{other}.bias")
    yield hf("final_layer_norm.weight", (width,), "ln_final.weight")
    yield hf("final_layer_norm.bias", (width,), "ln_final.bias")
    if config.projection is not None:
        yield row("text_projection.weight", (config.projection, width), TensorSource("text_projection", transpose=True))
