"""What Chroma computes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from safelight.boundary import exports, modules
from safelight.families.chroma.transformer import ChromaConfig
from safelight.families.components import Config
from safelight.families.family import Family, Latents
from safelight.families.family_model import Call, FamilyModel, PromptText, Tensors, TextInput, TextInputs
from safelight.families.parts import t5, t5_model
from safelight.families.parts.flux_blocks import TEXT_TOKENS
from safelight.families.parts.sequences import image_positions, pack, unpack
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.tokenizer import content
from safelight.families.parts.tokens import PATCH, axes
from safelight.families.parts.vae import VAEConfig
from safelight.families.parts.vae_model import autoencoder
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

TRANSFORMER = "diffusers.models.transformers.transformer_chroma:ChromaTransformer2DModel"
EMBEDDING = "diffusers.models.embeddings:get_timestep_embedding"


class Chroma(FamilyModel):
    """Computes Chroma."""

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        del attention
        match config:
            case T5Config():
                return t5_model.build(config)
            case VAEConfig():
                return autoencoder(family, config)
            case ChromaConfig():
                return modules.library_class(TRANSFORMER)(
                    in_channels=config.inputs,
                    out_channels=config.channels * PATCH**2,
                    num_layers=config.layers,
                    num_single_layers=config.single_layers,
                    attention_head_dim=config.head_size,
                    num_attention_heads=config.width // config.head_size,
                    joint_attention_dim=config.text_width,
                    axes_dims_rope=axes(config.head_size),
                    approximator_num_channels=config.guidance_inputs,
                    approximator_hidden_dim=config.guidance_width,
                    approximator_layers=config.guidance_layers,
                )
            case _:
                raise ValueError(config)

    def make_buffer(self, module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor | None:
        if name == "mod_proj":
            # The embedding of each modulation's number, in fp32 for every dtype.
            count, width = buffer.shape
            embed = modules.library_class(EMBEDDING)
            return embed(torch.arange(count, device="cpu") * 1000, width, flip_sin_to_cos=True, downscale_freq_shift=0)
        return super().make_buffer(module, name, buffer)

    def save_tokenizer(self, family: Family, role: str, folder: Path) -> tuple[str, str] | None:
        if role not in family.text_encoders:
            return None
        exports.save_t5_tokenizer(folder / "tokenizer", content(t5.SHIPPED, self.own_tokenizer), TEXT_TOKENS)
        return "tokenizer", "T5Tokenizer"

    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        del family, role, request, inversion_tokens
        read = {pair: t5_model.tokens_of(pair.text, TEXT_TOKENS, self.own_tokenizer) for pair in texts}
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
        del family, role, request, inversion_tokens
        found: list[Tensors] = []
        for one in inputs:
            shown = t5_model.mask_of(one.value, device)
            hidden = t5_model.hidden_states(module, one.value, device, shown)
            # The transformer also sees one token of the padding.
            places = torch.arange(len(one.value), device=device).unsqueeze(0)
            found.append({"hidden": hidden, "mask": (places <= shown.sum()).to(hidden.dtype)})
        return found

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        return encoded["text_encoder"][text]

    def flow_levels(self, steps: int) -> Sequence[float]:
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        dtype, device, count = next(denoiser.parameters()).dtype, call.latents.device, len(call.latents)
        hidden, mask = (call.condition[name].to(dtype) for name in ("hidden", "mask"))
        rows, columns = (side // PATCH for side in call.latents.shape[-2:])
        found = cast("Any", denoiser)(
            hidden_states=pack(call.latents.to(dtype)),
            timestep=call.timestep.expand(count).to(dtype) / 1000,
            encoder_hidden_states=hidden,
            txt_ids=torch.zeros(hidden.shape[1], 3, device=device, dtype=dtype),
            img_ids=image_positions(call.latents).to(device=device, dtype=dtype),
            # Numbers that the attention adds to its scores, as in diffusers' pipelines: 1 for two tokens that see each
            # other, 0 for others. So the padding is not hidden, only weaker.
            attention_mask=torch.cat([mask, mask.new_ones(count, rows * columns)], dim=1),
            return_dict=False,
        )[0]
        return unpack(found, rows, columns)

    def decode(self, latents: Latents, vae: nn.Module, values: torch.Tensor, tile: int) -> torch.Tensor:
        # Convolutions compute other bits for channels-last latents, which diffusers has never: it unpacks them.
        return super().decode(latents, vae, values.contiguous(), tile)


MODEL = Chroma()
