"""A soak: switches at random over the library, for so many images or so long, and what became of them.

Every image must be that of its model's first; memory must not grow; a switch must not become slower.

What is looked at is memory that nobody accounts for: what this process has, less what the ledger has stored and what is
kept of prompts, after garbage was collected and the allocator gave back what it kept. Everything is made twice first:
each kind brings code, tables and threads' stacks with it that stay. From then on this memory is flat within a fraction
of a megabyte; a leak is a slope that goes on to the end.
"""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from safelight.devices import machine
from safelight.engine.local import LocalEngine
from safelight.library.model import Model
from safelight.memory.budget import HOST
from safelight.prompts.loras import written
from safelight.request.parts import Lora
from safelight.request.schema import Request
from safelight.trust import combinations
from safelight.trust.canary import PROMPT, SEED, STEPS
from safelight.trust.finding import Finding

SIDE = 128
"""Most pixels a side: what is tried is switching, not size."""

LEAK = 0.1
"""Megabytes an image: a leak of a megabyte in ten images has to be found. …"""

HARMLESS = LEAK / 3
"""… Slower growth is not told from tables that fill."""

TWICE = 2
"""So often everything is made before memory is looked at."""

LEAST = 36
"""Images after that without which nothing can be said."""

PARTS = 3
"""Memory has to grow in each of so many parts of the soak: what only fills up stops, and a step is in one of them."""

CALMER = 3.0
"""Times: what grows that much slower in one part than in another fills up."""

SURE = 2.33
"""Standard deviations: in one part alone, growth by chance is one in a hundred."""

MOST = 400
"""Values of a part that are compared with each other; of a long soak some are left out, evenly."""

SLOWER = 2.0
"""Times: the median switch of the last tenth against that of the first."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Megabytes an image: the slope, and the bounds between which it surely is. ``goes_on``: whether it is there in
    each part, in none much less than in another."""

    rate: float
    low: float
    high: float
    goes_on: bool

    @property
    def leaks(self) -> bool:
        return self.goes_on and self.low > HARMLESS


@dataclass
class Soaked:
    """One entry for each image: its model and what was over it, seconds of its switch, megabytes of memory after it
    that nobody accounts for. ``drifted``: numbers of images that were not the first of their kind. ``settled``: images
    that were made before everything had been made twice."""

    models: list[str] = field(default_factory=list[str])
    switch: list[float] = field(default_factory=list[float])
    megabytes: list[float] = field(default_factory=list[float])
    drifted: list[int] = field(default_factory=list[int])
    settled: int = 0

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
        leak = self._leak(said)
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

    def growth(self) -> Growth | None:
        """Of memory from when everything had been made twice; None for too few images."""
        if len(self.megabytes) - self.settled < LEAST:
            return None
        values = _levelled(self.models[self.settled :], np.array(self.megabytes[self.settled :]))
        rate, low, high = _slope(np.arange(len(values)), values)
        parts = [_slope(part, values[part]) for part in np.array_split(np.arange(len(values)), PARTS)]
        fastest = max(slope for slope, _, _ in parts)
        goes_on = all(least > HARMLESS and slope > fastest / CALMER for slope, least, _ in parts)
        return Growth(rate, low, high, goes_on)

    def _leak(self, said: str) -> Finding:
        what, growth = "memory over a soak", self.growth()
        if growth is None:
            need = self.settled + LEAST if self.settled else "more"
            return Finding("memory", what, True, f"{said}: too short to tell; it needs {need} images")
        shown = f"{said}: {growth.rate * 1e3:+.0f} kB an image, from number {self.settled + 1} on"
        if growth.leaks:
            return Finding("memory", what, False, f"{shown}, to the end", "Report it with `--save FILE`.")
        if growth.high > HARMLESS:
            return Finding("memory", what, True, f"{shown}: too short to tell whether that goes on")
        return Finding("memory", what, True, shown)


