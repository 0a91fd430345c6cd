"""An audit: the proof of the doctor, for any image server that somebody runs.

A then A; A, B, A, C, A and so on; and against an earlier report, once the server was started again. Nothing of the
server is known but what its API gives: the images. No torch.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from safelight.errors import SafelightError
from safelight.trust.asked import Asked, Server
from safelight.trust.difference import difference
from safelight.trust.finding import Finding

ROUNDS = 3
"""Times that every model is visited again."""


@dataclass
class Picture:
    """An image that a server gave: its pixels' SHA-256, and the PNG."""

    sha256: str
    png: bytes

    @classmethod
    def of(cls, data: bytes) -> Picture:
        """Raises SafelightError when it is no image."""
        try:
            with PILImage.open(io.BytesIO(data)) as image:
                return cls(hashlib.sha256(image.convert("RGB").tobytes()).hexdigest(), data)
        except (OSError, SyntaxError, ValueError) as error:
            raise SafelightError(f"the server answered with what is no image ({error})") from error

    def apart(self, other: Picture) -> str:
        """How far another is from it, for people."""
        import numpy as np

        def pixels(png: bytes) -> Any:
            with PILImage.open(io.BytesIO(png)) as image:
                return np.asarray(image.convert("RGB"))

        one, two = pixels(self.png), pixels(other.png)
        if one.shape != two.shape:
            return f"{two.shape[1]}x{two.shape[0]} pixels where there were {one.shape[1]}x{one.shape[0]}"
        return str(difference(one, two))


@dataclass
class Audited:
    """What was found, and the images: of each thing that was asked for the first, and those that differed from it."""

    findings: list[Finding] = field(default_factory=list[Finding])
    first: dict[str, Picture] = field(default_factory=dict[str, Picture])
    differing: dict[str, Picture] = field(default_factory=dict[str, Picture])
    asked: int = 0

    def save(self, folder: Path) -> None:
        """The first images and those that differ, as files."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind, pictures in (("first", self.first), ("differs", self.differing)):
            for name, picture in pictures.items():
                safe = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
                (folder / f"{kind}-{safe}.png").write_bytes(picture.png)

    def digests(self) -> dict[str, str]:
        """For a later audit to compare with."""
        return {name: picture.sha256 for name, picture in self.first.items()}


def audit(
    server: Server,
    models: Sequence[str],
    asked: Asked,
    rounds: int = ROUNDS,
    before: Mapping[str, str] | None = None,
    on_image: Callable[[int], None] = lambda _: None,
) -> Audited:
    """Ask a server for the same images in many orders. ``before``: the digests of an audit before its restart."""
    audited = Audited()
    repeats = True

    def made(model: str, lora: str = "") -> Picture | None:
        audited.asked += 1
        on_image(audited.asked)
        try:
            return Picture.of(server.make(asked.by(model, lora)))
        except SafelightError as error:
            audited.findings.append(Finding("state", f"image {audited.asked}", False, f"{model}: {error}", ""))
            return None

    def visit(model: str, after: str, lora: str = "") -> bool:
        """Whether the image is that of the first time."""
        name = f"{model} with {lora}" if lora else model
        picture = made(model, lora)
        if picture is None:
            return False
        known = audited.first.setdefault(name, picture)
        if picture.sha256 == known.sha256:
            return True
        audited.differing[f"{name} {audited.asked}"] = picture
        evidence = f"{name}, image {audited.asked}, {after}: {known.apart(picture)}"
        audited.findings.append(Finding("state", "the same image after other models", False, evidence, ""))
        return False

    begun = time.monotonic()
    first = models[0]
    adapters = server.loras(first)
    one, two = made(first), made(first)
    if one is not None and two is not None:
        repeats = one.sha256 == two.sha256
        evidence = f"{first} twice: " + ("the same" if repeats else f"not the same, {one.apart(two)}")
        audited.findings.append(Finding("device", "the same image twice", repeats, evidence, ""))
        audited.first[first] = one
    right = total = 0
    if repeats:
        for _ in range(rounds):
            for model in models[1:]:
                right += visit(model, f"after {first}")
                right += visit(first, f"after {model}")
                total += 2
            for lora in adapters[:2]:
                visit(first, "with an adapter", lora)
                right += visit(first, f"after the adapter {lora}")
                total += 1
    else:
        todo = "It does not repeat itself: differences after a switch cannot be told from its own."
        audited.findings.append(Finding("state", "the same image after other models", True, "not tried", todo))
    if total:
        ok = right == total
        evidence = f"{right} of {total} images after a switch are those of the first time"
        audited.findings.append(Finding("state", "switches", ok, evidence, ""))
    audited.findings += _distinct(audited, models)
    audited.findings += [_restarted(name, digest, audited) for name, digest in (before or {}).items()]
    seconds = time.monotonic() - begun
    audited.findings.append(
        Finding(
            "device", "the audit", True, f"{audited.asked} images in {seconds:.0f} s, {len(adapters)} adapters listed"
        )
    )
    return audited


def _distinct(audited: Audited, models: Sequence[str]) -> list[Finding]:
    """Whether each model gives an image of its own: else it was not the model that was asked for."""
    seen: dict[str, str] = {}
    found: list[Finding] = []
    for name in models:
        picture = audited.first.get(name)
        if picture is None:
            continue
        other = seen.setdefault(picture.sha256, name)
        if other != name:
            evidence = f"{name} gives the very image of {other}"
            found.append(Finding("loading", "each model's own image", False, evidence, ""))
    if not found and len(seen) > 1:
        found.append(Finding("loading", "each model's own image", True, f"{len(seen)} models, {len(seen)} images"))
    return found


def _restarted(name: str, digest: str, audited: Audited) -> Finding:
    now = audited.first.get(name)
    what = "the same image after a restart"
    if now is None:
        return Finding("state", what, False, f"{name}: there is none now")
    ok = now.sha256 == digest
    return Finding("state", what, ok, f"{name}: {'the same' if ok else 'another than before the restart'}")
