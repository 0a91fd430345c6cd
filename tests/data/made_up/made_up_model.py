"""What the made-up family computes: its modules, its text encoding, one call of its denoiser. It imports torch."""

import json
from types import SimpleNamespace

import torch
from made_up_family import CHANNELS, LETTERS, SCALE, Flow, Letters, Pixels
from torch import nn

from safelight.families.family_model import FamilyModel, TextInput, TextInputs


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
            y = block["qkv"](x) + block["text"](text)
            x = x + block["out"](nn.functional.scaled_dot_product_attention(y, y, x))
        return self.leave(x).transpose(1, 2).reshape(latents.shape)


class AutoEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, CHANNELS, SCALE, SCALE), nn.Conv2d(CHANNELS, 3 * SCALE**2, 1)

    @property
    def dtype(self):
        return self.encoder.weight.dtype

    def encode(self, pixels):
        distribution = SimpleNamespace(parameters=(mean := self.encoder(pixels)), sample=lambda generator: mean)
        return SimpleNamespace(latent_dist=distribution)

    def decode(self, latents, return_dict):
        return (nn.functional.pixel_shuffle(torch.tanh(self.decoder(latents)), SCALE),)


class MadeUp(FamilyModel):
    def build(self, family, config, attention):
        return {Letters: TextEncoder, Flow: Transformer, Pixels: AutoEncoder}[type(config)](config)

    def text_inputs(self, family, role, request, texts, inversion_tokens):
        counts = {pair: [pair[1].lower().count(chr(32 + n)) for n in range(LETTERS)] for pair in texts}
        return TextInputs({pair: TextInput(values, json.dumps(values)) for pair, values in counts.items()})

    def encode_texts(self, family, role, module, request, inputs, inversion_tokens, device):
        return [{"text": module(torch.tensor([[one.value]]).to(device, module.first.weight.dtype))} for one in inputs]

    def condition(self, encoded, text):
        return encoded["letters"][text]

    def predict(self, denoiser, call):
        return denoiser(call.latents, (call.timestep / 1000).to(call.latents.dtype), call.condition["text"])


MODEL = MadeUp()
