"""Names that checkpoints carry and no module needs, each with the reason why it may be left over."""

from __future__ import annotations

import re

LAST_LAYER = r"cond_stage_model\.model\.transformer\.resblocks\."
"""Of SD 2's text encoder. Nothing computes with it, but the depth is counted by it."""

ALLOWED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"model_ema\.", "a moving average kept for training"),
        (r".*\.position_ids$", "a range of integers that the module makes itself"),
        (r"(.*\.)?logit_scale$", "CLIP's temperature, used in its training only"),
        (r".*(^|\.)text_projection(\.weight)?$", "a projection that this base does not use"),
        (r".*\.attn_mask$", "a triangle of infinities that the module makes itself"),
        (LAST_LAYER, "the last layer, which SD 2 was trained without"),
        (r"text_encoder\.vision_model\.|safety_checker\.", "parts for looking at images"),
        (r"(.*_)?(betas|alphas_cumprod|alphas_cumprod_prev)$", "the noise schedule, which follows from its rule"),
        (r"sqrt_.*alphas_cumprod$|posterior_|log_one_minus|sqrt_recip|lvlb_weights|denoiser\.", "the noise schedule"),
        (r"first_stage_model\.loss\.|loss\.", "the VAE's training loss"),
        (r"v_pred$|ztsnr$|edm_", "a marker of the prediction type"),
        (r"logvar$|scale_factor$|global_step$|epoch$|iteration$", "a number kept for training"),
    )
)


def tells_depth(name: str) -> bool:
    """Whether a tensor that nothing computes with still tells how deep its encoder is."""
    return re.match(LAST_LAYER, name) is not None


def reason(name: str) -> str | None:
    """Why a tensor of this name may be left over, or None when it may not."""
    return next((why for pattern, why in ALLOWED if pattern.match(name)), None)
