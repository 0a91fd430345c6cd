"""Rules that identify the kind of a file by the names of its tensors. The first matching row of the table wins.

The user sees the rule's sentence. A ``checkpoint`` row only decides the base; the base's table of tensors then decides
whether the checkpoint is complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KindRule:
    """A rule that fires when each of its patterns matches the start of some tensor's name.

    ``base``: None if the names do not decide the base.
    """

    kind: str
    base: str | None
    patterns: tuple[str, ...]
    sentence: str

    def fires(self, names: Iterable[str]) -> bool:
        return all(any(pattern.match(name) for name in names) for pattern in map(re.compile, self.patterns))


def _rule(kind: str, base: str | None, sentence: str, *patterns: str) -> KindRule:
    return KindRule(kind, base, patterns, sentence)


UNET = r"model\.diffusion_model\."
FULL = r"(lora_(unet|te|te1|te2)_|diffusion_model\.|text_encoders\.).*\.diff(_b)?$"

KIND_RULES: tuple[KindRule, ...] = (
    _rule("checkpoint", "sd3", "joint blocks are Stable Diffusion 3's", r".*joint_blocks\.0\."),
    _rule("checkpoint", "flux", "double blocks are FLUX's", r".*double_blocks\.0\.img_attn"),
    _rule("checkpoint", "flux", "single transformer blocks are FLUX's", r"single_transformer_blocks\.0\."),
    _rule("control_lora", None, "low-rank pairs of a ControlNet (Control-LoRA)", r"lora_controlnet$"),
    _rule(
        "controlnet_union",
        None,
        "task embeddings are ControlNet Union's",
        r"(control_model\.)?(task_embedding$|spatial_ch_projs\.|transformer_layes\.)",
    ),
    _rule("lora", "flux", "low-rank pairs for double blocks", r"lora_unet_double_blocks_0"),
    _rule("lokr", None, "Kronecker factors (LyCORIS LoKr)", r".*\.lokr_w[12]"),
    _rule("loha", None, "Hadamard factors (LyCORIS LoHa)", r".*\.hada_w1_a"),
    _rule("lora", None, "low-rank pairs with magnitudes (DoRA)", r".*\.dora_scale"),
    _rule("lora", None, "low-rank pairs named as kohya's scripts name them", r"lora_(unet|te|te1|te2)_.*\.lora_down"),
    _rule("lora", None, "low-rank pairs named as PEFT names them", r".*\.lora_A\."),
    _rule(
        "lora", None, "low-rank pairs named as diffusers names them", r".*(\.lora\.down\.|_lora\.down\.|\.lora_down)"
    ),
    _rule("full_difference", None, "whole differences (LyCORIS full)", FULL),
    _rule("controlnet", None, "a control model in LDM's names", r"control_model\.input_blocks\."),
    _rule("controlnet", None, "a conditioning embedding is ControlNet's", r"controlnet_cond_embedding\."),
    _rule("controlnet", None, "an input hint block is ControlNet's", r"input_hint_block\."),
    _rule("ip_adapter", None, "image projection and adapter keys", r"ip_adapter\.", r"image_proj\."),
    _rule("t2i_adapter", None, "an adapter's body of residual blocks", r"(adapter\.)?body\.0\.resnets\.0\."),
    _rule("checkpoint", "sdxl", "two text encoders and added conditioning", r"conditioner\.embedders\.1\.", UNET),
    _rule(
        "checkpoint",
        "sdxl-refiner",
        "one OpenCLIP encoder and added conditioning",
        r"conditioner\.embedders\.0\.model\.",
        UNET,
    ),
    _rule("checkpoint", "sd2", "an OpenCLIP text encoder", r"cond_stage_model\.model\.", UNET),
    _rule("checkpoint", "sd1", "an OpenAI CLIP text encoder", r"cond_stage_model\.transformer\.", UNET),
    _rule("unet", None, "a UNet in LDM's names and no text encoder", UNET + r"input_blocks\."),
    _rule(
        "checkpoint", "sdxl", "two text encoders in diffusers' names", r"unet\.", r"text_encoder\.", r"text_encoder_2\."
    ),
    _rule("checkpoint", "sdxl-refiner", "only the second text encoder", r"unet\.add_embedding", r"text_encoder_2\."),
    _rule("checkpoint", None, "a text encoder and a UNet in diffusers' names", r"unet\.conv_in\.", r"text_encoder\."),
    _rule("textual_inversion", "sdxl", "an embedding for each of two encoders", r"clip_l$", r"clip_g$"),
    _rule("textual_inversion", None, "an embedding and nothing else", r"(emb_params|string_to_param\..*|<.*>)$"),
    _rule(
        "unet",
        None,
        "a UNet in diffusers' names",
        r"conv_in\.",
        r"down_blocks\.0\.",
        r"mid_block\.",
        r"time_embedding\.",
    ),
    _rule(
        "vae",
        None,
        "an encoder and a decoder to and from latents",
        r"(first_stage_model\.)?encoder\.conv_in\.",
        r"(first_stage_model\.)?decoder\.conv_in\.",
    ),
    _rule("text_encoder", None, "a CLIP text encoder alone", r"(text_model\.)?embeddings\.token_embedding\."),
    _rule("upscaler", None, "residual dense blocks are ESRGAN's", r"(model\.1\.sub\.0|body\.0\.rdb1|RRDB_trunk)"),
    _rule(
        "upscaler",
        None,
        "a compact upscaler's alternating convolutions",
        r"body\.0\.weight$",
        r"body\.1\.weight$",
        r"body\.2\.weight$",
    ),
)
