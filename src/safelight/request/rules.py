"""Rules between the fields of a request. Rules of a single field are in its declaration (``schema.py``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from safelight.errors import RequestError
from safelight.request import checks
from safelight.request.bounds import MOST_PIXELS, MOST_REFERENCES, MOST_SEED
from safelight.request.samplers import SAMPLERS

if TYPE_CHECKING:
    from safelight.request.schema import Request

_SIDES = "must be four numbers of pixels: left, top, right, bottom"


def read_outpaint(request: Request) -> tuple[int, ...]:
    """Return the pixels by which the image is made larger, as a tuple; empty if all are 0. Raises RequestError."""
    sides: Any = request.outpaint
    if not isinstance(sides, tuple | list) or len(request.outpaint) not in (0, 4):
        raise RequestError("outpaint", sides, _SIDES)
    for pixels in request.outpaint:
        checks.within("outpaint", pixels, 0, 4096)
    return tuple(request.outpaint) if any(request.outpaint) else ()


def read_references(request: Request) -> tuple[str, ...]:
    """Return the reference images as a tuple. Raises RequestError."""
    pictures: Any = request.references
    if not isinstance(pictures, tuple | list) or len(request.references) > MOST_REFERENCES:
        raise RequestError("references", str(pictures)[:40], f"must be a list of at most {MOST_REFERENCES} pictures")
    for picture in request.references:
        checks.text("references", picture)
        if not picture:
            raise RequestError("references", picture, "has an empty entry")
    return tuple(request.references)


def check_together(request: Request) -> None:
    """Raise RequestError for fields that do not go together."""
    _check_sampling(request)
    _check_image(request)
    _check_embeddings(request)
    _check_passes(request)
    if request.first_block_cache and request.controls:
        problem = "cannot be combined with ControlNets, which change what the blocks add; leave one out"
        raise RequestError("first_block_cache", request.first_block_cache, problem)


def _check_sampling(request: Request) -> None:
    sampler = SAMPLERS[request.sampler_name]
    # Without a sampler, the model's own may have the schedule.
    if request.sampler is not None and request.schedule_name not in sampler.schedules:
        problem = f"the sampler {request.sampler_name} has {', '.join(sampler.schedules)}"
        raise RequestError("schedule", request.schedule_name, problem)
    for name, steps in (("steps", request.steps or 0), ("hires_steps", request.hires_steps)):
        if steps > sampler.most_steps:
            problem = f"the sampler {request.sampler_name} has at most {sampler.most_steps} steps"
            raise RequestError(name, steps, problem)
    pixels = (request.width or 0) * (request.height or 0)
    if pixels > MOST_PIXELS:
        problem = f"with height {request.height} the image has {pixels} pixels; at most {MOST_PIXELS} are allowed"
        raise RequestError("width", request.width, problem)
    if request.seed + request.count - 1 > MOST_SEED:
        raise RequestError("count", request.count, f"seeds would pass {MOST_SEED}")


def _check_image(request: Request) -> None:
    if request.outpaint and (not request.image or request.mask):
        problem = "cannot be combined with a mask; leave one out" if request.mask else "needs an image"
        raise RequestError("outpaint", request.outpaint, problem)
    if request.mask_padding is not None and not request.masked:
        raise RequestError("mask_padding", request.mask_padding, "needs a mask or outpaint")
    if request.mask and not request.image:
        raise RequestError("mask", request.mask[:40], "needs an image")
    if request.image and request.steps is not None and int(request.steps * request.strength) < 1:
        raise RequestError("strength", request.strength, _too_few(request.steps))


def _check_embeddings(request: Request) -> None:
    words = [embedding.word for embedding in request.embeddings or ()]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise RequestError("embeddings", twice, "is a word of two embeddings")


def _check_passes(request: Request) -> None:
    if request.variation_strength and request.variation_seed + request.count - 1 > MOST_SEED:
        raise RequestError("count", request.count, f"variation seeds would pass {MOST_SEED}")
    if request.hires_scale > 1 and request.image:
        raise RequestError("hires_scale", request.hires_scale, "is for images that start from noise")
    again = request.hires_steps or request.steps
    if again is not None and request.hires_scale > 1 and int(again * request.hires_strength) < 1:
        raise RequestError("hires_strength", request.hires_strength, _too_few(again))
    if request.tile and request.seamless:
        problem = "cannot be combined with seamless, because each tile would wrap around at its own edges"
        raise RequestError("tile", request.tile, f"{problem}; leave one out")


def _too_few(steps: int) -> str:
    """Return the message for a denoising strength so small that none of the ``steps`` is computed."""
    return f"computes less than one step of {steps}; use at least {math.ceil(1000 / steps) / 1000:g}"
