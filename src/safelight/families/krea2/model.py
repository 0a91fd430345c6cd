"""What Krea 2 computes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from safelight.boundary import modules
from safelight.boundary.pictures import EncodedPicture
from safelight.families.components import Config
from safelight.families.family import Family, Latents
from safelight.families.family_model import Call, PromptText, Tensors, TextInput, TextInputs
from safelight.families.krea2.spec import NORM_EPS, ROPE_THETA, axes, text_layers
from safelight.families.krea2.transformer import TEXT_TOKENS, Krea2Config
from safelight.families.parts import qwen3_model, qwen3_vl_model, qwen_vae_model
from safelight.families.parts.qwen3 import PAD
from safelight.families.parts.qwen3_vl import Qwen3VLConfig
from safelight.families.parts.qwen_chat import BEGINNING, BEGINNING_TOKENS, ENDING, ENDING_TOKENS
from safelight.families.parts.qwen_vae import QwenVAEConfig
from safelight.families.parts.rotary_model import RotaryFamilyModel
from safelight.families.parts.sequences import pack, unpack
from safelight.families.parts.tokens import PATCH
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

MOST_TOKENS = BEGINNING_TOKENS + TEXT_TOKENS - ENDING_TOKENS
"""Tokens of the template's beginning and a prompt, as in diffusers' ``Krea2Pipeline``. The rest is cut off."""

TRANSFORMER = "diffusers.models.transformers.transformer_krea2:Krea2Transformer2DModel"


class Krea2(RotaryFamilyModel):
    """Computes Krea 2."""

    rotary_frequencies = staticmethod(qwen3_vl_model.frequencies)

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        del family, attention
        match config:
            case Qwen3VLConfig():
                return qwen3_vl_model.build(config)
            case QwenVAEConfig():
                return qwen_vae_model.autoencoder(config)
            case Krea2Config():
                return modules.library_class(TRANSFORMER)(
                    in_channels=config.channels * PATCH**2,
                    num_layers=config.layers,
                    attention_head_dim=config.head_size,
                    num_attention_heads=config.width // config.head_size,
                    num_key_value_heads=config.key_heads,
                    intermediate_size=config.hidden,
                    timestep_embed_dim=config.time_width,
                    text_hidden_dim=config.text_width,
                    num_text_layers=config.text_layers,
                    text_num_attention_heads=config.text_width // config.text_head_size,
                    text_num_key_value_heads=config.text_key_heads,
                    text_intermediate_size=config.text_hidden,
                    num_layerwise_text_blocks=config.layerwise_blocks,
                    num_refiner_text_blocks=config.refiner_blocks,
                    axes_dims_rope=axes(config.head_size),
                    rope_theta=ROPE_THETA,
                    norm_eps=NORM_EPS,
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
        by = qwen3_model.tokenizer(self.own_tokenizer)
        read = {pair: qwen3_model.tokens_of(BEGINNING + pair.text, MOST_TOKENS, by) for pair in texts}
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
        """Return the hidden states of the prompt and the template's end, (1, n, layers, width), without the padding."""
        del family, role, request, inversion_tokens
        ending, _ = qwen3_model.tokens_of(ENDING, ENDING_TOKENS, qwen3_model.tokenizer(self.own_tokenizer))
        layers = text_layers(len(cast("Any", module).layers))
        found: list[Tensors] = []
        for one in inputs:
            ids: list[int] = one.value
            padding = MOST_TOKENS - len(ids)
            tokens = torch.tensor([[*ids, *[PAD] * padding, *ending]], device=device)
            mask = _mask(MOST_TOKENS + ENDING_TOKENS, len(ids)).to(device)
            states = qwen3_vl_model.states_at(module, tokens, mask, layers)
            read = mask.clone()
            read[:, :BEGINNING_TOKENS] = False
            found.append({"hidden": torch.stack(states, dim=2)[read][None]})
        return found

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        """Put the padding back between the prompt and the template's end. A mask hides it: its values do not matter."""
        states = encoded["text_encoder"][text]["hidden"]
        count = states.shape[1] - ENDING_TOKENS
        hidden = states.new_zeros(1, TEXT_TOKENS, *states.shape[2:])
        hidden[_mask(TEXT_TOKENS, count).to(states.device)] = states[0]
        return {"hidden": hidden, "count": torch.tensor([count])}

    def flow_levels(self, steps: int) -> Sequence[float]:
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        dtype, device, count = next(denoiser.parameters()).dtype, call.latents.device, len(call.latents)
        rows, columns = (side // PATCH for side in call.latents.shape[-2:])
        counts: list[int] = call.condition["count"].tolist()
        found = cast("Any", denoiser)(
            hidden_states=pack(call.latents.to(dtype)),
            encoder_hidden_states=call.condition["hidden"],
            timestep=(call.timestep / 1000).expand(count).to(dtype),
            position_ids=_positions(rows, columns).to(device),
            encoder_attention_mask=torch.cat([_mask(TEXT_TOKENS, one) for one in counts]).to(device),
            return_dict=False,
        )[0]
        return unpack(found, rows, columns)

    def encode_picture(
        self, latents: Latents, vae: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int
    ) -> list[EncodedPicture]:
        del latents
        return qwen_vae_model.encode_picture(vae, picture, mask, device, tile)

    def decode(self, latents: Latents, vae: nn.Module, values: torch.Tensor, tile: int) -> torch.Tensor:
        del latents
        return qwen_vae_model.decode(vae, values, tile)


def _mask(length: int, count: int) -> torch.Tensor:
    """Return the mask (1, length) that is False for the padding between ``count`` tokens and the template's end."""
    places = torch.arange(length)[None]
    return (places < count) | (places >= length - ENDING_TOKENS)


def _positions(rows: int, columns: int) -> torch.Tensor:
    """Return the positions of all tokens, (512 + rows * columns, 3), fp32: zero for the text; 0, row, column."""
    one = torch.arange(1)
    image = torch.cartesian_prod(one, torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.zeros(TEXT_TOKENS, 3), image.float()])


MODEL = Krea2()
