"""Qwen-Image's ControlNets (InstantX): some of the transformer's blocks, whose outputs are added to those of the
transformer.

Names are those of ``diffusers.QwenImageControlNetModel``; the published files have no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safelight.families.components import Config
from safelight.families.qwen_image import transformer
from safelight.families.qwen_image.transformer import QwenImageConfig
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, weight_and_bias


@dataclass(frozen=True, slots=True)
class QwenImageControlNetConfig(Config):
    """Settings of a ControlNet.

    ``net``: settings of the transformer with as many blocks.
    ``mask_inputs``: values per token that it reads besides the picture: those of a mask, in ControlNets for inpainting
    (diffusers' ``extra_condition_channels``).
    """

    architecture: ClassVar[str] = "qwen-image-controlnet"
    net: QwenImageConfig
    mask_inputs: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> QwenImageControlNetConfig:
        return cls(QwenImageConfig.from_json(values["net"]), values["mask_inputs"])

    @property
    def label(self) -> str:
        return self.net.label

    @property
    def reads_latents(self) -> bool:
        return True

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        outputs = self.net.layers * (pixels // 256) * self.net.width * itemsize
        return self.net.working_bytes(pixels, itemsize, quadratic) + outputs

    def rows(self) -> Iterator[TensorRow]:
        wide = self.net.width
        yield from weight_and_bias("controlnet_x_embedder", (wide, self.net.inputs + self.mask_inputs))
        yield from self.net.rows_before_last()
        for n in range(self.net.layers):
            yield from weight_and_bias(f"controlnet_blocks.{n}", (wide, wide))


def infer(shapes: Shapes) -> QwenImageControlNetConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    embedder = shapes.get("controlnet_x_embedder.weight")
    if embedder is None:
        raise NotThisArchitecture("the ControlNet has no tensor controlnet_x_embedder.weight")
    net = transformer.infer(shapes, has_last=False)
    # The transformer's own embedder has as many columns as there are values of the picture.
    return QwenImageControlNetConfig(net, max(0, embedder[-1] - net.inputs))


def find_mismatch(control: Config, denoiser: Config) -> str | None:
    """Return why a ControlNet does not fit a transformer, None if it does."""
    if not isinstance(control, QwenImageControlNetConfig) or not isinstance(denoiser, QwenImageConfig):
        return "is a ControlNet of another architecture than {model}"
    if control.mask_inputs:
        return "also reads a mask: ControlNets for inpainting are not supported for {model} yet"
    net = control.net
    for what, its, ours in (
        ("reads tokens of width", net.inputs, denoiser.inputs),
        ("has blocks of width", net.width, denoiser.width),
        ("has heads of width", net.head_size, denoiser.head_size),
        ("reads text of width", net.text_width, denoiser.text_width),
    ):
        if its != ours:
            return f"{what} {its}, but {ours} in {{model}}"
    if net.layers > denoiser.layers:
        return f"has {net.layers} blocks, but {{model}} has only {denoiser.layers}"
    return None
