"""What ERNIE-Image computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from safelight.boundary import modules
from safelight.boundary.pictures import EncodedPicture
from safelight.families.components import Config
from safelight.families.ernie_image.spec import NORM_EPS, ROPE_THETA, axes
from safelight.families.ernie_image.transformer import ErnieImageConfig
from safelight.families.family import Family, Latents
from safelight.families.family_model import Call, PromptText, Tensors, TextInput, TextInputs
from safelight.families.parts import flux2_vae_model, ministral3_model
from safelight.families.parts.flux2_vae import Flux2VAEConfig
from safelight.families.parts.ministral3 import Ministral3Config
from safelight.families.parts.rotary_model import RotaryFamilyModel
from safelight.families.parts.sequences import join_texts
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

TRANSFORMER = "diffusers.models.transformers.transformer_ernie_image:ErnieImageTransformer2DModel"

LATENTS_EPSILON = 1e-5
"""What is added to the variance of the latents. The published settings of the VAE have another value, which diffusers'
pipeline does not read either."""


class ErnieImage(RotaryFamilyModel):
    """Computes ERNIE-Image."""

    rotary_frequencies = staticmethod(ministral3_model.frequencies)

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        del family, attention
        match config:
            case Ministral3Config():
                return ministral3_model.build(config)
            case Flux2VAEConfig():
                return flux2_vae_model.autoencoder(config)
            case ErnieImageConfig():
                return modules.library_class(TRANSFORMER)(
                    hidden_size=config.width,
                    num_attention_heads=config.width // config.head_size,
                    num_layers=config.layers,
                    ffn_hidden_size=config.hidden,
                    in_channels=config.channels,
                    out_channels=config.channels,
                    text_in_dim=config.text_width,
                    rope_theta=ROPE_THETA,
                    rope_axes_dim=axes(config.head_size),
                    eps=NORM_EPS,
                )
            case _:
                raise ValueError(config)

    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        del family, role, request, inversion_tokens
        assert self.own_tokenizer is not None, "a checkpoint of this family has a tokenizer"
        return ministral3_model.text_inputs(self.own_tokenizer, texts)

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
        return [{"hidden": ministral3_model.hidden_states(module, one.value, device)} for one in inputs]

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        return encoded["text_encoder"][text]

    def join_conditions(self, rows: Sequence[Tensors]) -> Tensors:
        return join_texts(rows)

    def flow_levels(self, steps: int) -> Sequence[float]:
        return torch.linspace(1.0, 0.0, steps + 1)[:-1].tolist()

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        dtype, count = next(denoiser.parameters()).dtype, len(call.latents)
        return cast("Any", denoiser)(
            hidden_states=call.latents.to(dtype),
            timestep=call.timestep.to(dtype).expand(count),
            text_bth=call.condition["hidden"].to(dtype),
            text_lens=call.condition["length"].to(call.latents.device),
            return_dict=False,
        )[0]

    def encode_picture(
        self, latents: Latents, vae: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int
    ) -> list[EncodedPicture]:
        del latents
        return flux2_vae_model.encode_picture(vae, picture, mask, device, tile, LATENTS_EPSILON)

    def decode(self, latents: Latents, vae: nn.Module, values: torch.Tensor, tile: int) -> torch.Tensor:
        del latents
        return flux2_vae_model.decode(vae, values, tile, LATENTS_EPSILON)


MODEL = ErnieImage()
