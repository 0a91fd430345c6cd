"""The judge: a small classifier that has seen the real images only, and names subject and style of a picture.

It is trained and committed before the generator's training starts, so that it cannot lean towards it.
``python -m recipe.judge --packages DIR`` writes ``judge.safetensors`` (fp16) beside this file.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from recipe import data

WEIGHTS = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """(n, 3, 64, 64) in -1…1 to logits (n, subjects) and (n, styles)."""

    def __init__(self, subjects: int, styles: int) -> None:
        super().__init__()
        widths = (24, 48, 96, 128)
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, stride=2), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.subject = nn.Linear(before * 4, subjects)
        self.style = nn.Linear(before * 4, styles)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.adaptive_avg_pool2d(self.body(images), 2).flatten(1)
        return self.subject(features), self.style(features)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, scale, turn, tint, blur and noise, so that softness or a shade does not decide. Shape kept."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape or (n,), generator=generator) * (high - low) + low

    angle, scale = uniform(-0.2, 0.2), uniform(0.85, 1.15)
    turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], 1).view(n, 2, 2)
    theta = torch.cat([turn * scale.view(n, 1, 1), uniform(-0.12, 0.12, n, 2, 1)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1
    tinted = (moved - 1) * uniform(0.8, 1.2, n, 3, 1, 1) + 1 + uniform(-0.08, 0.08, n, 1, 1, 1)
    soft = F.interpolate(F.avg_pool2d(tinted, 2), scale_factor=2, mode="bilinear")
    share = uniform(0.0, 1.0, n, 1, 1, 1)
    noise = torch.randn(tinted.shape, generator=generator) * uniform(0.0, 0.12, n, 1, 1, 1)
    return (tinted * share + soft * (1 - share) + noise).clamp(-1, 1)


def train(packages: Path, steps: int, batch: int = 64) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = data.load(packages)
    styles, subjects = images.pixels.shape[:2]
    flat = data.as_float(images.pixels).flatten(0, 1)
    judge = Judge(subjects, styles)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        index = torch.randint(0, len(flat), (batch,), generator=generator)
        subject, style = judge(augment(flat[index], generator))
        loss = F.cross_entropy(subject, index % subjects, label_smoothing=0.05) + F.cross_entropy(
            style, index // subjects, label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 0:
            print("judge", step, round(loss.item(), 3), flush=True)
    judge.eval()
    save_file({name: tensor.half() for name, tensor in judge.state_dict().items()}, WEIGHTS)
    with torch.no_grad():
        for name, shown in (("as they are", flat), ("augmented", augment(flat, generator))):
            subject, style = judge(shown)
            label = torch.arange(len(flat))
            right = (subject.argmax(1) == label % subjects) & (style.argmax(1) == label // subjects)
            print(f"real images, {name}: {right.float().mean().item():.3f} named rightly (subject and style)")


def load() -> Judge:
    """The committed judge, in fp32 and eval mode."""
    judge = Judge(len(data.subjects()), len(data.STYLES))
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return judge.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    train(arguments.packages, arguments.steps)


if __name__ == "__main__":
    main()
