"""A made-up family: a small transformer over 16 channels, 16 pixels per latent, a rectified flow. No torch here."""

from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Component, Config
from safelight.families.family import Family, Latents, Noise, Training
from safelight.families.features import Feature
from safelight.families.rules import rule
from safelight.families.tables import weight_and_bias
from safelight.request.adapters import Purpose

CHANNELS, SCALE, LETTERS = 16, 16, 64


@dataclass(frozen=True, slots=True)
class Width(Config):
    width: int

    @property
    def label(self) -> str:
        return str(self.width)

    def working_bytes(self, pixels, itemsize, quadratic):
        return (pixels // SCALE**2) * self.width * 64 * itemsize

    def rows(self):
        for name, shape in self.layers():
            yield from weight_and_bias(name, shape)


class Letters(Width):
    architecture: ClassVar[str] = "made-up-letters"

    def layers(self):
        return [("first", (self.width, LETTERS)), ("second", (self.width, self.width))]


class Flow(Width):
    architecture: ClassVar[str] = "made-up-flow"

    def layers(self):
        wide = self.width
        blocks = [(f"blocks.{n}.{part}", (wide, wide)) for n in range(4) for part in ("qkv", "text", "out")]
        return [("enter", (wide, CHANNELS)), ("time", (wide, 1)), *blocks, ("leave", (CHANNELS, wide))]


class Pixels(Width):
    architecture: ClassVar[str] = "made-up-pixels"

    def layers(self):
        return [("encoder", (CHANNELS, 3, SCALE, SCALE)), ("decoder", (3 * SCALE**2, CHANNELS, 1, 1))]


def infer(kind, name):
    return lambda shapes: kind(shapes[name][0])


FAMILIES = (
    Family(
        name="made-up",
        components=(
            Component("letters", Purpose.TEXT_ENCODER, ("letters.",), infer(Letters, "first.weight")),
            Component("flow", Purpose.DENOISER, ("flow.",), infer(Flow, "enter.weight"), lora_prefixes=("lora_flow_",)),
            Component("pixels", Purpose.VAE, ("pixels.",), infer(Pixels, "encoder.weight")),
        ),
        architectures=(Letters, Flow, Pixels),
        latents=Latents(CHANNELS, SCALE, SCALE, 1.0),
        noise=Noise("flow", {"shift": 3.0}),
        resolution=256,
        guidance="none",
        features=frozenset({Feature.TEXT_TO_IMAGE, Feature.IMAGE_TO_IMAGE, Feature.HIRES}),
        model_module="made_up_model",
        rules=(rule("checkpoint", "made-up", "layers of the made-up transformer", r"flow\.enter\.", r"letters\."),),
        detect_training=lambda header: Training("flow", False, "a rectified flow, as all of this family"),
        detect_variant=lambda configs: "text-to-image",
    ),
)
