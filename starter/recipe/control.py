"""Train the starter ControlNet: edges (Canny) of a picture say where things are. Over a starter's UNet, which stays as
it is.

``python -m recipe.control`` trains it (Zhang et al. 2023, arXiv 2302.05543: a copy of the UNet's encoder behind
convolutions that start as zero, half of the captions left out) and writes it into the package, fp16, in diffusers'
names. Some forty minutes on one core; continues where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDPMScheduler
from torch import nn

from recipe import data, model
from recipe.adapters import frozen, pack, pictures
from recipe.train import Stage, shifted

NAME = "edges"
CHANNELS = (8, 16, 32, 64)
"""Of the small network that brings the picture of edges down to the latents' size."""

THRESHOLDS = 100, 200
"""Canny's, as the preprocessor has them by default."""

VARIANTS = 10
"""Of each picture, moved by up to six pixels and perhaps mirrored: so that shapes are learnt, not subjects."""


def edges(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w), -1 to 1, to white edges on black, 0 to 1."""
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    found = np.stack([cv2.Canny(image, *THRESHOLDS) for image in pixels])
    return torch.from_numpy(found)[:, None].expand(-1, 3, -1, -1).float() / 255


def train(
    stage: Stage,
    control: nn.Module,
    unet: nn.Module,
    encoder: nn.Module,
    latents: torch.Tensor,
    shown: torch.Tensor,
    ids: torch.Tensor,
    batch: int = 32,
) -> None:
    """Predict the noise with the edges known. ``latents`` and ``shown``: (n, …), ``ids``: (forms, n, 77)."""
    empty = model.token_ids([""])[0]
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    draw = stage.generator
    while stage.step < stage.steps:
        index = torch.randint(0, len(latents), (batch,), generator=draw)
        captions = ids[torch.randint(0, len(ids), (batch,), generator=draw), index].clone()
        captions[torch.rand(batch, generator=draw) < 0.5] = empty
        noise = torch.randn(latents[index].shape, generator=draw)
        steps = torch.randint(0, 1000, (batch,), generator=draw)
        noisy = schedule.add_noise(latents[index], noise, steps)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            context = encoder(captions).last_hidden_state
        down, mid = control(noisy, steps, context, controlnet_cond=shown[index], return_dict=False)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        stage.update(F.mse_loss(unet(noisy, steps, context, **more).sample, noise))
    stage.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/starter"))
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = frozen()
    images = data.load(arguments.packages)
    pixels = pictures(images)
    moved = torch.Generator().manual_seed(2)
    varied = torch.cat([pixels, *(shifted(pixels, moved) for _ in range(VARIANTS - 1))])
    with torch.no_grad():
        encoded = [parts["vae"].encode(part).latent_dist.mean for part in varied.split(64)]
    latents = torch.cat(encoded) * model.SCALING_FACTOR
    captions = [model.token_ids(images.subjects), model.token_ids([f"a {s}" for s in images.subjects])]
    ids = torch.stack(captions).repeat(1, VARIANTS, 1)
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=CHANNELS)
    control.train().requires_grad_(True)
    stage = Stage(arguments.out / f"{NAME}.pt", list(control.parameters()), arguments.steps, rate=5e-4, decay=0.995)
    train(stage, control, parts["unet"], parts["text_encoder"], latents, edges(varied), ids)
    pack(NAME, {name: tensor.half().contiguous() for name, tensor in control.state_dict().items()}, "controlnet")


if __name__ == "__main__":
    main()
