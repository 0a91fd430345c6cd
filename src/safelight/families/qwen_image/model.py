"""What Qwen-Image computes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from safelight.boundary import modules
from safelight.boundary.pictures import EncodedPicture
from safelight.families.components import Config
from safelight.families.family import Family, Latents
from safelight.families.family_model import Call, ControlCall, PromptText, Tensors, TextInput, TextInputs
from safelight.families.parts import qwen25_model, qwen25_vision_model, qwen_vae_model
from safelight.families.parts.qwen3_model import tokens_of
from safelight.families.parts.qwen25 import Qwen25Config
from safelight.families.parts.qwen25_vision import Qwen25VisionConfig
from safelight.families.parts.qwen_chat import BEGINNING, BEGINNING_TOKENS, ENDING
from safelight.families.parts.qwen_vae import QwenVAEConfig
from safelight.families.parts.rotary_model import RotaryFamilyModel
from safelight.families.parts.sequences import join_texts, lengthen, pack, unpack
from safelight.families.parts.tokens import PATCH, axes
from safelight.families.qwen_image.controlnet import QwenImageControlNetConfig
from safelight.families.qwen_image.editing import EditPrompts
from safelight.families.qwen_image.transformer import QwenImageConfig
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

ENCODED_TOKENS = BEGINNING_TOKENS + 1024
"""The most tokens that diffusers' ``QwenImagePipeline`` gives the text encoder."""

READ_TOKENS = 512
"""The most tokens that the transformer reads, without :data:`BEGINNING`: the pipeline's ``max_sequence_length``."""

TRANSFORMER = "diffusers.models.transformers.transformer_qwenimage:QwenImageTransformer2DModel"
CONTROLNET = "diffusers.models.controlnets.controlnet_qwenimage:QwenImageControlNetModel"

BLOCKS = "transformer_blocks"


