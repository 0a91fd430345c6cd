"""What a model can and cannot do, told before a job is queued. No torch."""

from __future__ import annotations

from safelight.errors import RequestError
from safelight.library.model import Model
from safelight.prompts.tokens import chunks
from safelight.types import MOST_PIXELS, Request


def check(request: Request, model: Model) -> None:
    """Raise RequestError when this model cannot do what is asked."""
    if model.base == "sdxl-refiner":
        raise RequestError("model", model.name, "is a refiner: it works on images, and cannot start from text")
    width, height = request.width or model.resolution, request.height or model.resolution
    if width * height > MOST_PIXELS:
        raise RequestError("width", width, f"times height {height} is over {MOST_PIXELS} pixels")
    if model.variant == "inpainting" and not request.mask:
        raise RequestError("model", model.name, "is a checkpoint for inpainting: it needs an image and a mask")
    if model.variant not in ("text-to-image", "inpainting"):
        raise RequestError("model", model.name, f"is a checkpoint for {model.variant}, which cannot be run yet")
    for field, text in (("prompt", request.prompt), ("negative", request.negative)):
        chunks(field, text, 0)
    layers = min(getattr(c.config, "layers", 99) for c in model.manifest.components)
    if request.clip_skip >= layers:
        raise RequestError("clip_skip", request.clip_skip, f"{model.name}'s text encoder has only {layers} layers")
