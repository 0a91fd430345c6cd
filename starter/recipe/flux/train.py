"""Train the FLUX.1 starter: its VAE; transformer and text encoders; the decoder alone; distilled guidance.

``python -m recipe.flux.train --packages DIR --out DIR`` runs all stages, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from recipe import data
from recipe.flux import model, pictures
from recipe.train import Stage, picture_loss
from safelight.families.parts.flux_blocks import mu

LENGTHS = 20, 20, 24, 48
"""T5's tokens in the joint stage: the padding may not matter, and few tokens are quick."""

FULL_LENGTH = 512
"""T5's tokens of every prompt in Safelight."""

MU = mu((pictures.SIZE // 16) ** 2, 28)
"""The shift of the noise levels with which pictures of this size are drawn."""

FORMS = {"{name}, {style} style": 0.45, "a {name}, {style} style": 0.45, "{name}": 0.1}
"""What captions look like, and the share of each. Without its style, a subject may be drawn in any."""

CROP = 64
"""Sides of the parts of pictures that the VAE learns from, in pixels."""

EMPTY = 0.1
"""The share of the captions that are left out."""


def crops(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return sixteen quarters of pictures, or a quarter of the time four whole ones: moved, half of them mirrored."""
    whole = bool(torch.rand((), generator=generator) < 0.25)
    count, size = (4, pictures.SIZE) if whole else (16, CROP)
    index = torch.randint(0, len(images), (count,), generator=generator)
    padded = F.pad(images[index], (8, 8, 8, 8), value=1.0)
    out = []
    for image in padded:
        x, y = torch.randint(0, padded.shape[-1] - size + 1, (2,), generator=generator).tolist()
        cut = image[:, y : y + size, x : x + size]
        out.append(cut.flip(2) if torch.rand((), generator=generator) < 0.5 else cut)
    return torch.stack(out)


def train_vae(vae: Any, images: torch.Tensor, path: Path, steps: int) -> None:
    stage = Stage(path, list(vae.parameters()), steps, rate=6e-4, decay=0.99, warm=30)
    while stage.step < steps:
        shown = crops(images, stage.generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(shown).latent_dist
            drawn = vae.decode(posterior.sample(stage.generator)).sample
        # The same pressure on each latent, whatever the size.
        pressure = 3e-3 * posterior.kl().float().mean() / posterior.mean[0].numel()
        stage.update(picture_loss(drawn.float(), shown) + pressure)
    stage.finish()


def latents_of(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the pictures' latents (n, 16, 16, 16), of zero mean and unit spread, and rescale the VAE to match."""
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(32)])
    mean, spread = means.mean((0, 2, 3)), means.std()
    print(f"vae: mean squared error {_error(vae, means, images):.5f}, spread {spread.item():.3f}", flush=True)
    model.rescale(vae, mean, spread)
    return (means - mean.view(-1, 1, 1)) / spread


def _error(vae: Any, decoder_inputs: torch.Tensor, images: torch.Tensor) -> float:
    with torch.no_grad():
        parts = zip(decoder_inputs.split(32), images.split(32), strict=True)
        return torch.cat([(vae.decode(z).sample - x).pow(2).mean((1, 2, 3)) for z, x in parts]).mean().item()


def train_decoder(vae: Any, latents: torch.Tensor, images: torch.Tensor, path: Path, steps: int) -> None:
    """Sharpen the decoder alone, on latents as the transformer gives them: nearly right. The encoder stays as it is."""
    stage = Stage(path, list(vae.decoder.parameters()), steps, rate=5e-4, decay=0.99, warm=30)
    while stage.step < steps:
        index = torch.randint(0, len(images), (6,), generator=stage.generator)
        clean = latents[index]
        noisy = clean + 0.1 * torch.randn(clean.shape, generator=stage.generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drawn = vae.decode(model.vae_input(noisy)).sample
        stage.update(picture_loss(drawn.float(), images[index]))
    stage.finish()
    print(f"decoder: mean squared error {_error(vae, model.vae_input(latents), images):.5f}", flush=True)


def texts(subjects: list[str]) -> list[str]:
    """Return every caption: form by form, style by style; and the empty one."""
    return [*(form.format(name=name, style=style) for form in FORMS for style in data.STYLES for name in subjects), ""]


class Batches:
    """Draws pictures, captions, noise and noise levels of a stage."""

    def __init__(self, latents: torch.Tensor, subjects: list[str], generator: torch.Generator) -> None:
        """``latents``: (styles * subjects, channels, height, width)."""
        self.latents, self.generator = latents, generator
        self.texts = texts(subjects)
        self.token_ids = {length: model.token_ids(self.texts, length) for length in {*LENGTHS, FULL_LENGTH}}

    def one_of(self, values: tuple[int, ...]) -> int:
        return values[int(torch.randint(0, len(values), (), generator=self.generator))]

    def uniform(self, low: float, high: float, count: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def captions(self, chosen: torch.Tensor, length: int) -> model.Captions:
        """``chosen``: numbers of texts."""
        ids = self.token_ids[length]
        return model.Captions(ids.clip[chosen], ids.t5[chosen])

    def draw(self, count: int, empty: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return clean latents, the numbers of their captions, noise, and noise levels (count,).

        The levels lie as a rectified flow's (Esser et al. 2024, arXiv 2403.03206), moved as the sampler moves them; a
        fifth is uniform.
        """
        draw = self.generator
        index = torch.randint(0, len(self.latents), (count,), generator=draw)
        form = torch.multinomial(torch.tensor(list(FORMS.values())), count, replacement=True, generator=draw)
        chosen = index + len(self.latents) * form
        chosen[torch.rand(count, generator=draw) < empty] = len(self.texts) - 1
        noise = torch.randn(self.latents[index].shape, generator=draw)
        levels = torch.sigmoid(torch.randn(count, generator=draw) + MU)
        levels = torch.where(torch.rand(count, generator=draw) < 0.2, torch.rand(count, generator=draw), levels)
        return self.latents[index], chosen, noise, levels


def mix(clean: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return torch.lerp(clean, noise, levels.view(-1, 1, 1, 1))


def train_flow(stage: Stage, parts: dict[str, Any], batches: Batches, count: int = 16) -> None:
    """Predict the velocity from picture to noise. The guidance scale is 1, which means none."""
    while stage.step < stage.steps:
        clean, chosen, noise, levels = batches.draw(count, EMPTY)
        captions = batches.captions(chosen, batches.one_of(LENGTHS))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.predict(parts, mix(clean, noise, levels), levels, captions, torch.ones(count))
        stage.update(F.mse_loss(found, noise - clean))
    stage.finish()


def distil_guidance(stage: Stage, parts: dict[str, Any], teacher: dict[str, Any], batches: Batches) -> None:
    """Teach one call what the teacher computes in two: classifier-free guidance of any scale from 1 to 5.

    Meng et al. 2023 (arXiv 2210.03142). Half of the time, the student reads as many tokens as Safelight gives.
    """
    while stage.step < stage.steps:
        length, count = (FULL_LENGTH, 4) if stage.step % 2 else (batches.one_of(LENGTHS), 16)
        clean, chosen, noise, levels = batches.draw(count, EMPTY / 2)
        noisy, scale = mix(clean, noise, levels), batches.uniform(1, 5, count)
        empty = torch.full_like(chosen, len(batches.texts) - 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                both = batches.captions(torch.cat([chosen, empty]), LENGTHS[0])
                one = torch.ones(2 * count)
                found = model.predict(teacher, noisy.repeat(2, 1, 1, 1), levels.repeat(2), both, one)
                with_text, without = found.chunk(2)
            guided = model.predict(parts, noisy, levels, batches.captions(chosen, length), scale)
        stage.update(F.mse_loss(guided, without + scale.view(-1, 1, 1, 1) * (with_text - without)))
    stage.finish()


def trained(parts: dict[str, Any]) -> dict[str, Any]:
    """Return what draws: all but the VAE."""
    return {role: module for role, module in parts.items() if role != "vae"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/starter/flux"))
    parser.add_argument("--vae-steps", type=int, default=350)
    parser.add_argument("--joint-steps", type=int, default=14000)
    parser.add_argument("--decoder-steps", type=int, default=1000)
    parser.add_argument("--guidance-steps", type=int, default=1200)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    images = pictures.load(arguments.packages)
    pixels = data.as_float(images.pixels).flatten(0, 1)
    parts = model.build()
    train_vae(parts["vae"], pixels, out / "vae.pt", arguments.vae_steps)
    latents = latents_of(parts["vae"], pixels)

    drawing = trained(parts)
    parameters = [parameter for module in drawing.values() for parameter in module.parameters()]
    joint = Stage(out / "joint.pt", parameters, arguments.joint_steps, rate=1.5e-3, decay=0.998)
    train_flow(joint, drawing, Batches(latents, images.subjects, joint.generator))

    train_decoder(parts["vae"], latents, pixels, out / "decoder.pt", arguments.decoder_steps)

    teacher = copy.deepcopy(drawing)
    guidance = Stage(out / "guidance.pt", parameters, arguments.guidance_steps, rate=3e-4, decay=0.99, warm=30)
    distil_guidance(guidance, drawing, teacher, Batches(latents, images.subjects, guidance.generator))
    torch.save({role: module.state_dict() for role, module in parts.items()}, out / "final.pt")


if __name__ == "__main__":
    main()