class QwenImage(RotaryFamilyModel):
    """Computes Qwen-Image."""

    reference_prompts = EditPrompts()

    @staticmethod
    def rotary_frequencies(config: Any) -> torch.Tensor:
        sees = hasattr(config, "patch_size")
        return (qwen25_vision_model if sees else qwen25_model).frequencies(config)

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        del family, attention
        match config:
            case Qwen25Config():
                return qwen25_model.build(config)
            case Qwen25VisionConfig():
                return qwen25_vision_model.build(config)
            case QwenVAEConfig():
                return qwen_vae_model.autoencoder(config)
            case QwenImageConfig():
                return modules.library_class(TRANSFORMER)(
                    zero_cond_t=config.zero_reference_time, **_transformer_kwargs(config)
                )
            case QwenImageControlNetConfig():
                return modules.library_class(CONTROLNET)(
                    extra_condition_channels=config.mask_inputs, **_transformer_kwargs(config.net)
                )
            case _:
                raise ValueError(config)

    def make_caches(self, module: nn.Module, at: torch.device) -> None:
        rope: Any = getattr(module, "pos_embed", None)
        if rope is not None:
            _compute_frequencies(rope, at)

    def save_tokenizer(self, family: Family, role: str, folder: Path) -> tuple[str, str] | None:
        return (
            qwen25_model.save_tokenizer(folder, ENCODED_TOKENS, self.own_tokenizer)
            if role in family.text_encoders
            else None
        )

    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        del family, role, request, inversion_tokens
        by = qwen25_model.tokenizer(self.own_tokenizer)
        each: dict[PromptText, TextInput] = {}
        cut: dict[PromptText, str] = {}
        for pair in texts:
            text, most = f"{BEGINNING}{pair.text}{ENDING}", BEGINNING_TOKENS + READ_TOKENS
            ids, _ = tokens_of(text, ENCODED_TOKENS, by)
            each[pair] = TextInput(ids, json.dumps(ids))
            _, left = tokens_of(text, most, by)
            # The template's ending comes after the prompt, so it is cut off first.
            if len(left) > len(ENDING):
                cut[pair] = left[: -len(ENDING)]
        return TextInputs(each, cut=cut)

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
        # The transformer does not read the end of a long text, but without it the others have other last bits.
        found = (qwen25_model.hidden_states(module, one.value, device) for one in inputs)
        return [{"hidden": one[:, BEGINNING_TOKENS : BEGINNING_TOKENS + READ_TOKENS]} for one in found]

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        return encoded["text_encoder"][text]

    def join_conditions(self, rows: Sequence[Tensors]) -> Tensors:
        return join_texts(rows)

    def flow_levels(self, steps: int) -> Sequence[float]:
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        rows, columns = (side // PATCH for side in call.latents.shape[-2:])
        inputs = _inputs(denoiser, call)
        added = lengthen(call.control, inputs["hidden_states"].shape[1] - rows * columns)
        of_blocks = [added[f"{BLOCKS}.{n}"] for n in range(_block_count(denoiser))] if added else None
        found = cast("Any", denoiser)(**inputs, controlnet_block_samples=of_blocks, return_dict=False)[0]
        return unpack(found[:, : rows * columns], rows, columns)

    def control_input(self, latents: Latents, picture: Any, generator: torch.Generator) -> torch.Tensor:
        del latents
        return pack(picture.distribution.sample(generator))

    def control(self, net: nn.Module, denoiser: nn.Module, call: Call, how: ControlCall) -> Tensors:
        inputs = _inputs(net, call)
        shown = how.picture.to(inputs["hidden_states"].dtype)
        outputs = cast("Any", net)(**inputs, controlnet_cond=shown, conditioning_scale=how.weight, return_dict=False)
        # Each output belongs to a run of the transformer's blocks, as in diffusers.
        blocks = _block_count(denoiser)
        run = math.ceil(blocks / len(outputs))
        return {f"{BLOCKS}.{n}": outputs[n // run] for n in range(blocks)}

    def encode_picture(
        self, latents: Latents, vae: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int
    ) -> list[EncodedPicture]:
        del latents
        return qwen_vae_model.encode_picture(vae, picture, mask, device, tile)

    def encode_control_picture(
        self, latents: Latents, vae: nn.Module, picture: Any, device: torch.device, tile: int
    ) -> EncodedPicture:
        del latents
        return qwen_vae_model.encode_control_picture(vae, picture, device, tile)

    def encode_reference(
        self, latents: Latents, vae: nn.Module, picture: Any, device: torch.device, tile: int
    ) -> EncodedPicture:
        del latents
        return qwen_vae_model.encode_reference(vae, picture, device, tile)

    def decode(self, latents: Latents, vae: nn.Module, values: torch.Tensor, tile: int) -> torch.Tensor:
        del latents
        return qwen_vae_model.decode(vae, values, tile)


def _transformer_kwargs(config: QwenImageConfig) -> dict[str, Any]:
    """Return the settings that a transformer and a ControlNet for it share."""
    return {
        "patch_size": PATCH,
        "in_channels": config.inputs,
        "out_channels": config.channels,
        "num_layers": config.layers,
        "attention_head_dim": config.head_size,
        "num_attention_heads": config.width // config.head_size,
        "joint_attention_dim": config.text_width,
        "axes_dims_rope": axes(config.head_size),
    }


def _block_count(denoiser: nn.Module) -> int:
    return len(getattr(denoiser, BLOCKS))


def _inputs(net: nn.Module, call: Call) -> dict[str, Any]:
    """Return the inputs that the transformer and its ControlNets share. ``net``: one of them, bound."""
    dtype = next(net.parameters()).dtype
    # The family computes each row in a call of its own, so all tokens of the text are read.
    [length] = call.condition["length"].tolist()
    shown = (call.latents, *call.references)
    packed = [pack(one.to(dtype)) for one in shown]
    return {
        # Concatenating copies, and a matrix in another layout is multiplied with other last bits.
        "hidden_states": torch.cat(packed, dim=1) if call.references else packed[0],
        "timestep": call.timestep.expand(1).to(dtype) / 1000,
        "encoder_hidden_states": call.condition["hidden"][:, :length].to(dtype),
        "img_shapes": [[(1, *(side // PATCH for side in one.shape[-2:])) for one in shown]],
    }


def _compute_frequencies(rope: Any, at: torch.device) -> None:
    """Compute the frequencies of a rotary embedding. diffusers does it when it builds the module, here on meta."""
    for name, index in (("pos_freqs", torch.arange(4096)), ("neg_freqs", torch.arange(4096).flip(0) * -1 - 1)):
        parts = [rope.rope_params(index, size, rope.theta) for size in rope.axes_dim]
        setattr(rope, name, torch.cat(parts, dim=1).to(at))
    rope.__class__ = _without_cache(type(rope))


@cache
def _without_cache(kind: Any) -> Any:
    """Return a subclass of a rotary embedding that computes the frequencies of an image's size anew in each call.

    diffusers caches them for the whole process together with the module: those of up to 128 sizes, some megabytes
    each, which would outlive the module.
    """

    def frequencies_on(self: Any, device: torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pos_freqs.to(device), self.neg_freqs.to(device)

    plain = {"_get_device_freqs": frequencies_on, "_compute_video_freqs": kind._compute_video_freqs.__wrapped__}
    return type(kind.__name__, (kind,), plain)


MODEL = QwenImage()
