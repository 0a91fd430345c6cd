"""What FLUX.1 computes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from safelight.boundary import exports, modules, pictures
from safelight.boundary.pictures import EncodedPicture
from safelight.families.components import Config
from safelight.families.family import Family, Latents
from safelight.families.family_model import (
    Call,
    ControlCall,
    FamilyModel,
    PromptText,
    Tensors,
    TextInput,
    TextInputs,
    scale_latents,
)
from safelight.families.flux.controlnet import HINT_WIDTH, UNION_TYPES, FluxControlNetConfig
from safelight.families.flux.transformer import FluxConfig
from safelight.families.parts import clip_model, t5, t5_model
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.sequences import image_positions, lengthen, pack, unpack
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.tokenizer import content
from safelight.families.parts.tokens import PATCH, axes
from safelight.families.parts.vae import VAEConfig
from safelight.families.parts.vae_model import autoencoder
from safelight.request.prompts import tokens
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

T5_TOKENS, SCHNELL_T5_TOKENS = 512, 256
"""T5's tokens of a prompt, padding included: the original's numbers. The rest is cut off."""

TRANSFORMER = "diffusers.models.transformers.transformer_flux:FluxTransformer2DModel"
CONTROLNET = "diffusers.models.controlnets.controlnet_flux:FluxControlNetModel"

DOUBLE_BLOCKS, SINGLE_BLOCKS = "transformer_blocks", "single_transformer_blocks"


class Flux(FamilyModel):
    """Computes FLUX.1."""

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        match config:
            case CLIPConfig():
                return clip_model.build(config, attention)
            case T5Config():
                return t5_model.build(config)
            case VAEConfig():
                return autoencoder(family, config)
            case FluxConfig():
                return modules.library_class(TRANSFORMER)(
                    out_channels=config.channels * PATCH**2, **_transformer_kwargs(config)
                )
            case FluxControlNetConfig():
                return modules.library_class(CONTROLNET)(
                    patch_size=config.patch,
                    num_mode=config.modes or None,
                    conditioning_embedding_channels=HINT_WIDTH if config.pixels else None,
                    **_transformer_kwargs(config.net),
                )
            case _:
                raise ValueError(config)

    def run_lazy_init(self, module: nn.Module) -> None:
        clip_model.run_lazy_init(module)

    def save_tokenizer(self, family: Family, role: str, folder: Path) -> tuple[str, str] | None:
        if role not in family.text_encoders:
            return None
        name = role.replace("text_encoder", "tokenizer")
        if role == "text_encoder":
            exports.save_tokenizer(folder / name, tokens.VOCABULARY, "<|endoftext|>")
            return name, "CLIPTokenizer"
        exports.save_t5_tokenizer(folder / name, content(t5.SHIPPED, self.own_tokenizer), T5_TOKENS)
        return name, "T5Tokenizer"

    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        del family, inversion_tokens
        # Of all variants, only schnell has no guidance scale.
        length = SCHNELL_T5_TOKENS if request.guidance is None else T5_TOKENS
        # CLIP gives no more than the pooled output, so what it leaves out is not worth a warning.
        read = {
            pair: (clip_tokens(pair.text), "")
            if role == "text_encoder"
            else t5_model.tokens_of(pair.text, length, self.own_tokenizer)
            for pair in texts
        }
        return TextInputs(
            {pair: TextInput(ids, json.dumps(ids)) for pair, (ids, _) in read.items()},
            cut={pair: cut for pair, (_, cut) in read.items() if cut},
        )

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
        del family, request, inversion_tokens
        if role == "text_encoder":
            encoder = cast("Any", module)
            return [{"pooled": encoder(torch.tensor([one.value], device=device)).pooler_output} for one in inputs]
        return [{"hidden": t5_model.hidden_states(module, one.value, device)} for one in inputs]

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        return {**encoded["text_encoder"][text], **encoded["text_encoder_2"][text]}

    def flow_levels(self, steps: int) -> Sequence[float]:
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        net = cast("Any", denoiser)
        rows, columns = (side // PATCH for side in call.latents.shape[-2:])
        inputs = _inputs(net, call)
        added = lengthen(call.control, inputs["hidden_states"].shape[1] - rows * columns)
        double, single = (
            [added[f"{blocks}.{n}"] for n in range(count) if f"{blocks}.{n}" in added] or None
            for blocks, count in _blocks(net)
        )
        found = net(
            **inputs,
            controlnet_block_samples=double,
            controlnet_single_block_samples=single,
            return_dict=False,
        )[0]
        return unpack(found[:, : rows * columns], rows, columns)

    def control_input(self, latents: Latents, picture: Any, generator: torch.Generator) -> torch.Tensor:
        if not isinstance(picture, EncodedPicture):
            return pictures.control_picture(picture, latents.vae_scale_factor, normalised=True)
        return pack(scale_latents(latents, picture.distribution.sample(generator)))

    def control(self, net: nn.Module, denoiser: nn.Module, call: Call, how: ControlCall) -> Tensors:
        own, count = cast("Any", net), len(call.latents)
        inputs = _inputs(own, call)
        mode = torch.tensor(UNION_TYPES.index(how.union_type)) if how.union_type else None
        outputs = own(
            **inputs,
            controlnet_cond=how.picture.to(inputs["hidden_states"].dtype).expand(count, *how.picture.shape[1:]),
            controlnet_mode=None if mode is None else mode.to(call.latents.device).view(-1, 1).expand(count, 1),
            conditioning_scale=how.weight,
            return_dict=False,
        )
        added: dict[str, torch.Tensor] = {}
        for (blocks, length), tensors in zip(_blocks(denoiser), outputs, strict=True):
            if tensors:
                # XLabs' ControlNets repeat their few outputs; each output of the others belongs to a run of blocks.
                repeats = own.input_hint_block is not None and blocks == DOUBLE_BLOCKS
                run = math.ceil(length / len(tensors))
                order = (n % len(tensors) if repeats else n // run for n in range(length))
                added |= {f"{blocks}.{n}": tensors[at] for n, at in enumerate(order)}
        return added

    def decode(self, latents: Latents, vae: nn.Module, values: torch.Tensor, tile: int) -> torch.Tensor:
        # Convolutions compute other bits for channels-last latents, which diffusers has never: it unpacks them.
        return super().decode(latents, vae, values.contiguous(), tile)


def _transformer_kwargs(config: FluxConfig) -> dict[str, Any]:
    """Return the settings that a transformer and a ControlNet for it share."""
    return {
        "in_channels": config.inputs,
        "num_layers": config.layers,
        "num_single_layers": config.single_layers,
        "attention_head_dim": config.head_size,
        "num_attention_heads": config.width // config.head_size,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance,
        "axes_dims_rope": axes(config.head_size),
    }


def _blocks(denoiser: nn.Module) -> tuple[tuple[str, int], ...]:
    """Return the names of the two lists of a transformer's blocks, each with its length."""
    return tuple((name, len(getattr(denoiser, name))) for name in (DOUBLE_BLOCKS, SINGLE_BLOCKS))