def soak(
    engine: LocalEngine,
    models: Sequence[Model],
    enough: Callable[[int, float], bool],
    on_image: Callable[[int], None] = lambda _: None,
) -> Soaked:
    """Make images until ``enough`` (given how many there are, and seconds) says so."""
    soaked, right, chance, start = Soaked(), dict[str, str](), random.Random(0), time.perf_counter()
    over = {model.name: combinations.over(engine, model, PROMPT) for model in models}
    first = [(model, loras) for model in models for loras in over[model.name]] * TWICE
    chance.shuffle(first)
    last = ""
    while not enough(len(soaked.models), time.perf_counter() - start):
        warming = bool(first)
        model, loras = _next(first, models, over, last, chance)
        side = min(SIDE, model.resolution)
        request = Request(PROMPT, model.name, seed=SEED, steps=STEPS, width=side, height=side, loras=loras)
        image = next(engine.generate(request))
        name = " ".join([model.name, *(written(lora) for lora in loras)])
        if right.setdefault(name, image.pixels_sha256) != image.pixels_sha256:
            soaked.drifted.append(len(soaked.models))
        soaked.models.append(name)
        soaked.switch.append(image.seconds.switch)
        soaked.megabytes.append(_unaccounted(engine) / 1e6)
        if warming:
            soaked.settled = len(soaked.models) + len(first)
        last = model.name
        on_image(len(soaked.models))
    return soaked


Kind = tuple[Model, tuple[Lora, ...]]


def _next(
    first: list[Kind],
    models: Sequence[Model],
    over: Mapping[str, Sequence[tuple[Lora, ...]]],
    last: str,
    chance: random.Random,
) -> Kind:
    """What to make: what of ``first`` is left, then anything; of another model than the last, if there is another: a
    soak is of switches."""
    left = Counter(model.name for model, _ in first if model.name != last)
    if left:
        [(name, _)] = left.most_common(1)
        return first.pop(next(place for place, (model, _) in enumerate(first) if model.name == name))
    if first and len(models) == 1:
        return first.pop()
    model = chance.choice([m for m in models if m.name != last] or list(models))
    return model, chance.choice(over[model.name])


def _unaccounted(engine: LocalEngine) -> int:
    """Bytes that this process has in memory and nobody accounts for."""
    gc.collect()
    machine.give_back()
    ledger = engine.bench.residency.ledger
    return machine.anonymous_bytes() + _swapped() - ledger.stored(HOST) - engine.bench.conditionings.nbytes


def _swapped() -> int:
    """Bytes of this process that the system put on disk meanwhile; none where it does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmSwap:")), 0)


Numbers = np.ndarray[tuple[int], np.dtype[Any]]


def _levelled(kinds: Sequence[str], values: Numbers) -> Numbers:
    """The values less what kinds have more or less than others all the time. That is not told from growth by comparing
    different kinds, so the growth by which the levels are found is that of images of the same kind."""
    at, names = np.arange(len(values)), np.array(kinds)
    slopes = [_slopes(at[names == name], values[names == name]) for name in dict.fromkeys(kinds)]
    flat = values - at * float(np.median(np.concatenate(slopes))) if any(map(len, slopes)) else values
    level = {name: float(np.median(flat[names == name])) for name in dict.fromkeys(kinds)}
    return values - np.array([level[name] for name in kinds])


def _slopes(at: Numbers, values: Numbers) -> Numbers:
    """Between any two of the values, sorted."""
    one, other = np.triu_indices(len(at), 1)
    return np.sort((values[other] - values[one]) / (at[other] - at[one]))


def _slope(at: Numbers, values: Numbers) -> tuple[float, float, float]:
    """The median of the slopes between any two values (Theil 1950, Sen 1968), which no outliers and no steps move
    much, and the bounds between which it surely is, by the variance of Kendall's S."""
    every = -(-len(at) // MOST)
    slopes, count = _slopes(at[::every], values[::every]), len(at[::every])
    away = SURE * (count * (count - 1) * (2 * count + 5) / 18) ** 0.5 / 2
    middle = (len(slopes) - 1) / 2
    low, high = (int(min(max(place, 0), len(slopes) - 1)) for place in (middle - away, middle + away))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def plot(soaked: Soaked, path: Path) -> None:
    """Memory and switch time by image, as a PNG."""
    panels = (
        ("memory that nobody accounts for, MB", soaked.megabytes),
        ("switch, ms", [seconds * 1e3 for seconds in soaked.switch]),
    )
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
