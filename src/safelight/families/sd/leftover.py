"""Names of tensors that checkpoints contain and no module needs, each with the reason why it is allowed."""

from __future__ import annotations

import re

SD2_TEXT_LAYERS = r"cond_stage_model\.model\.transformer\.resblocks\."
"""The layers of SD 2's text encoder. Nothing computes with the last one, but the number of layers includes it."""

ALLOWED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"model_ema\.", "a moving average, used in training only"),
        (r".*\.position_ids$", "a range of integers that the module creates itself"),
        (r"(.*\.)?logit_scale$", "CLIP's temperature, used in its training only"),
        (r".*(^|\.)text_projection(\.weight)?$", "a projection that this base does not use"),
        (r".*\.attn_mask$", "a triangle of infinities that the module creates itself"),
        (SD2_TEXT_LAYERS, "the last layer, which SD 2 was trained without"),
        (r"text_encoder\.vision_model\.|safety_checker\.", "a component that looks at images"),
        (
            r"(.*_)?(betas|alphas_cumprod|alphas_cumprod_prev)$",
            "the noise schedule, which Safelight computes itself",
        ),
        (r"sqrt_.*alphas_cumprod$|posterior_|log_one_minus|sqrt_recip|lvlb_weights|denoiser\.", "the noise schedule"),
        (r"first_stage_model\.loss\.|loss\.", "the VAE's training loss"),
        (r"v_pred$|ztsnr$|edm_", "a marker of the prediction type"),
        (r"logvar$|scale_factor$|global_step$|epoch$|iteration$", "a number used in training only"),
    )
)


def counts_for_layer_number(name: str) -> bool:
    """Return whether the number of an encoder's layers is inferred from a tensor, although nothing computes with it."""
    return re.match(SD2_TEXT_LAYERS, name) is not None


def reason(name: str) -> str | None:
    """Return why a tensor of this name may be left over, or None if it may not."""
    return next((why for pattern, why in ALLOWED if pattern.match(name)), None)
