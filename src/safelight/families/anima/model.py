"""What Anima computes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from safelight.boundary import modules
from safelight.boundary.pictures import EncodedPicture
from safelight.families.anima.attention import CosmosProcessor
from safelight.families.anima.spec import PUBLISHED_SIZE, ROPE_SCALE
from safelight.families.anima.text_conditioner import EMBEDDINGS, TOKENS, AnimaConditionerConfig
from safelight.families.anima.text_encoder import Qwen3SmallConfig
from safelight.families.anima.transformer import MASK_CHANNELS, AnimaConfig
from safelight.families.components import Config
from safelight.families.family import Family, Latents
from safelight.families.family_model import Call, PromptText, Tensors, TextInput, TextInputs
from safelight.families.parts import qwen3_model, qwen_vae_model, t5_model
from safelight.families.parts.qwen_vae import QwenVAEConfig
from safelight.families.parts.rotary_model import RotaryFamilyModel
from safelight.families.parts.tokenizer import check
from safelight.families.parts.tokens import PATCH
from safelight.request.bounds import MOST_SIDE
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

TRANSFORMER = "diffusers.models.transformers.transformer_cosmos:CosmosTransformer3DModel"
CONDITIONER = "diffusers.models.condition_embedders.condition_embedder_anima:AnimaTextConditioner"
ROTARY = "diffusers.models.condition_embedders.condition_embedder_anima:AnimaRotaryEmbedding"

CONDITIONER_THETA = 10000.0
"""Base of the rotary embedding's frequencies in the text conditioner."""


class Anima(RotaryFamilyModel):
    """Computes Anima."""

    rotary_frequencies = staticmethod(qwen3_model.frequencies)

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        del family, attention
        match config:
            case Qwen3SmallConfig():
                return qwen3_model.build(config, final_norm=True)
            case QwenVAEConfig():
                return qwen_vae_model.autoencoder(config)
            case AnimaConditionerConfig():
                return modules.library_class(CONDITIONER)(
                    source_dim=config.source_width,
                    target_dim=config.target_width,
                    model_dim=config.width,
                    num_layers=config.layers,
                    num_attention_heads=config.width // config.head_size,
                    mlp_ratio=config.hidden / config.width,
                    target_vocab_size=config.vocabulary,
                    min_sequence_length=TOKENS,
                )
            case AnimaConfig():
                return _transformer(config)
            case _:
                raise ValueError(config)

    def make_buffer(self, module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor | None:
        if name == "inv_freq" and isinstance(module, modules.library_class(ROTARY)):
            size = 2 * len(buffer)
            steps = torch.arange(0, size, 2, dtype=torch.int64, device="cpu").to(dtype=torch.float32)
            return 1.0 / (CONDITIONER_THETA ** (steps / size))
        return super().make_buffer(module, name, buffer)

    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        del family, request, inversion_tokens
        if role == "text_encoder":
            by = qwen3_model.tokenizer(self.own_tokenizer)
            read = {pair: qwen3_model.tokens_of(pair.text, TOKENS, by) for pair in texts}
        else:
            own = self.own_tokenizer
            read = {pair: t5_model.tokens_without_padding(pair.text, TOKENS, own) for pair in texts}
        return TextInputs(
            # Two texts with the same T5 tokens may have other tokens of Qwen3, so the text conditioner's key has both.
            {pair: TextInput(ids, json.dumps([ids, pair.text])) for pair, (ids, _) in read.items()},
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
        """Return the hidden states of the tokens, (1, n, width). A text without tokens has one state, which is zero."""
        del family, role, request, inversion_tokens
        found: list[Tensors] = []
        for one in inputs:
            ids: list[int] = one.value
            weight = next(module.parameters())
            empty = torch.zeros(1, 1, cast("Any", module).config.hidden_size, dtype=weight.dtype, device=device)
            found.append({"hidden": qwen3_model.hidden_states(module, ids, len(ids), device) if ids else empty})
        return found

    def encode_texts_after(
        self, role: str, module: nn.Module, inputs: Sequence[TextInput], read: Sequence[Tensors], device: torch.device
    ) -> list[Tensors]:
        """Return the hidden states (1, 512, width). Those after the last token are zero."""
        del role
        net, found = cast("Any", module), list[Tensors]()
        for one, source in zip(inputs, read, strict=True):
            ids: list[int] = one.value
            check(ids, net.config.target_vocab_size, EMBEDDINGS)
            states = source["hidden"].to(next(module.parameters()).dtype)
            hidden = net(
                source_hidden_states=states,
                target_input_ids=torch.tensor([ids], device=device),
                target_attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
                source_attention_mask=torch.ones(1, states.shape[1], dtype=torch.int64, device=device),
            )
            found.append({"hidden": hidden})
        return found

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        return encoded["text_conditioner"][text]

    def flow_levels(self, steps: int) -> Sequence[float]:
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        dtype, count = next(denoiser.parameters()).dtype, len(call.latents)
        # The axis of frames: a picture is a video of one frame.
        latents = call.latents.to(dtype).unsqueeze(2)
        padding = torch.zeros_like(latents[:, :MASK_CHANNELS])
        found = cast("Any", denoiser)(
            hidden_states=torch.cat([latents, padding], dim=1),
            timestep=call.timestep.to(dtype).expand(count) / 1000,
            encoder_hidden_states=call.condition["hidden"].to(dtype),
            return_dict=False,
        )[0]
        return found.squeeze(2)

    def encode_picture(
        self, latents: Latents, vae: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int
    ) -> list[EncodedPicture]:
        del latents
        return qwen_vae_model.encode_picture(vae, picture, mask, device, tile, divides=True)

    def decode(self, latents: Latents, vae: nn.Module, values: torch.Tensor, tile: int) -> torch.Tensor:
        del latents
        return qwen_vae_model.decode(vae, values, tile)


def _transformer(config: AnimaConfig) -> nn.Module:
    net = modules.library_class(TRANSFORMER)(
        # diffusers' model needs torchvision to resize the mask of padding. So the mask is one of the latents' channels
        # here, and :meth:`Anima.predict` adds it.
        in_channels=config.channels + MASK_CHANNELS,
        concat_padding_mask=False,
        out_channels=config.channels,
        num_attention_heads=config.width // config.head_size,
        attention_head_dim=config.head_size,
        num_layers=config.layers,
        mlp_ratio=config.hidden / config.width,
        text_embed_dim=config.text_width,
        adaln_lora_dim=config.modulation,
        # The module has a position for each patch up to the largest of these, and computes no more with them.
        max_size=(PUBLISHED_SIZE[0], MOST_SIDE, MOST_SIDE),
        patch_size=(1, PATCH, PATCH),
        rope_scale=ROPE_SCALE,
        extra_pos_embed_type=None,
    )
    for block in net.transformer_blocks:
        block.attn1.set_processor(CosmosProcessor())
        block.attn2.set_processor(CosmosProcessor())
    return net


MODEL = Anima()
