"""Train the VAE, then UNet and text encoder on all styles, then tune those two for each style.

``python -m recipe.train --packages DIR --out DIR`` runs all stages, and continues where it was stopped: every stage
saves its whole state every few minutes. Seeds are fixed; on another machine the sums differ in their last bits.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from recipe import data, model

SAVE_EVERY = 180.0
"""Seconds between saved states."""


class Stage:
    """A resumable training loop: parameters, their moving average, the optimizer and the generator, in one file."""

    def __init__(
        self, path: Path, parameters: list[nn.Parameter], steps: int, rate: float, decay: float, warm: int = 200
    ) -> None:
        self.path, self.parameters, self.steps, self.rate = path, parameters, steps, rate
        self.decay, self.warm = decay, warm
        self.optimizer = torch.optim.AdamW(parameters, rate, weight_decay=1e-4)
        self.average = [p.detach().clone() for p in parameters]
        self.generator = torch.Generator().manual_seed(1)
        self.step, self.loss, self.saved = 0, math.nan, time.monotonic()
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            with torch.no_grad():
                for p, a, loaded, mean in zip(parameters, self.average, state["values"], state["average"], strict=True):
                    p.copy_(loaded)
                    a.copy_(mean)

    def save(self) -> None:
        state: dict[str, Any] = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "values": [p.detach() for p in self.parameters],
            "average": self.average,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)
        self.saved = time.monotonic()

    def update(self, loss: torch.Tensor) -> None:
        warm = min(1.0, (self.step + 1) / self.warm)
        cosine = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))
        self.optimizer.param_groups[0]["lr"] = self.rate * warm * cosine
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(self.decay, self.step / (self.step + 10))
        with torch.no_grad():
            for average, value in zip(self.average, self.parameters, strict=True):
                average.lerp_(value.detach(), 1 - keep)
        self.loss = loss.item() if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss.item()
        if self.step % 250 == 0:
            print(self.path.stem, self.step, round(self.loss, 4), time.strftime("%H:%M:%S"), flush=True)
        if time.monotonic() - self.saved > SAVE_EVERY or self.step == self.steps:
            self.save()

    def finish(self) -> None:
        """Leave the moving average in the parameters."""
        with torch.no_grad():
            for average, value in zip(self.average, self.parameters, strict=True):
                value.copy_(average)


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to six pixels and mirrored half of the time, so that the VAE learns shapes, not places."""
    padded = F.pad(images, (6, 6, 6, 6), value=1.0)
    out = []
    for image in padded:
        x, y, mirror = torch.randint(0, 13, (3,), generator=generator).tolist()
        cut = image[:, y : y + data.SIZE, x : x + data.SIZE]
        out.append(cut.flip(2) if mirror % 2 else cut)
    return torch.stack(out)


