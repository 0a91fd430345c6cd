"""Rules that identify the kind of a single file by the names of its tensors. The first rule that fires wins.

The user sees the rule's sentence. A ``checkpoint`` rule only decides the family; the family's tables of tensors then
decide whether the checkpoint is complete. The rules of families that Safelight has are in their ``spec.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from safelight.families.tables import Shapes


@dataclass(frozen=True, slots=True)
class KindRule:
    """A rule that fires when the names of a file's tensors have these patterns.

    ``base``: the family; None if the names do not decide it.
    ``patterns``: each matches the start of some tensor's name.
    ``absent``: none of them matches the start of any tensor's name.
    ``axes``: required ``ndim`` of tensors, by name, if the file has them.
    """

    kind: str
    base: str | None
    sentence: str
    patterns: tuple[str, ...]
    absent: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict[str, int])

    def fires(self, shapes: Shapes, lines: str) -> bool:
        """Return whether the rule fires. ``lines``: what :func:`lines_of` returns for the names in ``shapes``."""
        if any(name in shapes and len(shapes[name]) != axes for name, axes in self.axes.items()):
            return False
        return all(_at_line_start(pattern).search(lines) for pattern in self.patterns) and not any(
            _at_line_start(pattern).search(lines) for pattern in self.absent
        )


def lines_of(names: Iterable[str]) -> str:
    """Return one text with a name after each line break.

    Searching it once is far faster than matching thousands of names.
    """
    return "".join("\n" + name.replace("\n", " ") for name in names)


@cache
def _at_line_start(pattern: str) -> re.Pattern[str]:
    # A search for what may be anywhere in a line takes a tenth of the time without ".*", which matches at every place.
    if pattern.startswith(".*") and "|" not in pattern:
        return re.compile(pattern.removeprefix(".*"), re.MULTILINE)
    # A search for a line break is ten times as fast as one for "^".
    return re.compile(f"\n(?:{pattern})", re.MULTILINE)


def rule(kind: str, base: str | None, sentence: str, *patterns: str) -> KindRule:
    return KindRule(kind, base, sentence, patterns)


_FULL = r"(lora_(unet|te[123]?)_|diffusion_model\.|text_encoders\.).*\.diff(_b)?$"

NOT_SUPPORTED = (
    rule(
        "checkpoint",
        "svdquant",
        "packed weights with low-rank parts are SVDQuant's (Nunchaku)",
        r".*\.qweight$",
        r".*\.(proj_down|lora_down|smooth_factor|smooth)$",
    ),
    rule("checkpoint", "awq-or-gptq", "packed weights with zeros are AWQ's or GPTQ's", r".*\.qweight$", r".*\.qzeros$"),
    rule("checkpoint", "sdnq", "weights with zero points are SDNQ's", r".*\.(zero_point|svd_up)$"),
    rule("checkpoint", "sd3", "joint blocks are Stable Diffusion 3's", r".*joint_blocks\.0\."),
    rule(
        "checkpoint",
        "flux2",
        "a modulation for all double blocks and a guidance scale as an input are FLUX.2 dev's",
        r".*double_stream_modulation_img\.",
        r".*(guidance_in|guidance_embedder)\.",
    ),
    rule(
        "checkpoint",
        "chroma-radiance",
        "blocks that draw the pixels of each patch are Chroma1-Radiance's, which has no VAE",
        r".*nerf_(blocks|final_layer|final_layer_conv|image_embedder)\.",
    ),
    rule(
        "checkpoint",
        "qwen-image-2.1",
        "a norm within the text projection is Qwen-Image 2.1's",
        r".*txt_in\.text_norm\.",
    ),
    rule(
        "checkpoint",
        "qwen-image-layered",
        "an embedding beside the timestep's is Qwen-Image Layered's",
        r".*time_text_embed\.addition_t_embedding\.",
    ),
    KindRule(
        "checkpoint",
        "cosmos-predict2",
        "three modulations in each block, and no adapter between a language model and the transformer: Cosmos-Predict2",
        (
            r".*(x_embedder\.proj\.1|patch_embed\.proj)\.weight$",
            r".*(adaln_modulation_cross_attn\.1|norm2\.linear_1)\.weight$",
        ),
        (r".*(llm_adapter|text_conditioner)\.",),
    ),
)
"""Families that Safelight names and does not support yet."""

ADAPTER_RULES = (
    rule("control_lora", None, "low-rank pairs of a ControlNet (Control-LoRA)", r"lora_controlnet$"),
    rule(
        "controlnet_union",
        None,
        "task embeddings are ControlNet Union's",
        r"(control_model\.)?(task_embedding$|spatial_ch_projs\.|transformer_layes\.)",
    ),
    rule("lokr", None, "Kronecker factors (LyCORIS LoKr)", r".*\.lokr_w[12]"),
    rule("loha", None, "Hadamard factors (LyCORIS LoHa)", r".*\.hada_w1_a"),
    rule("lora", None, "low-rank pairs with magnitudes (DoRA)", r".*\.dora_scale"),
    rule("lora", None, "low-rank pairs named as kohya's scripts name them", r"lora_(unet|te[123]?)_.*\.lora_down"),
    rule("lora", None, "low-rank pairs named as PEFT names them", r".*\.lora_A\."),
    rule("lora", None, "low-rank pairs named as diffusers names them", r".*(\.lora\.down\.|_lora\.down\.|\.lora_down)"),
    rule("full_difference", None, "whole differences (LyCORIS full)", _FULL),
    rule("controlnet", None, "a control model in LDM's names", r"control_model\.input_blocks\."),
    rule("controlnet", None, "a conditioning embedding is ControlNet's", r"controlnet_cond_embedding\."),
    rule("controlnet", None, "an input hint block is ControlNet's", r"input_hint_block\."),
    rule("ip_adapter", None, "image projection and adapter keys", r"ip_adapter\.", r"image_proj\."),
    rule("t2i_adapter", None, "an adapter's body of residual blocks", r"(adapter\.)?body\.0\.resnets\.0\."),
    rule("textual_inversion", "sdxl", "an embedding for each of two encoders", r"clip_l$", r"clip_g$"),
    rule("textual_inversion", None, "an embedding and nothing else", r"(emb_params|string_to_param\..*|<.*>)$"),
)
"""Adapters, in every program's names; tried before checkpoint rules, because some adapters also match those."""

PART_RULES = (
    rule(
        "vae",
        None,
        "an encoder and a decoder to and from latents",
        r"(first_stage_model\.)?encoder\.conv_in\.",
        r"(first_stage_model\.)?decoder\.conv_in\.",
    ),
    rule("text_encoder", None, "a CLIP text encoder alone", r"(text_model\.)?embeddings\.(token|position)_embedding\."),
    rule("upscaler", None, "residual dense blocks are ESRGAN's", r"(model\.1\.sub\.0|body\.0\.rdb1|RRDB_trunk)"),
    rule(
        "upscaler",
        None,
        "a compact upscaler's alternating convolutions",
        r"body\.0\.weight$",
        r"body\.1\.weight$",
        r"body\.2\.weight$",
    ),
)
"""Parts of models in files of their own. They come after checkpoints, which contain such parts."""
