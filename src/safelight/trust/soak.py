"""A soak: switches at random over the library, for so many images or so long, and what became of them.

Every image must be that of its model's first; memory must not grow; a switch must not become slower.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw

from safelight.devices import machine
from safelight.engine.local import LocalEngine
from safelight.library.model import Model
from safelight.prompts.loras import written
from safelight.trust import combinations
from safelight.trust.canary import PROMPT, SEED, STEPS
from safelight.trust.finding import Finding
from safelight.types.request import Request

SIDE = 128
"""Most pixels a side: what is tried is switching, not size."""

GROWTH_MB = 32.0
"""Between the first tenth and the last."""

SLOWER = 2.0
"""Times: the median switch of the last tenth against that of the first."""


@dataclass
class Soaked:
    """One entry for each image: its model and what was over it, seconds of its switch, megabytes of anonymous memory
    after it. ``drifted``: numbers of images that were not the first of their kind."""

    models: list[str] = field(default_factory=list[str])
    switch: list[float] = field(default_factory=list[float])
    megabytes: list[float] = field(default_factory=list[float])
    drifted: list[int] = field(default_factory=list[int])

    def findings(self) -> list[Finding]:
        """What it shows, as the doctor says it."""
        count = len(self.models)
        tenth = max(1, count // 10)
        said = f"{count} images over {len(set(self.models))} models and combinations"
        drift = Finding(
            "state",
            "images of a soak",
            not self.drifted,
            f"{said}: "
            + (
                f"{len(self.drifted)} differ, the first is number {self.drifted[0]}" if self.drifted else "none differs"
            ),
            "Start again, and report it with `--save FILE`." if self.drifted else "",
        )
        # The first tenth meets every model for the first time.
        settled = self.megabytes[tenth : 2 * tenth] or self.megabytes
        grown = _median(self.megabytes[-tenth:]) - _median(settled)
        leak = Finding(
            "memory",
            "memory over a soak",
            grown < GROWTH_MB,
            f"{said}: {grown:+.1f} MB",
            "" if grown < GROWTH_MB else "Report it with `--save FILE`.",
        )
        first, last = _median(self.switch[tenth : 2 * tenth] or self.switch), _median(self.switch[-tenth:])
        slow = last > SLOWER * first and last > 0.05
        times = Finding(
            "memory",
            "switches over a soak",
            not slow,
            f"median switch {first * 1e3:.1f} ms, then {last * 1e3:.1f} ms",
            "Report it with `--save FILE`." if slow else "",
        )
        return [drift, leak, times]


def soak(
    engine: LocalEngine,
    models: Sequence[Model],
    enough: Callable[[int, float], bool],
    on_image: Callable[[int], None] = lambda _: None,
) -> Soaked:
    """Make images until ``enough`` (given how many there are, and seconds) says so."""
    soaked, right, chance, start = Soaked(), dict[str, str](), random.Random(0), time.perf_counter()
    over = {model.name: combinations.over(engine, model, PROMPT) for model in models}
    last = ""
    while not enough(len(soaked.models), time.perf_counter() - start):
        # Another than the last, if there is another: a soak is of switches.
        model = chance.choice([m for m in models if m.name != last] or list(models))
        side = min(SIDE, model.resolution)
        loras = chance.choice(over[model.name])
        request = Request(PROMPT, model.name, seed=SEED, steps=STEPS, width=side, height=side, loras=loras)
        image = next(engine.generate(request))
        name = " ".join([model.name, *(written(lora) for lora in loras)])
        if right.setdefault(name, image.pixels_sha256) != image.pixels_sha256:
            soaked.drifted.append(len(soaked.models))
        soaked.models.append(name)
        soaked.switch.append(image.seconds.switch)
        soaked.megabytes.append(machine.anonymous_bytes() / 1e6)
        last = model.name
        on_image(len(soaked.models))
    return soaked


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def plot(soaked: Soaked, path: Path) -> None:
    """Memory and switch time by image, as a PNG."""
    panels = (("memory, MB", soaked.megabytes), ("switch, ms", [seconds * 1e3 for seconds in soaked.switch]))
    width, height, margin = 1000, 260, 50
    image = PILImage.new("RGB", (width, height * len(panels)), "white")
    draw = ImageDraw.Draw(image)
    for number, (label, values) in enumerate(panels):
        top, most, least = number * height + 30, max(values, default=1.0), min(values, default=0.0)
        span = max(most - least, 1e-9)
        inner_w, inner_h = width - 2 * margin, height - 60
        points = [
            (margin + inner_w * n / max(1, len(values) - 1), top + inner_h * (1 - (value - least) / span))
            for n, value in enumerate(values)
        ]
        draw.rectangle((margin, top, width - margin, top + inner_h), outline="#bbbbbb")
        draw.text((margin, top - 16), f"{label}: {least:.1f} to {most:.1f}, over {len(values)} images", fill="#333333")
        if len(points) > 1:
            draw.line(points, fill="#b5371f", width=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
