"""The UNet of Stable Diffusion 1, 2 and XL. Infers its settings from a file's shapes, its tensors from the settings.

Names are those of ``diffusers.UNet2DConditionModel`` and of the original code (``ldm.modules.diffusionmodules``,
here "LDM").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row, weight_and_bias


@dataclass(frozen=True, slots=True)
class UNetConfig(Config):
    """Settings of a UNet.

    ``depths``: transformer blocks per attention of each level; 0 if the level has no attention.
    ``linear_projection``: SD 2 and SDXL project with matrices, SD 1 with 1×1 convolutions.
    ``time_features``: diffusers' ``projection_class_embeddings_input_dim``: the width of SDXL's added conditioning
    (time ids and pooled embeddings). None: the UNet has no added conditioning.
    """

    architecture: ClassVar[str] = "unet"
    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    depths: tuple[int, ...]
    mid_depth: int
    cross_attention_dim: int
    linear_projection: bool
    time_features: int | None = None

    def rows(self) -> Iterator[TensorRow]:
        return tensors(self)

    @property
    def label(self) -> str:
        return f"{'-'.join(map(str, self.block_out_channels))}x{self.layers_per_block}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        map_bytes = 2 * (pixels // 64) * self.block_out_channels[0] * itemsize
        scores = 2 * 8 * (pixels // 64) ** 2 * itemsize if quadratic else 0
        return LIVE_TENSORS * map_bytes + scores


LIVE_TENSORS = 48
"""Number of live tensors the size of the UNet's first feature map for a batch of two (prompt and negative prompt), skip
connections included."""


def infer(shapes: Shapes, down_and_mid_only: bool = False) -> UNetConfig:
    """Infer a UNet's settings from its tensors' shapes, in diffusers' names or LDM's.

    ``down_and_mid_only``: the file has only the down blocks and the middle block, as a ControlNet. Then the output
    channels are set to the input channels.
    Raises NotThisArchitecture when tensors from which settings are inferred are missing.
    """
    try:
        infer_named = _infer_diffusers if "conv_in.weight" in shapes else _infer_ldm
        config = infer_named(shapes, down_and_mid_only)
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the UNet has no tensor {error}") from error
    if not config.block_out_channels or not config.layers_per_block:
        raise NotThisArchitecture("the UNet has no blocks")
    return config


def _attention(shapes: Shapes, prefix: str) -> tuple[int, int, bool]:
    """Return (transformer blocks, width of the context, linear projection) of the attention at ``prefix``."""
    depth = count_indexed(shapes, f"{prefix}.transformer_blocks.")
    context = shapes[f"{prefix}.transformer_blocks.0.attn2.to_k.weight"][1]
    return depth, context, len(shapes[f"{prefix}.proj_in.weight"]) == 2


def _infer_diffusers(shapes: Shapes, down_and_mid_only: bool) -> UNetConfig:
    levels = count_indexed(shapes, "down_blocks.")
    widths: list[int] = []
    depths: list[int] = []
    for level in range(levels):
        widths.append(shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0])
        prefix = f"down_blocks.{level}.attentions.0"
        depths.append(_attention(shapes, prefix)[0] if f"{prefix}.norm.weight" in shapes else 0)
    mid_depth, context, linear = _attention(shapes, "mid_block.attentions.0")
    added = shapes.get("add_embedding.linear_1.weight")
    return UNetConfig(
        in_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_in.weight"][1] if down_and_mid_only else shapes["conv_out.weight"][0],
        block_out_channels=tuple(widths),
        layers_per_block=count_indexed(shapes, "down_blocks.0.resnets."),
        depths=tuple(depths),
        mid_depth=mid_depth,
        cross_attention_dim=context,
        linear_projection=linear,
        time_features=added[1] if added else None,
    )


def _infer_ldm(shapes: Shapes, down_and_mid_only: bool) -> UNetConfig:
    widths: list[int] = []
    depths: list[int] = []
    layers: list[int] = [0]
    for block in range(1, count_indexed(shapes, "input_blocks.")):
        prefix = f"input_blocks.{block}"
        if f"{prefix}.0.op.weight" in shapes:
            layers.append(0)
            continue
        layers[-1] += 1
        if layers[-1] == 1:
            widths.append(shapes[f"{prefix}.0.in_layers.2.weight"][0])
            depths.append(_attention(shapes, f"{prefix}.1")[0] if f"{prefix}.1.norm.weight" in shapes else 0)
    mid_depth, context, linear = _attention(shapes, "middle_block.1")
    added = shapes.get("label_emb.0.0.weight")
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["input_blocks.0.0.weight"][1] if down_and_mid_only else shapes["out.2.weight"][0],
        block_out_channels=tuple(widths),
        layers_per_block=layers[0],
        depths=tuple(depths),
        mid_depth=mid_depth,
        cross_attention_dim=context,
        linear_projection=linear,
        time_features=added[1] if added else None,
    )


def tensors(config: UNetConfig) -> Iterator[TensorRow]:
    """Yield every tensor of the UNet, in the order in which a forward pass uses them."""
    yield from embedding(config)
    yield from down_and_mid_blocks(config)
    yield from _up_blocks(config)


def embedding(config: UNetConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the time embedding, of SDXL's added conditioning, and of the first convolution."""
    first, time = config.block_out_channels[0], config.block_out_channels[0] * 4
    yield from weight_and_bias("time_embedding.linear_1", (time, first), "time_embed.0")
    yield from weight_and_bias("time_embedding.linear_2", (time, time), "time_embed.2")
    if config.time_features is not None:
        yield from weight_and_bias("add_embedding.linear_1", (time, config.time_features), "label_emb.0.0")
        yield from weight_and_bias("add_embedding.linear_2", (time, time), "label_emb.0.2")
    yield from weight_and_bias("conv_in", (first, config.in_channels, 3, 3), "input_blocks.0.0")


