"""The starters' architecture: Stable Diffusion 1 block for block, only narrower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

TOKENIZER = Path(__file__).parents[2] / "src/safelight/request/prompts/clip_tokenizer.json"
LENGTH = 77
START, END = 49406, 49407
SCALING_FACTOR = 0.18215
"""Stable Diffusion 1's latent scale; a loader takes it from the base, so the VAE is rescaled to fit it."""


def vae() -> AutoencoderKL:
    # Annotated as tuples of one, all three.
    blocks: dict[str, Any] = {
        "block_out_channels": (32, 64, 64, 96),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=SCALING_FACTOR,
    )


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96, 128, 96),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=1,
            hidden_act="quick_gelu",
            vocab_size=49408,
            max_position_embeddings=LENGTH,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def token_ids(captions: list[str]) -> torch.Tensor:
    """(n, 77) int64, padded with the end token as Stable Diffusion 1 pads."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=END, pad_token="<|endoftext|>")
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(captions)])


def rescale(model: Any, factor: float) -> None:
    """Make the VAE's latents ``factor`` times as large, in place, without changing what it reconstructs."""
    with torch.no_grad():
        model.quant_conv.weight[:4] *= factor
        model.quant_conv.bias[:4] *= factor
        model.quant_conv.bias[4:] += 2 * torch.log(torch.tensor(factor))
        model.post_quant_conv.weight /= factor
