"""Examines a picture that a user distrusts: what changed since it was made, and what that says about it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.catalog.model import Model
from safelight.diagnostics.finding import Finding, Suspect
from safelight.errors import SafelightError
from safelight.request.results import Image

MACHINE_SETTINGS = ("device", "hardware")
"""Run settings that describe the machine on which an image was made."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A picture, and the same picture made again.

    ``file_digest``: digest of the pixels in the file.
    ``image``: the picture made again; None if that failed.
    ``problem``: why it failed.
    ``second_digest``: digest of a second repetition.
    ``changed``, ``versions``, ``numerics``: run settings, library versions, and rows of the numeric state that differ
    from the recorded ones.
    """

    path: Path
    metadata: Mapping[str, Any]
    file_digest: str
    model: Model | None
    image: Image | None = None
    problem: SafelightError | None = None
    second_digest: str = ""
    changed: Mapping[str, str] = field(default_factory=dict[str, str])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    numerics: Mapping[str, str] = field(default_factory=dict[str, str])


def findings(reproduction: Reproduction) -> tuple[Finding, ...]:
    """Return findings about the file, its model, its adapters, and the picture itself.

    The last one names the most likely cause of a difference.
    """
    found = [_file(reproduction), _model(reproduction)]
    if reproduction.image is None:
        model_is_there = found[-1].ok
        what = "its adapters and input images" if model_is_there else "the picture made again"
        todo = "Put back the named file, or add it again. Then try again."
        return (*found, Finding("loading", what, False, f"it cannot be made again: {reproduction.problem}", todo))
    return (*found, _picture(reproduction, reproduction.image))


def _file(reproduction: Reproduction) -> Finding:
    if reproduction.file_digest == reproduction.metadata["pixels_sha256"]:
        return Finding("loading", "the picture's file", True, "its pixels are unchanged since it was saved")
    return Finding(
        "loading",
        "the picture's file",
        False,
        "its pixels changed since it was saved: it was edited, converted or damaged",
        "Look for the original. `safelight remake` makes the picture as Safelight made it first.",
    )


def _model(reproduction: Reproduction) -> Finding:
    recorded = reproduction.metadata["model"]["digest"]
    name = reproduction.metadata["request"]["model"]
    if reproduction.model is not None and reproduction.model.digest == recorded:
        changed = reproduction.model.manifest.changed_files()
        if not changed:
            return Finding(
                "loading", "its model", True, f"{reproduction.model.name} is unchanged since it made the picture"
            )
    return Finding(
        "loading",
        "its model",
        False,
        f"the file of {name} is gone, or no longer has the content {recorded[:10]} that made the picture",
        f"`safelight models verify {name}` lists the tensors that differ. Put the file back, or use "
        "`safelight models rollback`.",
    )


def _picture(reproduction: Reproduction, image: Image) -> Finding:
    what = "the picture made again in a fresh process"
    if image.pixels_sha256 == reproduction.metadata["pixels_sha256"]:
        return Finding("state", what, True, "the same, pixel for pixel: it is the correct result of its request")
    if reproduction.second_digest != image.pixels_sha256:
        return Finding(
            "device",
            what,
            False,
            "it differs each time: this device does not repeat its results",
            "`safelight doctor` tests the device and its memory.",
        )
    causes: tuple[tuple[Suspect, Mapping[str, str], str], ...] = (
        (
            "loading",
            _only(reproduction.changed, "model"),
            "The model's content changed, so the picture cannot be the same.",
        ),
        (
            "device",
            reproduction.versions,
            "Another version may round differently. `safelight rollback` returns to the old version.",
        ),
        (
            "device",
            _only(reproduction.changed, *MACHINE_SETTINGS),
            "Another device rounds differently; use the one that made it.",
        ),
        ("attention", _only(reproduction.changed, "attention"), "Set `attention_type` to the recorded value."),
        (
            "device",
            reproduction.numerics,
            "The numeric state was different: find what sets it in that program or machine.",
        ),
        ("device", reproduction.changed, "Set them to the recorded values, and try again."),
    )
    for suspect, changes, todo in causes:
        if changes:
            listed = "; ".join(f"{name}: {change}" for name, change in changes.items())
            return Finding(suspect, what, False, f"not the same; this changed since then: {listed}", todo)
    return Finding(
        "state",
        what,
        False,
        "not the same, although model, adapters, settings, device, versions and numeric state are as recorded: "
        "something outside of its request spoiled the picture when it was made (leftover state, or wrong bytes in "
        "memory)",
        "Keep the picture made again. `safelight doctor` looks for the cause. Set `canary: switch` to detect it next "
        "time.",
    )


def _only(changed: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: change for name, change in dict(changed).items() if name in names}
