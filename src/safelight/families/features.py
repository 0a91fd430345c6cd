"""What a family of models may or may not be able to do, and how a request asks for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import StrEnum

from safelight.request.schema import Request


class Feature(StrEnum):
    TEXT_TO_IMAGE = "images from text alone"
    IMAGE_TO_IMAGE = "image to image"
    INPAINTING = "inpainting"
    NEGATIVE_PROMPT = "a negative prompt"
    GUIDANCE = "a guidance scale"
    PROMPT_WEIGHTS = "weights of words"
    COMPEL = "compel's syntax"
    CLIP_SKIP = "CLIP skip"
    TEXTUAL_INVERSION = "textual inversion"
    HIRES = "hires fix"
    SEAMLESS = "seamless images"
    TILED_VAE = "decoding in tiles"
    REFERENCES = "reference images"
    CONTROLNET = "ControlNet"
    TEXT_ENCODER_OVERRIDE = "another model's text encoders"
    FIRST_BLOCK_CACHE = "first-block caching"


PLAIN_TEXT_FEATURES = frozenset(
    {
        Feature.TEXT_TO_IMAGE,
        Feature.IMAGE_TO_IMAGE,
        Feature.INPAINTING,
        Feature.NEGATIVE_PROMPT,
        Feature.GUIDANCE,
        Feature.HIRES,
        Feature.TILED_VAE,
        Feature.FIRST_BLOCK_CACHE,
    }
)
"""What the families can do that are transformers, read prompts as plain text, and have classifier-free guidance."""

FEATURE_REQUESTS: Mapping[Feature, tuple[str, Callable[[Request], bool]]] = {
    Feature.TEXT_TO_IMAGE: ("image", lambda r: not r.image),
    Feature.IMAGE_TO_IMAGE: ("image", lambda r: bool(r.image)),
    Feature.INPAINTING: ("mask", lambda r: r.masked),
    Feature.NEGATIVE_PROMPT: ("negative", lambda r: bool(r.negative.strip())),
    Feature.GUIDANCE: ("cfg", lambda r: r.cfg is not None and r.cfg > 1),
    Feature.COMPEL: ("prompt_syntax", lambda r: r.prompt_syntax == "compel"),
    Feature.CLIP_SKIP: ("clip_skip", lambda r: r.skipped_layers > 0),
    Feature.TEXTUAL_INVERSION: ("embeddings", lambda r: bool(r.embeddings)),
    Feature.HIRES: ("hires_scale", lambda r: r.hires_scale > 1),
    Feature.SEAMLESS: ("seamless", lambda r: bool(r.seamless)),
    Feature.TILED_VAE: ("tile", lambda r: bool(r.tile)),
    Feature.REFERENCES: ("references", lambda r: bool(r.references)),
    Feature.CONTROLNET: ("controls", lambda r: bool(r.controls)),
    Feature.TEXT_ENCODER_OVERRIDE: ("text_encoder", lambda r: bool(r.text_encoder)),
    Feature.FIRST_BLOCK_CACHE: ("first_block_cache", lambda r: bool(r.first_block_cache)),
}
"""For each feature: the request's field that asks for it, and a function that tells whether a request does.

``PROMPT_WEIGHTS`` has no entry: it depends on the prompt's text, not on a field.
"""


def first_missing(
    request: Request, features: frozenset[Feature], ignored: Collection[Feature] = ()
) -> tuple[str, Feature] | None:
    """Return the field and the feature that a request asks for and a family does not have; None if there is none."""
    for feature, (name, asks) in FEATURE_REQUESTS.items():
        if feature not in features and feature not in ignored and asks(request):
            return name, feature
    return None
