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
from safelight.families.features import Feature
from safelight.pipeline import numerics
from safelight.pipeline.checks.added import CHECKS
from safelight.pipeline.drawing import ImagePipeline
from safelight.pipeline.resources import Resources
from safelight.request.adapters import PREPROCESSORS
from safelight.request.prompts.emphasis import unbalanced
from safelight.request.results import Image, OnProgress
from safelight.request.samplers import SAMPLERS
from safelight.request.schema import Request
from safelight.resolve.contents import Contents
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS


def make_image(contents: Contents, model: Model, resources: Resources, index: int, on_progress: OnProgress) -> Image:
    """Make image number ``index`` of a job.

    ``model``: the job's model with its adapters, ControlNets and replaced components
    (:func:`safelight.pipeline.combine.combine`).
    ``on_progress``: may raise an error to stop; the weights are then unbound as usual.

    Raises NotFiniteError if embeddings, latents or pixels hold NaN or infinity.
    """
    job = contents.job.image(index)
    pipeline = ImagePipeline(job, model, contents.refiner, resources, index, on_progress)
    try:
        with numerics.fixed(resources.run_settings.threads, job.request.seed, resources.device.torch):
            pixels = pipeline.draw()
            state = numerics.record()
    except NotFiniteError:
        # Wrong conditioning may be the cause.
        resources.embedding_cache.clear()
        raise
    return _build_image(pipeline, contents, pixels, state)


def _build_image(pipeline: ImagePipeline, contents: Contents, pixels: torch.Tensor, state: Mapping[str, Any]) -> Image:
    request, model = pipeline.request, pipeline.model
    height, width, _ = pixels.shape
    raw = pixels.contiguous().numpy().tobytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    metadata = _metadata(pipeline) | {
        "run": asdict(pipeline.run_settings),
        "numerics": dict(state),
        "extensions": _packages(request, contents, pipeline.run_settings.device),
        "marks": list(pipeline.marks),
        "repairs": [asdict(repair) for repair in pipeline.repairs],
        "pixels_sha256": sha256,
    }
    if request.first_block_cache:
        metadata["skipped_calls"] = pipeline.skipped_calls
    return Image(
        pixels=raw,
        width=width,
        height=height,
        seed=request.seed,
        model=model.name,
        model_digest=model.digest,
        pixels_sha256=sha256,
        seconds=pipeline.clock.seconds(),
        host_peak_bytes=peak_bytes(),
        metadata=metadata,
        warnings=_warnings(pipeline, state["differs"]),
    )


def _metadata(pipeline: ImagePipeline) -> dict[str, Any]:
    """Return the image's job as JSON values, with the image size and tile size that were used."""
    # Metadata is later compared with parsed JSON, so it is converted the same way now: tuples become lists.
    stored: dict[str, Any] = json.loads(json.dumps(pipeline.job.to_json()))
    stored["request"] |= {
        "model": pipeline.model.name,
        # If only the masked part is drawn, the drawn size differs from the size of the picture.
        "width": pipeline.width,
        "height": pipeline.height,
        "tile": pipeline.tile,
        "embeddings": stored["request"]["embeddings"] or [],
    }
    # The kind of process (isolated or not) changes no pixel, so it is not recorded.
    del stored["request"]["isolate"]
    components = {role: pipeline.model.manifest.component(role).digest for role in pipeline.model.roles}
    stored["model"]["components"] = components
    return stored


def _warnings(pipeline: ImagePipeline, wrong: Mapping[str, object]) -> tuple[str, ...]:
    """Return an image's warnings. ``wrong``: numeric settings that did not have Safelight's values, and theirs."""
    request, weighs = pipeline.request, Feature.PROMPT_WEIGHTS in pipeline.model.family.features
    return (
        *(
            f"{field}: {note}"
            for field, text in (("prompt", request.prompt), ("negative prompt", request.negative))
            for note in (unbalanced(text) if weighs and request.prompt_syntax == "a1111" else ())
        ),
        *pipeline.warnings,
        *(f"suspicious: {mark}; the image may still be correct" for mark in pipeline.marks),
        *(f"repaired: {repair.wrong}; {repair.helped}" for repair in pipeline.repairs),
        *(
            f"suspicious: when the image was made, the numeric setting {name} was {value}, which is not Safelight's"
            " value; the same request may give other pixels"
            for name, value in wrong.items()
        ),
    )


def _packages(request: Request, contents: Contents, device: str) -> dict[str, str]:
    """Return the package and version of each extension that an image uses. The keys are "group: name"."""
    used: list[tuple[Extensible[Any], str]] = [(DEVICES, device), (SAMPLERS, request.sampler_name)]
    used += [(CHECKS, name) for name in CHECKS]
    used += [(PREPROCESSORS, control.preprocessor) for control in request.controls]
    kinds = {change.kind for lora in contents.loras for changes in lora.match.changes.values() for change in changes}
    used += [(WEIGHT_ADAPTER_KINDS, kind) for kind in sorted(kinds)]
    found = {f"{table.group}: {name}": table.package(name) for table, name in used}
    return {added: package for added, package in found.items() if package}


def peak_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes. Linux reports kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