def _inputs(net: Any, call: Call) -> dict[str, Any]:
    """Return the inputs that the transformer and its ControlNets share. ``net``: one of them, bound."""
    dtype, device, count = next(net.parameters()).dtype, call.latents.device, len(call.latents)
    hidden = call.condition["hidden"].to(dtype)
    seen = (call.latents, *call.references)
    packed = [pack(one.to(dtype)) for one in seen]
    tokens = torch.cat(packed, dim=1) if call.references else packed[0]
    if call.extra:
        mask, masked_image = call.extra
        tokens = torch.cat([tokens, pack(masked_image.to(dtype)), pack(mask.to(dtype))], dim=2)
    positions = torch.cat([image_positions(one, number) for number, one in enumerate(seen)])
    guidance = torch.full([1], call.guidance, device=device, dtype=torch.float32).expand(count)
    return {
        "hidden_states": tokens,
        "timestep": call.timestep.expand(count).to(dtype) / 1000,
        "guidance": guidance if net.config.guidance_embeds else None,
        "pooled_projections": call.condition["pooled"].to(dtype),
        "encoder_hidden_states": hidden,
        "txt_ids": torch.zeros(hidden.shape[1], 3, device=device, dtype=dtype),
        "img_ids": positions.to(device=device, dtype=dtype),
    }


def clip_tokens(text: str) -> list[int]:
    """Return CLIP's token ids of a text, filled up with end tokens. The tokens that are too many are cut off."""
    ids = [tokens.START, *tokens.tokens_of(text)[: tokens.TOKENS_PER_CHUNK], tokens.END]
    return ids + [tokens.END] * (tokens.POSITIONS - len(ids))


MODEL = Flux()
