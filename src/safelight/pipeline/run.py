"""One image of a job: sets the numeric state, runs the stages, and records in the image what made it."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from safelight.catalog.model import Model
from safelight.devices.choice import DEVICES
from safelight.errors import NotFiniteError
from safelight.extensions import Extensible
from safelight.pipeline import numerics
from safelight.pipeline.checks.added import CHECKS
from safelight.pipeline.drawing import Drawing
from safelight.pipeline.resources import Resources
from safelight.request.parts import PREPROCESSORS
from safelight.request.prompts.emphasis import unbalanced
from safelight.request.results import Image, OnProgress
from safelight.request.samplers import SAMPLERS
from safelight.request.schema import Request
from safelight.resolve.contents import Contents
from safelight.weights.adapter_kinds import WEIGHTS


def image(contents: Contents, model: Model, resources: Resources, index: int, on_progress: OnProgress) -> Image:
    """Make one image of a job: that of :meth:`safelight.request.job.Job.image`.

    ``model``: the job's model in its combination (:func:`safelight.pipeline.combine.combined`).
    ``on_progress``: may raise to stop; nothing stays bound then.

    Raises NotFiniteError for what no gate lets pass.
    """
    job = contents.job.image(index)
    drawing = Drawing(job, model, contents.refiner, resources, index, on_progress)
    try:
        with numerics.fixed(resources.run.threads, job.request.seed):
            pixels = drawing.pixels()
            state = numerics.record()
    except NotFiniteError:
        # Wrong conditioning may be the cause.
        resources.conditionings.clear()
        raise
    return _finished(drawing, contents, pixels, state)


def _finished(drawing: Drawing, contents: Contents, pixels: torch.Tensor, state: Mapping[str, Any]) -> Image:
    request, model = drawing.request, drawing.model
    height, width, _ = pixels.shape
    raw = pixels.contiguous().numpy().tobytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    metadata = _metadata(drawing) | {
        "run": asdict(drawing.run),
        "numerics": dict(state),
        "extensions": _packages(request, contents, drawing.run.device),
        "marks": list(drawing.marks),
        "repairs": [asdict(repair) for repair in drawing.repairs],
        "pixels_sha256": sha256,
    }
    return Image(
        pixels=raw,
        width=width,
        height=height,
        seed=request.seed,
        model=model.name,
        model_digest=model.digest,
        pixels_sha256=sha256,
        seconds=drawing.clock.seconds(),
        host_peak_bytes=peak_bytes(),
        metadata=metadata,
        warnings=_warnings(drawing),
    )


def _metadata(drawing: Drawing) -> dict[str, Any]:
    """Return the image's job as JSON values, with the size and the tiles that were drawn."""
    # Compared with what JSON gives back, so tuples become lists.
    stored: dict[str, Any] = json.loads(json.dumps(drawing.job.to_json()))
    stored["request"] |= {
        "model": drawing.model.name,
        # With a part of a picture, the size that was drawn differs from the picture's.
        "width": drawing.width,
        "height": drawing.height,
        "tile": drawing.tile,
        "embeddings": stored["request"]["embeddings"] or [],
    }
    # In which kind of process an image was made changes no pixel.
    del stored["request"]["isolate"]
    components = {role: drawing.model.manifest.component(role).digest for role in drawing.model.family.roles}
    stored["model"]["components"] = components
    return stored


def _warnings(drawing: Drawing) -> tuple[str, ...]:
    request = drawing.request
    return (
        *(
            f"{field}: {note}"
            for field, text in (("prompt", request.prompt), ("negative prompt", request.negative))
            for note in (unbalanced(text) if request.prompt_syntax == "a1111" else ())
        ),
        *drawing.notes,
        *(f"marked: {mark}; it can be right all the same" for mark in drawing.marks),
        *(f"repaired: {repair.wrong}; {repair.helped}" for repair in drawing.repairs),
    )


def _packages(request: Request, contents: Contents, device: str) -> dict[str, str]:
    """Return the installed packages that an image uses, with their versions, by what they add."""
    used: list[tuple[Extensible[Any], str]] = [(DEVICES, device), (SAMPLERS, request.sampler)]
    used += [(CHECKS, name) for name in CHECKS]
    used += [(PREPROCESSORS, control.preprocessor) for control in request.controls]
    kinds = {part.kind for lora in contents.loras for parts in lora.fit.parts.values() for part in parts}
    used += [(WEIGHTS, kind) for kind in sorted(kinds)]
    found = {f"{table.group}: {name}": table.package(name) for table, name in used}
    return {added: package for added, package in found.items() if package}


def peak_bytes() -> int:
    """The largest resident set of this process so far, in bytes (the system counts in other units on Linux)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
