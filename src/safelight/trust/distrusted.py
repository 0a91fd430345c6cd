"""A picture that somebody distrusts: what became of all that it was made of, and what that says about it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.library.model import Model
from safelight.request.results import Image
from safelight.trust.finding import Finding, Suspect

PLACES = ("device", "hardware")
"""Run settings that say where an image was made."""


@dataclass(frozen=True, slots=True)
class Remade:
    """A picture of ``path`` and the same made again. ``held``: the digest of the pixels in the file. ``image``: None
    when it could not be made, and ``problem`` says why. ``again``: the digest of a second one. ``changed``: the run
    settings that are not as recorded; ``versions``: the libraries that are not; ``numerics``: the rows of the numeric
    state that are not."""

    path: Path
    metadata: Mapping[str, Any]
    held: str
    model: Model | None
    image: Image | None = None
    problem: SafelightError | None = None
    again: str = ""
    changed: Mapping[str, str] = field(default_factory=dict[str, str])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    numerics: Mapping[str, str] = field(default_factory=dict[str, str])


def findings(remade: Remade) -> tuple[Finding, ...]:
    """The file, its model, its adapters, and the picture itself; the last names what most likely made it otherwise."""
    found = [_file(remade), _model(remade)]
    if remade.image is None:
        model_is_there = found[-1].ok
        what = "the adapters and images that it was made with" if model_is_there else "the picture made again"
        todo = "Put back what is named, or add it again; then ask once more."
        return (*found, Finding("loading", what, False, f"it cannot be made again: {remade.problem}", todo))
    return (*found, _picture(remade, remade.image))


def _file(remade: Remade) -> Finding:
    if remade.held == remade.metadata["pixels_sha256"]:
        return Finding("loading", "the picture's file", True, "its pixels are those that were saved")
    return Finding(
        "loading",
        "the picture's file",
        False,
        "its pixels are not those that were saved: it was edited, converted or damaged since",
        "Look for the original; what Safelight made is what `safelight remake` makes.",
    )


def _model(remade: Remade) -> Finding:
    recorded = remade.metadata["model"]["digest"]
    name = remade.metadata["request"]["model"]
    if remade.model is not None and remade.model.digest == recorded:
        changed = remade.model.manifest.changed()
        if not changed:
            return Finding("loading", "its model", True, f"{remade.model.name} is the one by which it was made")
    return Finding(
        "loading",
        "its model",
        False,
        f"the file of {name} is gone, or is no longer the one of content {recorded[:10]} by which it was made",
        f"`safelight models verify {name}` says which tensors differ; put the file back, or `models rollback`.",
    )


def _picture(remade: Remade, image: Image) -> Finding:
    what = "the picture made again in a fresh process"
    if image.pixels_sha256 == remade.metadata["pixels_sha256"]:
        return Finding("state", what, True, "the same, pixel for pixel: it is what its request gives")
    if remade.again != image.pixels_sha256:
        return Finding(
            "device",
            what,
            False,
            "it is another each time: this device does not repeat itself",
            "`safelight doctor` tests the device and its memory.",
        )
    causes: tuple[tuple[Suspect, Mapping[str, str], str], ...] = (
        ("loading", _only(remade.changed, "model"), "The model's content is another: it cannot be the same picture."),
        (
            "device",
            remade.versions,
            "Another version may round otherwise: `safelight rollback` brings the old one back.",
        ),
        ("device", _only(remade.changed, *PLACES), "Another device rounds otherwise; compare on the one that made it."),
        ("attention", _only(remade.changed, "attention"), "Set `attention_type` to the one recorded."),
        ("device", remade.numerics, "The numeric state was another: see what sets it in that program or machine."),
        ("device", remade.changed, "Set them as recorded, and ask once more."),
    )
    for suspect, changes, todo in causes:
        if changes:
            listed = "; ".join(f"{name}: {change}" for name, change in changes.items())
            return Finding(suspect, what, False, f"not the same, and since then this is another: {listed}", todo)
    return Finding(
        "state",
        what,
        False,
        "not the same, though model, adapters, settings, device, versions and numbers are as recorded: something that "
        "is no part of its request spoiled it when it was made (state that was left, or wrong bytes in memory)",
        "Keep the one made again. `safelight doctor` looks for what it was; `canary: switch` watches for it.",
    )


def _only(changed: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: change for name, change in dict(changed).items() if name in names}
