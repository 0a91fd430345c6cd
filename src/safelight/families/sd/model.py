"""What Stable Diffusion 1 and 2 compute. SDXL's model extends it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from safelight.boundary import exports, modules
from safelight.families.components import Config
from safelight.families.family import Family
from safelight.families.family_model import Call, ControlCall, FamilyModel, PromptText, Tensors, TextInput, TextInputs
from safelight.families.parts import clip_model
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.vae import NORM_GROUPS, VAEConfig
from safelight.families.parts.vae_model import autoencoder
from safelight.families.sd import encoding
from safelight.families.sd.compel_weighting import CompelEncoder
from safelight.families.sd.controlnet import ControlNetConfig
from safelight.families.sd.encoding import EncoderOutput
from safelight.families.sd.recognition import TIME_IDS_WIDTH, attention_heads
from safelight.families.sd.unet import UNetConfig
from safelight.request.prompts.tokens import END, VOCABULARY, Chunk, chunks
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

_PAD_TOKENS = {0: "!", END: "<|endoftext|>"}
"""The text of each padding token."""


class StableDiffusion(FamilyModel):
    """Computes Stable Diffusion models.

    ``heads``: number of the UNet's attention heads, by family; a family without an entry has 64 channels per head.
    ``sizes``: latents per side in training, by family.
    ``pads``: id of the padding token, by (family, text-encoder role).
    """

    def __init__(self, heads: Mapping[str, int], sizes: Mapping[str, int], pads: Mapping[tuple[str, str], int]) -> None:
        self._heads = heads
        self._sizes = sizes
        self._pads = pads

    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        match config:
            case CLIPConfig():
                return clip_model.build(config, attention)
            case VAEConfig():
                return autoencoder(family, config)
            case UNetConfig():
                up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths))
                return modules.UNET(
                    sample_size=self._sizes[family.name],
                    out_channels=config.out_channels,
                    up_block_types=up,
                    **self._shared_unet_kwargs(family, config),
                )
            case ControlNetConfig():
                return modules.CONTROLNET(
                    conditioning_channels=config.hint_channels,
                    conditioning_embedding_out_channels=config.hint,
                    **self._shared_unet_kwargs(family, config.encoder),
                )
            case _:
                raise ValueError(config)

    def _shared_unet_kwargs(self, family: Family, config: UNetConfig) -> dict[str, Any]:
        """Return the settings that a UNet and a ControlNet for it share."""
        heads = self._heads.get(family.name)
        added: dict[str, Any] = {}
        if config.time_features is not None:
            added = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": TIME_IDS_WIDTH,
                "projection_class_embeddings_input_dim": config.time_features,
            }
        return {
            "in_channels": config.in_channels,
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths),
            "transformer_layers_per_block": (*(depth or 1 for depth in config.depths[:-1]), config.mid_depth),
            "cross_attention_dim": config.cross_attention_dim,
            "attention_head_dim": heads or tuple(attention_heads(None, width) for width in config.block_out_channels),
            "use_linear_projection": config.linear_projection,
            "norm_num_groups": NORM_GROUPS,
            **added,
        }

    def run_lazy_init(self, module: nn.Module) -> None:
        clip_model.run_lazy_init(module)

    def pad(self, family: Family, role: str) -> int:
        """Return the id of a text encoder's padding token."""
        return self._pads[family.name, role]

    def save_tokenizer(self, family: Family, role: str, folder: Path) -> tuple[str, str] | None:
        if role not in family.text_encoders:
            return None
        name = role.replace("text_encoder", "tokenizer")
        exports.save_tokenizer(folder / name, VOCABULARY, _PAD_TOKENS[self.pad(family, role)])
        return name, "CLIPTokenizer"

    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        if request.prompt_syntax == "compel":
            every = [text for _, text in texts]
            known = sorted(inversion_tokens.items())
            return TextInputs(
                {pair: TextInput(pair.text, json.dumps([pair.text, known, every])) for pair in texts},
                padded_together=True,
            )
        pad = self.pad(family, role)
        read = {pair: chunks(pair.field, pair.text, pad, inversion_tokens) for pair in texts}
        empty = chunks("prompt", "", pad)
        most = max(len(one) for one in read.values())
        filled = {pair: (*one, *empty * (most - len(one))) for pair, one in read.items()}
        return TextInputs({pair: TextInput(one, _key(one), len(one)) for pair, one in filled.items()})

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
        encoder = cast("Any", module)

        def run_encoder(ids: torch.Tensor, mask: torch.Tensor | None = None) -> EncoderOutput:
            out = encoder(ids, attention_mask=mask, output_hidden_states=True)
            return self.choose_layer(role, module, out, request.skipped_layers)

        if request.prompt_syntax == "compel":
            dtype = next(module.parameters()).dtype
            compel = CompelEncoder(
                run_encoder, dtype, inversion_tokens, self.pad(family, role), device, pooled=self.pools(role)
            )
            found = [compel.encoded(one.value) for one in inputs]
            hidden = compel.padded([states for states, _ in found])
            return [_named(one, pooled) for one, (_, pooled) in zip(hidden, found, strict=True)]
        encoded: list[Tensors] = []
        for one in inputs:
            outputs: list[EncoderOutput] = []
            for chunk in one.value:
                states, pooled = run_encoder(torch.tensor([chunk.ids], device=device))
                outputs.append((states if chunk.weights is None else _weighted(states, chunk.weights), pooled))
            # The pooled output is that of the first chunk.
            states = torch.cat([hidden for hidden, _ in outputs], dim=1) if len(outputs) > 1 else outputs[0][0]
            encoded.append(_named(states, outputs[0][1]))
        return encoded

    def pools(self, role: str) -> bool:
        """Return whether the family uses the pooled output of a text encoder."""
        del role
        return False

    def choose_layer(self, role: str, module: nn.Module, out: Any, clip_skip: int) -> EncoderOutput:
        """Choose the layer of a text encoder's output that conditions the UNet."""
        del role
        return encoding.normed_layer(module, out, clip_skip)

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        return {"hidden": encoded["text_encoder"][text]["hidden"]}

    def added_cond_kwargs(self, call: Call) -> dict[str, torch.Tensor] | None:
        """Return the added conditioning of the UNet, None for a UNet without any."""
        del call
        return None

    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        latents = torch.cat([call.latents, *call.extra], dim=1) if call.extra else call.latents
        control: dict[str, Any] = {}
        if call.control:
            *down, middle = call.control.values()
            control = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return cast("Any", denoiser)(
            latents,
            call.timestep,
            encoder_hidden_states=call.condition["hidden"],
            added_cond_kwargs=self.added_cond_kwargs(call),
            return_dict=False,
            **control,
        )[0]

    def control(self, net: nn.Module, denoiser: nn.Module, call: Call, how: ControlCall) -> Tensors:
        del denoiser
        down, middle = cast("Any", net)(
            call.latents,
            call.timestep,
            encoder_hidden_states=call.condition["hidden"],
            controlnet_cond=torch.cat([how.picture.to(call.latents.dtype)] * len(call.latents)),
            conditioning_scale=how.weight,
            guess_mode=how.guess_mode,
            added_cond_kwargs=self.added_cond_kwargs(call),
            return_dict=False,
        )
        return {**{f"down_blocks.{n}": tensor for n, tensor in enumerate(down)}, "mid_block": middle}


def _key(text: Sequence[Chunk]) -> str:
    return json.dumps([[chunk.ids, chunk.weights] for chunk in text])


def _named(hidden: torch.Tensor, pooled: torch.Tensor | None) -> Tensors:
    return {"hidden": hidden} if pooled is None else {"hidden": hidden, "pooled": pooled}


def _weighted(hidden: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Multiply each token's state by its weight and restore the mean of all: AUTOMATIC1111's emphasis."""
    wide = hidden.float()
    scaled = wide * torch.tensor(weights, device=wide.device).view(1, -1, 1)
    return (scaled * (wide.mean() / scaled.mean())).to(hidden.dtype)


MODEL = StableDiffusion(
    heads={"sd1": 8},
    sizes={"sd1": 64, "sd2": 96},
    pads={("sd1", "text_encoder"): END, ("sd2", "text_encoder"): 0},
)