def skips(config: UNetConfig) -> list[int]:
    """Return the widths of the skip connections from encoder to decoder, in the encoder's order."""
    widths = config.block_out_channels
    out = [widths[0]]
    for level, width in enumerate(widths):
        out += [width] * (config.layers_per_block + (level < len(widths) - 1))
    return out


def down_and_mid_blocks(config: UNetConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the down blocks and of the middle block."""
    widths, layers = config.block_out_channels, config.layers_per_block
    time = widths[0] * 4
    block, before = 1, widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            ours, theirs = f"down_blocks.{level}", f"input_blocks.{block}"
            yield from _resnet(f"{ours}.resnets.{layer}", f"{theirs}.0", before, width, time)
            if config.depths[level]:
                yield from _transformer(
                    f"{ours}.attentions.{layer}", f"{theirs}.1", width, config.depths[level], config
                )
            before = width
            block += 1
        if level < len(widths) - 1:
            theirs = f"input_blocks.{block}.0.op"
            yield from weight_and_bias(f"down_blocks.{level}.downsamplers.0.conv", (width, width, 3, 3), theirs)
            block += 1

    last = widths[-1]
    yield from _resnet("mid_block.resnets.0", "middle_block.0", last, last, time)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", last, config.mid_depth, config)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", last, last, time)


def _up_blocks(config: UNetConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the up blocks and of the last convolution."""
    widths, layers = config.block_out_channels, config.layers_per_block
    first, time, before = widths[0], widths[0] * 4, widths[-1]
    joined = skips(config)
    block = 0
    for level, width in enumerate(reversed(widths)):
        depth = config.depths[len(widths) - 1 - level]
        for layer in range(layers + 1):
            ours, theirs = f"up_blocks.{level}", f"output_blocks.{block}"
            yield from _resnet(f"{ours}.resnets.{layer}", f"{theirs}.0", before + joined.pop(), width, time)
            if depth:
                yield from _transformer(f"{ours}.attentions.{layer}", f"{theirs}.1", width, depth, config)
            before = width
            block += 1
        if level < len(widths) - 1:
            theirs = f"output_blocks.{block - 1}.{2 if depth else 1}.conv"
            yield from weight_and_bias(f"up_blocks.{level}.upsamplers.0.conv", (width, width, 3, 3), theirs)

    yield from weight_and_bias("conv_norm_out", (first,), "out.0")
    yield from weight_and_bias("conv_out", (config.out_channels, first, 3, 3), "out.2")


def _resnet(ours: str, theirs: str, before: int, width: int, time: int) -> Iterator[TensorRow]:
    yield from weight_and_bias(f"{ours}.norm1", (before,), f"{theirs}.in_layers.0")
    yield from weight_and_bias(f"{ours}.conv1", (width, before, 3, 3), f"{theirs}.in_layers.2")
    yield from weight_and_bias(f"{ours}.time_emb_proj", (width, time), f"{theirs}.emb_layers.1")
    yield from weight_and_bias(f"{ours}.norm2", (width,), f"{theirs}.out_layers.0")
    yield from weight_and_bias(f"{ours}.conv2", (width, width, 3, 3), f"{theirs}.out_layers.3")
    if before != width:
        yield from weight_and_bias(f"{ours}.conv_shortcut", (width, before, 1, 1), f"{theirs}.skip_connection")


def _transformer(ours: str, theirs: str, width: int, depth: int, config: UNetConfig) -> Iterator[TensorRow]:
    projection = (width, width) if config.linear_projection else (width, width, 1, 1)
    yield from weight_and_bias(f"{ours}.norm", (width,), f"{theirs}.norm")
    yield from weight_and_bias(f"{ours}.proj_in", projection, f"{theirs}.proj_in")
    for number in range(depth):
        block, other = f"{ours}.transformer_blocks.{number}", f"{theirs}.transformer_blocks.{number}"
        for attention, context in (("attn1", width), ("attn2", config.cross_attention_dim)):
            norm = "norm1" if attention == "attn1" else "norm2"
            yield from weight_and_bias(f"{block}.{norm}", (width,), f"{other}.{norm}")
            for matrix, columns in (("to_q", width), ("to_k", context), ("to_v", context)):
                name = f"{attention}.{matrix}.weight"
                yield row(f"{block}.{name}", (width, columns), f"{other}.{name}")
            name = f"{attention}.to_out.0"
            yield from weight_and_bias(f"{block}.{name}", (width, width), f"{other}.{name}")
        yield from weight_and_bias(f"{block}.norm3", (width,), f"{other}.norm3")
        yield from weight_and_bias(f"{block}.ff.net.0.proj", (width * 8, width), f"{other}.ff.net.0.proj")
        yield from weight_and_bias(f"{block}.ff.net.2", (width, width * 4), f"{other}.ff.net.2")
    yield from weight_and_bias(f"{ours}.proj_out", projection, f"{theirs}.proj_out")
