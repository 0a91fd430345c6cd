"""One generation: its numeric state is set, its stages run, and what came out carries what made it."""

from __future__ import annotations

import hashlib
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from safelight.devices.choice import DEVICES
from safelight.errors import NotFiniteError
from safelight.extensions import Extensible
from safelight.gates.added import CHECKS
from safelight.generate import numerics
from safelight.generate.bench import Bench
from safelight.generate.check import check
from safelight.generate.drawing import Drawing
from safelight.library.chosen import Settled
from safelight.library.model import Model
from safelight.prompts.emphasis import unbalanced
from safelight.request.parts import PREPROCESSORS
from safelight.request.results import Image, OnProgress
from safelight.request.samplers import SAMPLERS
from safelight.request.schema import VERSION, Request
from safelight.weights.adapter_kinds import WEIGHTS


def images(asked: Settled, model: Model, bench: Bench, on_progress: OnProgress) -> Iterator[Image]:
    """The request's images, one after another: see :func:`image`. Raises RequestError for what the model cannot do."""
    check(asked.request, model, asked.words)
    for index in range(asked.request.count):
        yield image(asked, model, bench, index, on_progress)


def image(asked: Settled, model: Model, bench: Bench, index: int, on_progress: OnProgress) -> Image:
    """The request's image number ``index``: that of :meth:`Request.for_image`.

    ``model``: in the request's combination (:func:`safelight.generate.combine.combined`). ``on_progress`` may raise to
    stop; nothing stays bound then. Raises NotFiniteError for what no gate lets pass.
    """
    asked = replace(asked, request=asked.request.for_image(index))
    drawing = Drawing(asked, model, bench, index, on_progress)
    try:
        with numerics.fixed(bench.run.threads, asked.request.seed):
            pixels = drawing.pixels()
            state = numerics.record()
    except NotFiniteError:
        # What went in may be what was wrong.
        bench.conditionings.clear()
        raise
    return _finished(drawing, pixels, state)


def _finished(drawing: Drawing, pixels: torch.Tensor, state: Mapping[str, Any]) -> Image:
    request, model = drawing.request, drawing.model
    height, width, _ = pixels.shape
    raw = pixels.contiguous().numpy().tobytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    warnings = (
        *(
            f"{field}: {note}"
            for field, text in (("prompt", request.prompt), ("negative prompt", request.negative))
            for note in (unbalanced(text) if request.prompt_syntax == "a1111" else ())
        ),
        *(f"marked: {mark}; it can be right all the same" for mark in drawing.marks),
        *(f"repaired: {repair.wrong}; {repair.helped}" for repair in drawing.repairs),
    )
    asked: dict[str, Any] = asdict(request) | {
        "model": model.name,
        # What was drawn, which with a part of a picture is another size than the picture's.
        "width": drawing.width,
        "height": drawing.height,
        "tile": drawing.tile,
        # As JSON has them.
        "loras": [{**asdict(lora), "blocks": list(lora.blocks)} for lora in request.loras],
        "controls": [asdict(control) for control in request.controls],
        "embeddings": [asdict(embedding) for embedding in request.embeddings or ()],
        "outpaint": list(request.outpaint),
    }
    # Who made it does not change what it is.
    del asked["isolate"]
    roles = model.family.roles
    metadata = {
        "version": VERSION,
        "request": asked,
        "model": {
            "name": model.name,
            "digest": model.digest,
            "base": model.base,
            "prediction_type": model.prediction_type,
            "zero_terminal_snr": model.zero_terminal_snr,
            "components": {role: model.manifest.component(role).digest for role in roles},
        },
        "run": asdict(drawing.run),
        "numerics": dict(state),
        "extensions": _packages(request, drawing.asked, drawing.run.device),
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
        warnings=warnings,
    )


def _packages(request: Request, asked: Settled, device: str) -> dict[str, str]:
    """Return the installed packages that an image uses, with their versions, by what they add."""
    used: list[tuple[Extensible[Any], str]] = [(DEVICES, device), (SAMPLERS, request.sampler)]
    used += [(CHECKS, name) for name in CHECKS]
    used += [(PREPROCESSORS, control.preprocessor) for control in request.controls]
    kinds = {part.kind for lora in asked.loras for parts in lora.fit.parts.values() for part in parts}
    used += [(WEIGHTS, kind) for kind in sorted(kinds)]
    found = {f"{table.group}: {name}": table.package(name) for table, name in used}
    return {added: package for added, package in found.items() if package}


def peak_bytes() -> int:
    """The largest resident set of this process so far, in bytes (the system counts in other units on Linux)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
