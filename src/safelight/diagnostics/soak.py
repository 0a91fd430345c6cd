"""A soak switches at random between the library's models and adapters, for a number of images or a time.

Every image must equal the first of its kind, memory must not grow, and a switch must not become slower.

A soak measures unaccounted memory: the memory of this process minus the bytes in the ledger and the cached prompts. It
measures after a garbage collection, and after the allocator returned its free memory. Every kind of image is made twice
first, because each kind loads code, tables and threads' stacks that stay. After that, unaccounted memory is constant
within a fraction of a megabyte. A leak is a slope that continues to the end.
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

from safelight.catalog.model import Model
from safelight.devices import machine
from safelight.diagnostics import combinations
from safelight.diagnostics.canary import PROMPT, SEED, STEPS, has_canary
from safelight.diagnostics.finding import Finding
from safelight.errors import InputError
from safelight.memory.budget import HOST
from safelight.request.adapters import Lora
from safelight.request.prompts.loras import lora_to_tag
from safelight.request.schema import Request
from safelight.workers.local_engine import LocalEngine

MAX_SIDE = 128
"""Limit of pixels per side. A soak tests switching, not size."""

LEAK = 0.1
"""Megabytes per image. A soak must find a leak of a megabyte in ten images."""

MIN_LEAK = LEAK / 3
"""Megabytes per image. Slower growth cannot be distinguished from tables that fill up."""

WARM_UP_ROUNDS = 2
"""How often every kind of image is made before memory is measured."""

MIN_IMAGES = 36
"""Images that are needed after that for a result."""

PARTS = 3
"""Number of parts of a soak. A leak grows in every part. A cache that fills up stops growing. A single jump appears in
one part."""

MAX_RATE_RATIO = 3.0
"""Factor. Memory that grows this much slower in one part than in another is a table that fills up."""

CONFIDENCE = 2.33
"""Standard deviations. The probability of growth by chance in a single part is 1 %."""

MAX_VALUES = 400
"""Limit of values in a part that are compared with each other. Of a longer part, every n-th value is used."""

MAX_SLOWDOWN = 2.0
"""Limit of the median switch time of the last tenth, as a factor of that of the first."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Growth of memory.

    ``rate``: the slope in megabytes per image.
    ``low``, ``high``: confidence bounds of the slope.
    ``goes_on``: memory grows in each part, and in no part much slower than in another.
    """

    rate: float
    low: float
    high: float
    goes_on: bool

    @property
    def leaks(self) -> bool:
        return self.goes_on and self.low > MIN_LEAK


@dataclass
class SoakResult:
    """The measurements of a soak. The first three lists have one entry per image.

    ``models``: name of the model and its adapters.
    ``switch``: seconds of the switch.
    ``megabytes``: unaccounted memory after the image.
    ``drifted``: numbers of the images that differ from the first of their kind.
    ``settled``: number of images until every kind had been made twice.
    ``left_out``: models that were not used, because they need an image.
    """

    models: list[str] = field(default_factory=list[str])
    switch: list[float] = field(default_factory=list[float])
    megabytes: list[float] = field(default_factory=list[float])
    drifted: list[int] = field(default_factory=list[int])
    settled: int = 0
    left_out: list[str] = field(default_factory=list[str])

    def findings(self) -> list[Finding]:
        """Return the results as the doctor's findings."""
        count = len(self.models)
        tenth = max(1, count // 10)
        without = f" (without {', '.join(self.left_out)}, which need an image)" if self.left_out else ""
        said = f"{count} images over {len(set(self.models))} models and combinations{without}"
        drift = Finding(
            "state",
            "images of a soak",
            not self.drifted,
            f"{said}: "
            + (
                f"{len(self.drifted)} differ, the first is number {self.drifted[0]}" if self.drifted else "none differs"
            ),
            "Restart Safelight, and report it with `--save FILE`." if self.drifted else "",
        )
        leak = self._leak(said)
        first, last = _median(self.switch[tenth : 2 * tenth] or self.switch), _median(self.switch[-tenth:])
        slow = last > MAX_SLOWDOWN * first and last > 0.05
        times = Finding(
            "memory",
            "switches over a soak",
            not slow,
            f"median switch {first * 1e3:.1f} ms, then {last * 1e3:.1f} ms",
            "Report it with `--save FILE`." if slow else "",
        )
        return [drift, leak, times]

    def growth(self) -> Growth | None:
        """Return the growth of memory after every kind had been made twice; None for too few images."""
        if len(self.megabytes) - self.settled < MIN_IMAGES:
            return None
        values = _subtract_levels(self.models[self.settled :], np.array(self.megabytes[self.settled :]))
        rate, low, high = _slope(np.arange(len(values)), values)
        parts = [_slope(part, values[part]) for part in np.array_split(np.arange(len(values)), PARTS)]
        fastest = max(slope for slope, _, _ in parts)
        goes_on = all(least > MIN_LEAK and slope > fastest / MAX_RATE_RATIO for slope, least, _ in parts)
        return Growth(rate, low, high, goes_on)

    def _leak(self, said: str) -> Finding:
        what, growth = "memory over a soak", self.growth()
        if growth is None:
            need = self.settled + MIN_IMAGES if self.settled else "more"
            return Finding("memory", what, True, f"{said}: too short to tell; it needs {need} images")
        shown = f"{said}: {growth.rate * 1e3:+.0f} kB per image, from number {self.settled + 1} on"
        if growth.leaks:
            return Finding("memory", what, False, f"{shown}, to the end", "Report it with `--save FILE`.")
        if growth.high > MIN_LEAK:
            return Finding("memory", what, True, f"{shown}: too short to tell whether that continues")
        return Finding("memory", what, True, shown)


def soak(
    engine: LocalEngine,
    models: Sequence[Model],
    enough: Callable[[int, float], bool],
    on_image: Callable[[int], None] = lambda _: None,
) -> SoakResult:
    """Make images until ``enough`` returns True. It is called with the number of images and the seconds so far.

    Models that need an image are left out. Raises InputError if no other model is there.
    """
    needy = [model.name for model in models if not has_canary(model)]
    models = [model for model in models if model.name not in needy]
    if not models:
        raise InputError(f"no model draws from text alone: {', '.join(needy) or 'there is none'}")
    result, right, rng, start = SoakResult(left_out=needy), dict[str, str](), random.Random(0), time.perf_counter()
    loras_by_model = {model.name: combinations.list_combinations(engine, model, PROMPT) for model in models}
    first = [(model, loras) for model in models for loras in loras_by_model[model.name]] * WARM_UP_ROUNDS
    rng.shuffle(first)
    last = ""
    while not enough(len(result.models), time.perf_counter() - start):
        warming = bool(first)
        model, loras = _next(first, models, loras_by_model, last, rng)
        side = min(MAX_SIDE, model.resolution)
        request = Request(PROMPT, model.name, seed=SEED, steps=STEPS, width=side, height=side, loras=loras)
        image = next(engine.generate(request))
        name = " ".join([model.name, *(lora_to_tag(lora) for lora in loras)])
        if right.setdefault(name, image.pixels_sha256) != image.pixels_sha256:
            result.drifted.append(len(result.models))
        result.models.append(name)
        result.switch.append(image.seconds.switch)
        result.megabytes.append(_unaccounted(engine) / 1e6)
        if warming:
            result.settled = len(result.models) + len(first)
        last = model.name
        on_image(len(result.models))
    return result


Kind = tuple[Model, tuple[Lora, ...]]


def _next(
    first: list[Kind],
    models: Sequence[Model],
    loras_by_model: Mapping[str, Sequence[tuple[Lora, ...]]],
    last: str,
    rng: random.Random,
) -> Kind:
    """Choose the next image: what is left of ``first``, then anything.

    The model differs from the last one if possible, because a soak tests switches.
    """
    left = Counter(model.name for model, _ in first if model.name != last)
    if left:
        [(name, _)] = left.most_common(1)
        return first.pop(next(place for place, (model, _) in enumerate(first) if model.name == name))
    if first and len(models) == 1:
        return first.pop()
    model = rng.choice([m for m in models if m.name != last] or list(models))
    return model, rng.choice(loras_by_model[model.name])


def _unaccounted(engine: LocalEngine) -> int:
    """Return the bytes of this process's memory that are in no account."""
    gc.collect()
    machine.trim_allocator()
    ledger = engine.resources.residency.ledger
    return machine.anonymous_bytes() + _swapped() - ledger.stored(HOST) - engine.resources.embedding_cache.nbytes


def _swapped() -> int:
    """Return the bytes of this process that the system swapped to disk; 0 if the system does not report them."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmSwap:")), 0)


Numbers = np.ndarray[tuple[int], np.dtype[Any]]


def _subtract_levels(kinds: Sequence[str], values: Numbers) -> Numbers:
    """Subtract from each value the constant level of its kind.

    Differences between kinds look like growth. Therefore the trend is estimated from pairs of the same kind only,
    before the levels are computed.
    """
    at, names = np.arange(len(values)), np.array(kinds)
    slopes = [_slopes(at[names == name], values[names == name]) for name in dict.fromkeys(kinds)]
    flat = values - at * float(np.median(np.concatenate(slopes))) if any(map(len, slopes)) else values
    level = {name: float(np.median(flat[names == name])) for name in dict.fromkeys(kinds)}
    return values - np.array([level[name] for name in kinds])


def _slopes(at: Numbers, values: Numbers) -> Numbers:
    """Return the slopes between any two of the values, sorted."""
    one, other = np.triu_indices(len(at), 1)
    return np.sort((values[other] - values[one]) / (at[other] - at[one]))


def _slope(at: Numbers, values: Numbers) -> tuple[float, float, float]:
    """Return (slope, lower bound, upper bound).

    The slope is the median of the slopes between any two values (Theil 1950, Sen 1968). Outliers and steps hardly
    change it. The bounds follow from the variance of Kendall's S.
    """
    every = -(-len(at) // MAX_VALUES)
    slopes, count = _slopes(at[::every], values[::every]), len(at[::every])
    away = CONFIDENCE * (count * (count - 1) * (2 * count + 5) / 18) ** 0.5 / 2
    middle = (len(slopes) - 1) / 2
    low, high = (int(min(max(place, 0), len(slopes) - 1)) for place in (middle - away, middle + away))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def plot(result: SoakResult, path: Path) -> None:
    """Plot memory and switch time by image into a PNG."""
    panels = (
        ("unaccounted memory, MB", result.megabytes),
        ("switch, ms", [seconds * 1e3 for seconds in result.switch]),
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
        draw.text(
            (margin, top - 16),
            f"{label}: {least:.1f} to {most:.1f}, over {len(values)} images",
            fill="#333333",
        )
        if len(points) > 1:
            draw.line(points, fill="#b5371f", width=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
