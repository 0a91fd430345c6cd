"""What FLUX.2 klein computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from safelight.boundary import modules, pictures
from safelight.boundary.pictures import EncodedPicture
from safelight.families.components import Config
from safelight.families.family import Family, Latents
from safelight.families.family_model import Call, PromptText, Tensors, TextInput, TextInputs
from safelight.families.flux2.spec import NORM_EPS, ROPE_THETA, TEXT_LAYERS, axes, shrunk
from safelight.families.flux2.transformer import HIDDEN_RATIO, TIME_WIDTH, Flux2Config
from safelight.families.parts import flux2_vae_model, qwen3_model
from safelight.families.parts.flux2_vae import Flux2VAEConfig
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.parts.rotary_model import RotaryFamilyModel
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

TOKENS = 512
"""Tokens of a prompt in its chat template, as in diffusers' ``Flux2KleinPipeline``. The rest is cut off. A shorter text
is padded to this number, and the transformer reads the hidden states of the padding too."""

REFERENCE_DISTANCE = 10
"""How far apart the numbers of the image and of the reference images are, as in diffusers."""

TRANSFORMER = "diffusers.models.transformers.transformer_flux2:Flux2Transformer2DModel"


class Flux2(RotaryFamilyModel):
    """Computes FLUX.2 klein."""

    rotary_frequencies = staticmethod(qwen3_model.frequencies)

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        del family, attention
        match config:
            case Qwen3Config():
                return qwen3_model.build(config)
            case Flux2VAEConfig():
                return flux2_vae_model.autoencoder(config)
            case Flux2Config():
                return modules.library_class(TRANSFORMER)(
                    in_channels=config.channels,
                    num_layers=config.double_layers,
                    num_single_layers=config.single_layers,
                    attention_head_dim=config.head_size,
                    num_attention_heads=config.width // config.head_size,
                    joint_attention_dim=config.text_width,
                    timestep_guidance_channels=TIME_WIDTH,
                    mlp_ratio=float(HIDDEN_RATIO),
                    axes_dims_rope=axes(config.head_size),
                    rope_theta=ROPE_THETA,
                    eps=NORM_EPS,
                    guidance_embeds=False,
                )
            case _:
                raise ValueError(config)

    def save_tokenizer(self, family: Family, role: str, folder: Path) -> tuple[str, str] | None:
        return qwen3_model.save_tokenizer(folder, self.own_tokenizer) if role in family.text_encoders else None

    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        del family, role, request, inversion_tokens
        return qwen3_model.text_inputs(texts, thinking=False, most=TOKENS, own=self.own_tokenizer)

    def encode_texts(
        self,
        family: Family,
        role: str,
        module: nn.Module,
        request: Request,
        inputs: Sequence[TextInput],
        inversion_tokens: InversionTokens,
        device: torch.device,
    ) -> list[Tensors]:
        del family, role, request, inversion_tokens
        found = (qwen3_model.states_after(module, one.value, TOKENS, TEXT_LAYERS, device) for one in inputs)
        return [{"hidden": torch.cat(states, dim=-1)} for states in found]

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        return encoded["text_encoder"][text]

    def flow_levels(self, steps: int) -> Sequence[float]:
        return torch.linspace(1.0, 1 / steps, steps).tolist()

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        dtype = next(denoiser.parameters()).dtype
        rows, channels, height, width = call.latents.shape
        states = call.condition["hidden"]
        seen = (call.latents, *call.references)
        packed = [_pack(one).to(dtype) for one in seen]
        # Concatenating copies, and a matrix in another layout is multiplied with other last bits.
        tokens = torch.cat(packed, dim=1) if call.references else packed[0]
        places = torch.cat([_image_places(one, number) for number, one in enumerate(seen)])
        time = call.timestep.expand(rows).to(call.latents.dtype) / 1000
        found = cast("Any", denoiser)(
            hidden_states=tokens,
            encoder_hidden_states=states,
            timestep=time,
            img_ids=places.to(tokens.device),
            txt_ids=_text_places(states.shape[1]).to(tokens.device),
            return_dict=False,
        )[0]
        return found[:, : height * width].permute(0, 2, 1).reshape(rows, channels, height, width)

    def prepare_reference(self, picture: Any, size: tuple[int, int]) -> Any:
        smaller = shrunk(picture.size)
        if smaller != picture.size:
            picture = pictures.resize(picture, smaller)
        left, top = ((side - kept) // 2 for side, kept in zip(smaller, size, strict=True))
        return picture.crop((left, top, left + size[0], top + size[1]))

    def encode_picture(
        self, latents: Latents, vae: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int
    ) -> list[EncodedPicture]:
        del latents
        return flux2_vae_model.encode_picture(vae, picture, mask, device, tile)

    def decode(self, latents: Latents, vae: nn.Module, values: torch.Tensor, tile: int) -> torch.Tensor:
        del latents
        return flux2_vae_model.decode(vae, values, tile)


def _pack(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (n, channels, height, width) as tokens (n, height * width, channels)."""
    return latents.flatten(2).permute(0, 2, 1)


def _image_places(latents: torch.Tensor, number: int) -> torch.Tensor:
    """Return the position of each token of latents, (height * width, 4); see :func:`spec.axes`.

    ``number``: 0 for the image, 1 for the first reference image, and so on.
    """
    height, width = latents.shape[-2:]
    place = torch.tensor([number * REFERENCE_DISTANCE])
    return torch.cartesian_prod(place, torch.arange(height), torch.arange(width), torch.arange(1))


def _text_places(count: int) -> torch.Tensor:
    """Return the position of each of the text's tokens, (count, 4)."""
    one = torch.arange(1)
    return torch.cartesian_prod(one, one, one, torch.arange(count))


MODEL = Flux2()
