"""A made-up family: a small transformer over 16 channels of latents that are 16 times smaller than the image, trained
as a rectified flow, without classifier-free guidance, with a tokenizer and a text encoder of its own."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from safelight.families.computing import FamilyModel, TextInput, TextInputs
from safelight.families.family import Component, Config, Family, Latents, Noise, Training
from safelight.families.features import Feature
from safelight.families.rules import rule
from safelight.families.tables import weight_and_bias
from safelight.request.parts import Purpose

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
        side = (SCALE, SCALE)
        return [("encoder", (CHANNELS, 3, *side)), ("decoder", (3 * SCALE**2, CHANNELS, 1, 1))]


class TextEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first, self.second = nn.Linear(LETTERS, config.width), nn.Linear(config.width, config.width)

    def forward(self, counts):
        return self.second(torch.tanh(self.first(counts)))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        wide, parts = config.width, ("qkv", "text", "out")
        self.enter, self.time, self.leave = nn.Linear(CHANNELS, wide), nn.Linear(1, wide), nn.Linear(wide, CHANNELS)
        self.blocks = nn.ModuleList(nn.ModuleDict({one: nn.Linear(wide, wide) for one in parts}) for _ in range(4))

    def forward(self, latents, time, text):
        x = self.enter(latents.flatten(2).transpose(1, 2)) + self.time(time.reshape(1, 1, 1))
        for block in self.blocks:
            seen = block["qkv"](x) + block["text"](text)
            x = x + block["out"](nn.functional.scaled_dot_product_attention(seen, seen, x))
        return self.leave(x).transpose(1, 2).reshape(latents.shape)


class AutoEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder = nn.Conv2d(3, CHANNELS, SCALE, SCALE)
        self.decoder = nn.Conv2d(CHANNELS, 3 * SCALE**2, 1)

    @property
    def dtype(self):
        return self.encoder.weight.dtype

    def encode(self, pixels):
        mean = self.encoder(pixels)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=mean, sample=lambda generator: mean))

    def decode(self, latents, return_dict):
        return (nn.functional.pixel_shuffle(torch.tanh(self.decoder(latents)), SCALE),)


class MadeUp(FamilyModel):
    def build(self, family, config, attention):
        return {Letters: TextEncoder, Flow: Transformer, Pixels: AutoEncoder}[type(config)](config)

    def text_inputs(self, family, role, request, texts, words):
        counts = {pair: [pair[1].lower().count(chr(32 + n)) for n in range(LETTERS)] for pair in texts}
        return TextInputs({pair: TextInput(values, json.dumps(values)) for pair, values in counts.items()})

    def encode_texts(self, family, role, module, request, inputs, words, device):
        dtype = next(module.parameters()).dtype
        return [{"text": module(torch.tensor([[one.value]], dtype=dtype, device=device))} for one in inputs]

    def condition(self, encoded, text):
        return encoded["letters"][text]

    def predict(self, denoiser, call):
        time = (call.timestep / 1000).to(call.latents.dtype)
        return denoiser(call.latents, time, call.condition["text"])


def infer(kind, name):
    return lambda shapes: kind(shapes[name][0])


MODEL = MadeUp()
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
        computing="made_up_family",
        rules=(rule("checkpoint", "made-up", "layers of the made-up transformer", r"flow\.enter\.", r"letters\."),),
        training=lambda header: Training("flow", False, "a rectified flow, as all of this family"),
        variant=lambda configs: "text-to-image",
    ),
)
