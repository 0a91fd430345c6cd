"""An audit makes the doctor's checks on any image server.

It requests an image by model A twice, then by A, B, A, C, A and so on. After a restart of the server, it compares with
an earlier report. It knows nothing of the server except the images from its API. No torch.
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

from safelight.diagnostics.audited_servers import ImageRequest, Server
from safelight.diagnostics.finding import Finding
from safelight.diagnostics.image_difference import difference
from safelight.errors import SafelightError

ROUNDS = 3
"""How often the audit requests each model again."""


@dataclass
class AuditedImage:
    """An image from a server: the SHA-256 of its pixels (hex), and the bytes of its file."""

    sha256: str
    png: bytes

    @classmethod
    def of(cls, data: bytes) -> AuditedImage:
        """Decode an image file. Raises SafelightError if it is not an image."""
        try:
            with PILImage.open(io.BytesIO(data)) as image:
                return cls(hashlib.sha256(image.convert("RGB").tobytes()).hexdigest(), data)
        except (OSError, SyntaxError, ValueError) as error:
            raise SafelightError(f"the server's answer is not an image ({error})") from error

    def apart(self, other: AuditedImage) -> str:
        """Describe the difference to another image, for users."""
        import numpy as np

        def pixels(png: bytes) -> Any:
            with PILImage.open(io.BytesIO(png)) as image:
                return np.asarray(image.convert("RGB"))

        one, two = pixels(self.png), pixels(other.png)
        if one.shape != two.shape:
            return f"{two.shape[1]}x{two.shape[0]} pixels instead of {one.shape[1]}x{one.shape[0]}"
        return str(difference(one, two))


@dataclass
class AuditResult:
    """The result of an audit.

    ``first``: the first image of each model and adapter, by name.
    ``differing``: the images that differ from the first, by name and number.
    ``request_count``: the number of requests.
    """

    findings: list[Finding] = field(default_factory=list[Finding])
    first: dict[str, AuditedImage] = field(default_factory=dict[str, AuditedImage])
    differing: dict[str, AuditedImage] = field(default_factory=dict[str, AuditedImage])
    request_count: int = 0

    def save(self, folder: Path) -> None:
        """Save the first images and those that differ as files."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind, pictures in (("first", self.first), ("differs", self.differing)):
            for name, picture in pictures.items():
                safe = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
                (folder / f"{kind}-{safe}.png").write_bytes(picture.png)

    def digests(self) -> dict[str, str]:
        """Return the digests of the first images, for comparison in a later audit."""
        return {name: picture.sha256 for name, picture in self.first.items()}


def audit(
    server: Server,
    models: Sequence[str],
    request: ImageRequest,
    rounds: int = ROUNDS,
    before: Mapping[str, str] | None = None,
    on_image: Callable[[int], None] = lambda _: None,
) -> AuditResult:
    """Request the same images from a server in many orders, and compare them.

    ``rounds``: how often each model is requested again.
    ``before``: digests from an audit before the server's restart.
    ``on_image``: called with the number of each request.
    """
    result = AuditResult()
    requests = _Requests(server, request, result, on_image)
    begun = time.monotonic()
    adapters = server.loras(models[0])
    if requests.repeats(models[0]):
        requests.switch(models, adapters[:2], rounds)
    else:
        todo = "This server never repeats an image, so the audit cannot detect differences after a switch."
        result.findings.append(Finding("state", "the same image after other models", True, "not tried", todo))
    result.findings += _distinct(result, models)
    result.findings += [_restarted(name, digest, result) for name, digest in (before or {}).items()]
    seconds = time.monotonic() - begun
    evidence = f"{result.request_count} images in {seconds:.0f} s, {len(adapters)} adapters listed"
    result.findings.append(Finding("device", "the audit", True, evidence))
    return result


@dataclass
class _Requests:
    """The requests of an audit. They add their findings and images to ``result``."""

    server: Server
    request: ImageRequest
    result: AuditResult
    on_image: Callable[[int], None]

    def make(self, model: str, lora: str = "") -> AuditedImage | None:
        """Request an image. Returns None, and adds a finding, if the server fails."""
        self.result.request_count += 1
        self.on_image(self.result.request_count)
        try:
            return AuditedImage.of(self.server.make(self.request.for_model(model, lora)))
        except SafelightError as error:
            self.result.findings.append(
                Finding("state", f"image {self.result.request_count}", False, f"{model}: {error}")
            )
            return None

    def repeats(self, model: str) -> bool:
        """Request the same image twice. Returns False only if the server makes two images and they differ."""
        one, two = self.make(model), self.make(model)
        if one is None or two is None:
            return True
        same = one.sha256 == two.sha256
        evidence = f"{model} twice: " + ("the same" if same else f"not the same, {one.apart(two)}")
        self.result.findings.append(Finding("device", "the same image twice", same, evidence))
        self.result.first[model] = one
        return same

    def switch(self, models: Sequence[str], adapters: Sequence[str], rounds: int) -> None:
        """Request the first model after each other model and each adapter, and compare every image with its first."""
        first = models[0]
        equal: list[bool] = []
        for _ in range(rounds):
            for model in models[1:]:
                equal.append(self.visit(model, f"after {first}"))
                equal.append(self.visit(first, f"after {model}"))
            for lora in adapters:
                self.visit(first, "with an adapter", lora)
                equal.append(self.visit(first, f"after the adapter {lora}"))
        if equal:
            evidence = f"{sum(equal)} of {len(equal)} images after a switch equal the first ones"
            self.result.findings.append(Finding("state", "switches", all(equal), evidence))

    def visit(self, model: str, after: str, lora: str = "") -> bool:
        """Request an image. Returns whether it equals the first one of the same model and adapter."""
        name = f"{model} with {lora}" if lora else model
        picture = self.make(model, lora)
        if picture is None:
            return False
        known = self.result.first.setdefault(name, picture)
        if picture.sha256 == known.sha256:
            return True
        self.result.differing[f"{name} {self.result.request_count}"] = picture
        evidence = f"{name}, image {self.result.request_count}, {after}: {known.apart(picture)}"
        self.result.findings.append(Finding("state", "the same image after other models", False, evidence))
        return False


def _distinct(result: AuditResult, models: Sequence[str]) -> list[Finding]:
    """Check that each model makes a different image. Equal images mean that the server did not switch the model."""
    seen: dict[str, str] = {}
    found: list[Finding] = []
    for name in models:
        picture = result.first.get(name)
        if picture is None:
            continue
        other = seen.setdefault(picture.sha256, name)
        if other != name:
            evidence = f"{name} makes the same image as {other}"
            found.append(Finding("loading", "each model's own image", False, evidence, ""))
    if not found and len(seen) > 1:
        found.append(Finding("loading", "each model's own image", True, f"{len(seen)} models, {len(seen)} images"))
    return found


def _restarted(name: str, digest: str, result: AuditResult) -> Finding:
    now = result.first.get(name)
    what = "the same image after a restart"
    if now is None:
        return Finding("state", what, False, f"{name}: this audit has no image of it")
    ok = now.sha256 == digest
    return Finding("state", what, ok, f"{name}: {'the same' if ok else 'differs from the one before the restart'}")
