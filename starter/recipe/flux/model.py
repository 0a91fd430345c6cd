"""The architecture of the FLUX.1 starter: FLUX.1 dev block for block, only narrower."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from recipe.adapters import frozen
from safelight.families.components import Config
from safelight.families.family_model import construct
from safelight.families.flux.model import clip_tokens
from safelight.families.flux.spec import FLUX
from safelight.families.flux.transformer import PATCH, FluxConfig
from safelight.families.parts import t5_model
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.flux_latents import SCALING_FACTOR, SHIFT_FACTOR
from safelight.families.parts.sequences import image_positions, pack, unpack
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.vae import VAEConfig

CHANNELS = 16
CONFIGS: dict[str, Config] = {
    "text_encoder": CLIPConfig(64, 256, 3, 49408, 77, None, "quick_gelu"),
    "text_encoder_2": T5Config(32128, 64, 192, 2, 2, 32),
    "transformer": FluxConfig(CHANNELS * PATCH**2, CHANNELS, 192, 2, 6, 32, 64, 64, guidance=True),
    "vae": VAEConfig(3, 3, CHANNELS, (32, 64, 64, 96), 2, quantised=False),
}

LONGEST = 24
"""CLIP's tokens of a caption in training. Its pooled output is that of the end token, so padding changes nothing."""


class Captions(NamedTuple):
    """Token ids: ``clip`` (n, :data:`LONGEST`), ``t5`` (n, length)."""

    clip: torch.Tensor
    t5: torch.Tensor


def build() -> dict[str, Any]:
    """Build the four components with seeded random weights, the transformer's gates and last layer as zero.

    The VAE and CLIP start as those of ``starter-noto``: the VAE knows the same pictures at half the size, CLIP the
    subjects.
    """
    torch.manual_seed(0)
    parts: dict[str, Any] = {role: construct(FLUX, config) for role, config in CONFIGS.items()}
    for module in parts.values():
        module.train().requires_grad_(True)
    with torch.no_grad():
        for name, parameter in parts["transformer"].named_parameters():
            if ".norm1" in name or ".norm.linear" in name or name.startswith(("norm_out.", "proj_out.")):
                parameter.zero_()
        parts["text_encoder_2"].shared.weight.mul_(0.5)
    start = frozen()
    parts["text_encoder"].load_state_dict(start["text_encoder"].state_dict())
    _widen(parts["vae"], start["vae"])
    return parts


def _widen(vae: Any, narrow: Any) -> None:
    """Give a VAE the weights of one with fewer latent channels, and with 1x1 convolutions around its latents, in place.

    The first channels become those of the narrow VAE, of unit spread; the others start as random ones.
    """
    known = {name: tensor for name, tensor in narrow.state_dict().items() if name in vae.state_dict()}
    into, out = "decoder.conv_in.", "encoder.conv_out."
    inner = {name: tensor for name, tensor in known.items() if not name.startswith((into, out))}
    missing, unexpected = vae.load_state_dict(inner, strict=False)
    if unexpected or {name.rpartition(".")[0] + "." for name in missing} != {into, out}:
        raise ValueError(f"the VAE of starter-noto does not fit: {missing}, {unexpected}")
    few, quant, post = narrow.config.latent_channels, narrow.quant_conv, narrow.post_quant_conv
    scale = narrow.config.scaling_factor
    means = quant.weight[:few, :, 0, 0] * scale
    with torch.no_grad():
        encoder, decoder = vae.encoder.conv_out, vae.decoder.conv_in
        encoder.weight[few:CHANNELS] *= 3
        encoder.weight[:few] = torch.einsum("om,mihw->oihw", means, narrow.encoder.conv_out.weight)
        encoder.bias[:few] = means @ narrow.encoder.conv_out.bias + quant.bias[:few] * scale
        encoder.bias[CHANNELS:] -= 4
        into = narrow.decoder.conv_in
        decoder.weight[:, :few] = torch.einsum("omhw,mi->oihw", into.weight, post.weight[:, :, 0, 0]) / scale
        decoder.bias[:] = into.bias + into.weight.sum((2, 3)) @ post.bias


def token_ids(captions: list[str], length: int) -> Captions:
    """Return the token ids as Safelight gives them to the encoders. ``length``: T5's tokens, padding included.

    Raises ValueError if a caption is too long.
    """
    clip = [clip_tokens(caption) for caption in captions]
    t5 = [t5_model.tokens_of(caption, length) for caption in captions]
    too_long = [c for c, ids, (_, cut) in zip(captions, clip, t5, strict=True) if cut or ids[LONGEST - 1] != ids[-1]]
    if too_long:
        raise ValueError(f"captions with more tokens than {LONGEST} (CLIP) or {length} (T5): {too_long}")
    return Captions(torch.tensor(clip)[:, :LONGEST], torch.tensor([ids for ids, _ in t5]))


def predict(
    parts: dict[str, Any], noisy: torch.Tensor, levels: torch.Tensor, captions: Captions, guidance: torch.Tensor
) -> torch.Tensor:
    """Return the predicted velocity (n, channels, height, width). ``levels`` and ``guidance``: (n,)."""
    pooled = parts["text_encoder"](captions.clip).pooler_output
    hidden = parts["text_encoder_2"](captions.t5).last_hidden_state
    rows, columns = (side // PATCH for side in noisy.shape[-2:])
    found = parts["transformer"](
        hidden_states=pack(noisy),
        timestep=levels,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=hidden,
        txt_ids=torch.zeros(hidden.shape[1], 3),
        img_ids=image_positions(noisy),
        return_dict=False,
    )[0]
    return unpack(found, rows, columns).float()


def rescale(vae: Any, mean: torch.Tensor, spread: torch.Tensor) -> None:
    """Change the VAE's latents, in place, so that FLUX.1's factors give zero mean and unit spread.

    What it reconstructs stays the same, except at the edges, where the decoder's first convolution sees padding.
    ``mean``: of each channel. ``spread``: of all.
    """
    factor = 1 / (spread * SCALING_FACTOR)
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    with torch.no_grad():
        out.weight[:CHANNELS] *= factor
        out.bias[:CHANNELS] = (out.bias[:CHANNELS] - mean) * factor + SHIFT_FACTOR
        out.bias[CHANNELS:] += 2 * torch.log(factor)
        into.bias += (into.weight.sum((2, 3)) * (mean - SHIFT_FACTOR / factor)).sum(1)
        into.weight /= factor


def vae_input(latents: torch.Tensor) -> torch.Tensor:
    """Return what the decoder reads for latents as the transformer has them."""
    return latents / SCALING_FACTOR + SHIFT_FACTOR
