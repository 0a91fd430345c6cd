"""What Z-Image computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from safelight.boundary import modules
from safelight.families.components import Config
from safelight.families.family import Family, Latents
from safelight.families.family_model import (
    Call,
    ControlCall,
    PromptText,
    Tensors,
    TextInput,
    TextInputs,
    scale_latents,
)
from safelight.families.parts import qwen3_model
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.parts.rotary_model import RotaryFamilyModel
from safelight.families.parts.sequences import join_texts
from safelight.families.parts.vae import VAEConfig
from safelight.families.parts.vae_model import autoencoder
from safelight.families.zimage.controlnet import ZImageControlNetConfig, places
from safelight.families.zimage.transformer import ZImageConfig
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

MOST_TOKENS = 512
"""Tokens of a prompt in its chat template, as in diffusers' ``ZImagePipeline``. The rest is cut off."""

POSITIONS = (1536, 512, 512)
"""The largest positions on the three axes of the rotary embedding: caption, height, width."""

ROPE_THETA = 256.0

CONTROLNET = "diffusers.models.controlnets.controlnet_z_image:ZImageControlNetModel"
TRANSFORMER = "diffusers.models.transformers.transformer_z_image:ZImageTransformer2DModel"


class ZImage(RotaryFamilyModel):
    """Computes Z-Image."""

    rotary_frequencies = staticmethod(qwen3_model.frequencies)

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
            case ZImageControlNetConfig():
                return modules.library_class(CONTROLNET)(
                    # Where the blocks add to is the transformer's to say: ``_with_shared_modules`` sets it.
                    control_layers_places=list(range(config.layers)),
                    control_refiner_layers_places=list(range(config.refiner_layers)),
                    control_in_dim=config.channels,
                    add_control_noise_refiner="control_noise_refiner" if config.refines else None,
                    dim=config.width,
                    n_refiner_layers=config.refiner_layers,
                    n_heads=config.width // config.head_size,
                    n_kv_heads=config.width // config.head_size,
                )
            case _:
                raise ValueError(config)

    def make_caches(self, module: nn.Module, at: torch.device) -> None:
        embedder: Any = getattr(module, "rope_embedder", None)
        if embedder is not None:
            # diffusers computes these at the first call. They depend on nothing but the settings.
            found = embedder.precompute_freqs_cis(embedder.axes_dims, embedder.axes_lens, theta=embedder.theta)
            embedder.freqs_cis = [one.to(at) for one in found]

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
        return qwen3_model.text_inputs(texts, thinking=True, most=MOST_TOKENS, own=self.own_tokenizer)

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
        added = {n: call.control[f"layers.{n}"] for n in range(len(_layers(denoiser))) if f"layers.{n}" in call.control}
        found = cast("Any", denoiser)(
            *_inputs(next(denoiser.parameters()).dtype, call), controlnet_block_samples=added or None, return_dict=False
        )[0]
        # The transformer returns the velocity towards the image.
        return -torch.stack([one.float() for one in found]).squeeze(2)

    def control_input(self, latents: Latents, picture: Any, generator: torch.Generator) -> torch.Tensor:
        del generator
        return scale_latents(latents, picture.distribution.mode())

    def control(self, net: nn.Module, denoiser: nn.Module, call: Call, how: ControlCall) -> Tensors:
        own = _with_shared_modules(net, denoiser)
        dtype = next(denoiser.parameters()).dtype
        shown = how.picture.to(dtype).unsqueeze(2)
        # Without a mask and a second picture, which some ControlNets can read too, their channels are zero.
        zeros = shown.new_zeros(1, own.control_in_dim - shown.shape[1], *shown.shape[2:])
        context = torch.cat([shown, zeros], dim=1).repeat(len(call.latents), 1, 1, 1, 1)
        added = own.forward(*_inputs(dtype, call), context, conditioning_scale=how.weight)
        return {f"layers.{n}": tensor for n, tensor in added.items()}


SHARED = (
    *("t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner", "context_refiner"),
    *("x_pad_token", "cap_pad_token"),
)
"""What a ControlNet takes from the transformer (diffusers' ``ZImageControlNetModel.from_transformer``)."""


def _with_shared_modules(net: nn.Module, denoiser: nn.Module) -> Any:
    """Return a copy of a bound ControlNet, with the same modules, that also has the transformer's."""
    own: Any = copy.copy(net)
    vars(own).update({name: getattr(denoiser, name) for name in SHARED})
    own.control_layers_places = places(len(_layers(denoiser)), len(own.control_layers))
    if own.add_control_noise_refiner and not own.control_noise_refiner[0].before_proj.weight.any():
        # Version 2.0 does not use its blocks for the refiner, which diffusers recognises by this, too.
        own.add_control_noise_refiner = "control_layers"
    return own


def _layers(denoiser: nn.Module) -> nn.ModuleList:
    return cast("Any", denoiser).layers


def _inputs(dtype: torch.dtype, call: Call) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Return what the transformer and its ControlNets share: images, the share of the noise that is gone, and texts.

    Images and texts are lists, because each row may have another length. Images have a frame axis.
    """
    states, lengths = call.condition["hidden"], call.condition["length"].tolist()
    images = list(call.latents.to(dtype).unsqueeze(2).unbind(dim=0))
    time = ((1000 - call.timestep.expand(1)) / 1000).repeat(len(images))
    return images, time, [one[:length].to(dtype) for one, length in zip(states, lengths, strict=True)]


def axes(head_size: int) -> tuple[int, int, int]:
    """Return how many components of a head turn with the caption's position, the row and the column.

    Of the published 128 they are 32, 48 and 48.
    """
    caption = head_size // 4
    side = (head_size - caption) // 2
    return caption, side, side


MODEL = ZImage()