def edges(images: torch.Tensor) -> torch.Tensor:
    """Differences between neighbours, both ways: what makes a picture sharp."""
    across = images[..., 1:] - images[..., :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    return torch.cat([across.flatten(1), down.flatten(1)], 1)


def picture_loss(drawn: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """How far pictures are from those to be drawn: in colours and in edges."""
    return F.l1_loss(drawn, shown) + F.mse_loss(drawn, shown) + F.l1_loss(edges(drawn), edges(shown))


def train_vae(images: torch.Tensor, path: Path, steps: int, batch: int = 16) -> nn.Module:
    torch.manual_seed(0)
    vae: Any = model.vae()
    stage = Stage(path, list(vae.parameters()), steps, rate=1e-3, decay=0.998)
    while stage.step < steps:
        index = torch.randint(0, len(images), (batch,), generator=stage.generator)
        shown = shifted(images[index], stage.generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(shown).latent_dist
            drawn = vae.decode(posterior.sample(stage.generator)).sample
        stage.update(picture_loss(drawn.float(), shown) + 1e-6 * posterior.kl().float().mean())
    stage.finish()
    return vae.eval()


def train_decoder(vae: Any, latents: torch.Tensor, images: torch.Tensor, path: Path, steps: int) -> None:
    """Sharpen the decoder alone, on latents as a UNet gives them: nearly right. The encoder stays as it is."""
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    stage = Stage(path, parameters, steps, rate=8e-4, decay=0.998)
    scale = 1 / model.SCALING_FACTOR
    while stage.step < steps:
        index = torch.randint(0, len(images), (16,), generator=stage.generator)
        clean = latents[index]
        noisy = clean + 0.1 * torch.randn(clean.shape, generator=stage.generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drawn = vae.decode(noisy * scale).sample
        stage.update(picture_loss(drawn.float(), images[index]))
    stage.finish()
    with torch.no_grad():
        parts = zip(latents.split(64), images.split(64), strict=True)
        error = torch.stack([(vae.decode(z * scale).sample - x).pow(2).mean() for z, x in parts]).mean().item()
    print(f"decoder: mean squared error {error:.5f} on the training images", flush=True)


def latents_of(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """(n, 4, 8, 8), of unit spread; the VAE is rescaled so that the base's factor gives just that."""
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
        spread = means.std().item()
        error = torch.cat([vae.decode(part).sample for part in means.split(64)]).sub(images).pow(2).mean().item()
    print(f"vae: mean squared error {error:.5f} on the training images, spread {spread:.3f}", flush=True)
    model.rescale(vae, 1 / (model.SCALING_FACTOR * spread))
    return means / spread


def train_unet(
    stage: Stage, unet: nn.Module, encoder: nn.Module, latents: torch.Tensor, ids: torch.Tensor, batch: int = 32
) -> None:
    """Predict the noise (DDPM, Ho et al. 2020, algorithm 1). ``ids``: (forms, n, 77): a caption's form is drawn."""
    empty = model.token_ids([""])[0]
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    draw = stage.generator
    while stage.step < stage.steps:
        index = torch.randint(0, len(latents), (batch,), generator=draw)
        form = torch.randint(0, len(ids), (batch,), generator=draw)
        captions = ids[form, index].clone()
        captions[torch.rand(batch, generator=draw) < 0.1] = empty
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=draw)
        steps = torch.randint(0, 1000, (batch,), generator=draw)
        context = encoder(captions).last_hidden_state
        noisy = schedule.add_noise(clean, noise, steps)  # pyright: ignore[reportArgumentType]
        predicted = unet(noisy, steps, context).sample
        stage.update(F.mse_loss(predicted, noise))
    stage.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/starter"))
    parser.add_argument("--vae-steps", type=int, default=3200)
    parser.add_argument("--joint-steps", type=int, default=6500)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--tune-steps", type=int, default=800)
    parser.add_argument("--styles", nargs="*", choices=data.STYLES, default=data.STYLES, help="which to tune")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    images = data.load(arguments.packages)
    pixels = data.as_float(images.pixels)
    vae = train_vae(pixels.flatten(0, 1), out / "vae.pt", arguments.vae_steps)
    latents = latents_of(vae, pixels.flatten(0, 1))

    torch.manual_seed(0)
    unet, encoder = model.unet(), model.text_encoder()
    styled = [f"{style} {name}" for style in data.STYLES for name in images.subjects]
    articled = [f"{style} a {name}" for style in data.STYLES for name in images.subjects]
    parameters = [*unet.parameters(), *encoder.parameters()]
    joint = Stage(out / "joint.pt", parameters, arguments.joint_steps, rate=1e-3, decay=0.999)
    train_unet(joint, unet, encoder, latents, torch.stack([model.token_ids(styled), model.token_ids(articled)]))
    start = {name: m.state_dict() for name, m in (("unet", unet), ("text_encoder", encoder))}
    torch.save(start, out / "joint.final.pt")

    train_decoder(vae, latents, pixels.flatten(0, 1), out / "decoder.pt", arguments.decoder_steps)
    torch.save(vae.state_dict(), out / "vae.final.pt")

    per_style = latents.unflatten(0, (len(data.STYLES), -1))
    plain = torch.stack([model.token_ids(images.subjects), model.token_ids([f"a {name}" for name in images.subjects])])
    for style in arguments.styles:
        start = torch.load(out / "joint.final.pt", weights_only=True)
        unet.load_state_dict(start["unet"])
        encoder.load_state_dict(start["text_encoder"])
        stage = Stage(out / f"{style}.pt", parameters, arguments.tune_steps, rate=6e-4, decay=0.998)
        train_unet(stage, unet, encoder, per_style[data.STYLES.index(style)], plain)
        final = {"unet": unet.state_dict(), "text_encoder": encoder.state_dict()}
        torch.save(final, out / f"{style}.final.pt")


if __name__ == "__main__":
    main()
