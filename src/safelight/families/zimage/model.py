"""What Z-Image computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from safelight.boundary import modules
from safelight.families.family import Config, Family
from safelight.families.family_model import Call, FamilyModel, PromptText, Tensors, TextInput, TextInputs
from safelight.families.parts import qwen3_model
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.parts.sequences import join_texts
from safelight.families.parts.vae import VAEConfig
from safelight.families.parts.vae_model import autoencoder
from safelight.families.zimage.transformer import ZImageConfig
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

MOST_TOKENS = 512
"""Tokens of a prompt in its chat template, as in diffusers' ``ZImagePipeline``. The rest is cut off."""

POSITIONS = (1536, 512, 512)
"""The largest positions on the three axes of the rotary embedding: caption, height, width."""

ROPE_THETA = 256.0

TRANSFORMER = "diffusers.models.transformers.transformer_z_image:ZImageTransformer2DModel"


class ZImage(FamilyModel):
    """Computes Z-Image."""

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        del attention
        match config:
            case Qwen3Config():
                return qwen3_model.build(config)
            case VAEConfig():
                return autoencoder(family, config)
            case ZImageConfig():
                return modules.library_class(TRANSFORMER)(
                    in_channels=config.channels,
                    dim=config.width,
                    n_layers=config.layers,
                    n_refiner_layers=config.refiner_layers,
                    n_heads=config.width // config.head_size,
                    n_kv_heads=config.width // config.head_size,
                    cap_feat_dim=config.text_width,
                    rope_theta=ROPE_THETA,
                    axes_dims=axes(config.head_size),
                    axes_lens=POSITIONS,
                )
            case _:
                raise ValueError(config)

    def make_buffer(self, module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor | None:
        if name in ("inv_freq", "original_inv_freq"):
            return qwen3_model.frequencies(cast("Any", module).config)
        return super().make_buffer(module, name, buffer)

    def make_caches(self, module: nn.Module, at: torch.device) -> None:
        embedder: Any = getattr(module, "rope_embedder", None)
        if embedder is not None:
            # diffusers computes these at the first call. They depend on nothing but the settings.
            found = embedder.precompute_freqs_cis(embedder.axes_dims, embedder.axes_lens, theta=embedder.theta)
            embedder.freqs_cis = [one.to(at) for one in found]

    def save_tokenizer(self, family: Family, role: str, folder: Path) -> tuple[str, str] | None:
        return qwen3_model.save_tokenizer(folder) if role in family.text_encoders else None

    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        del family, role, request, inversion_tokens
        return qwen3_model.text_inputs(texts, thinking=True, most=MOST_TOKENS)

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
        return [{"hidden": qwen3_model.hidden_states(module, one.value, MOST_TOKENS, device)} for one in inputs]

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        return encoded["text_encoder"][text]

    def join_conditions(self, rows: Sequence[Tensors]) -> Tensors:
        return join_texts(rows)

    def flow_levels(self, steps: int) -> Sequence[float]:
        return torch.linspace(1.0, 1 / steps, steps).tolist()

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        dtype = next(denoiser.parameters()).dtype
        states, lengths = call.condition["hidden"], call.condition["length"].tolist()
        # The transformer takes a list of images with a frame axis, a list of texts, and the share of the noise that is
        # gone; it returns the velocity towards the image.
        images = list(call.latents.to(dtype).unsqueeze(2).unbind(dim=0))
        time = ((1000 - call.timestep.expand(1)) / 1000).repeat(len(images))
        texts = [one[:length] for one, length in zip(states, lengths, strict=True)]
        found = cast("Any", denoiser)(images, time, texts, return_dict=False)[0]
        return -torch.stack([one.float() for one in found]).squeeze(2)


def axes(head_size: int) -> tuple[int, int, int]:
    """Return how many components of a head turn with the caption's position, the row and the column.

    Of the published 128 they are 32, 48 and 48.
    """
    caption = head_size // 4
    side = (head_size - caption) // 2
    return caption, side, side


MODEL = ZImage()
