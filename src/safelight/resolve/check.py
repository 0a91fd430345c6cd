"""Checks before a job is queued whether the model can do what the request asks for. No torch."""

from __future__ import annotations

from dataclasses import replace

from safelight import extras
from safelight.catalog.model import Model
from safelight.errors import RequestError
from safelight.families.family import MASK_CHANNELS, Variant
from safelight.families.features import Feature, first_missing
from safelight.request.adapters import require_preprocessor
from safelight.request.bounds import MOST_PIXELS
from safelight.request.field import fields_of
from safelight.request.prompts import compel_syntax
from safelight.request.prompts.editing import prompt_per_step_of
from safelight.request.prompts.emphasis import find_written_syntax
from safelight.request.prompts.tokens import NO_INVERSION_TOKENS, chunks
from safelight.request.prompts.words import InversionTokens
from safelight.request.samplers import SAMPLERS
from safelight.request.schema import Request

MAX_CHUNKS = 256
"""A prompt that changes between steps has several texts. They may have this many chunks (of 75 tokens) together: some
160 MB of SDXL's embeddings."""

_STRENGTH, _IMAGE_CFG = (fields_of(Request)[name] for name in ("strength", "image_cfg"))

_NOT_NEEDED_IN_REFINER = (
    Feature.TEXT_TO_IMAGE,
    Feature.IMAGE_TO_IMAGE,
    Feature.CONTROLNET,
    Feature.TEXT_ENCODER_OVERRIDE,
)
"""Features that the model needs but its refiner does not."""

MAX_RATIO = 2.5
"""The user gets a warning if the image has more than this many times the pixels of the training images, or fewer than
1/2.5 of them, or if one side is more than this many times as long as the other."""


def find_size_warning(request: Request, model: Model) -> str:
    """Return a warning if the size is far from the one that the model was trained with; else ""."""
    width, height = request.width or model.resolution, request.height or model.resolution
    pixels = width * height / model.resolution**2
    if max(pixels, 1 / pixels) <= MAX_RATIO and max(width / height, height / width) <= MAX_RATIO:
        return ""
    trained = f"{model.resolution}x{model.resolution}"
    return f"{model.name} was trained at {trained}: at {width}x{height} expect repeated shapes or noise"


def check(request: Request, model: Model, inversion_tokens: InversionTokens = NO_INVERSION_TOKENS) -> None:
    """Raise RequestError if the model cannot do what the request asks for, MissingExtraError if a package is missing.

    ``inversion_tokens``: token ids by word of a textual inversion.
    """
    missing = first_missing(request, model.family.features_of(model.variant))
    if missing is not None and missing[1] is Feature.TEXT_TO_IMAGE:
        problem = f"is missing: {model.name} ({model.base}) makes no images from text alone"
        raise RequestError("image", request.image, problem)
    if missing is not None:
        problem = f"asks for {missing[1]}, which {model.name} ({model.base}) does not have"
        raise RequestError(missing[0], getattr(request, missing[0]), problem)
    kind = model.family.noise.kind
    schedules = SAMPLERS[request.sampler_name].schedules_for(kind)
    if not schedules:
        able = ", ".join(n for n, one in SAMPLERS.usable() if one.schedules_for(kind))
        raise RequestError("sampler", request.sampler_name, f"is not for {model.base}, which has: {able}")
    if request.schedule_name not in schedules:
        problem = f"for {model.base}, the sampler {request.sampler_name} has {', '.join(schedules)}"
        raise RequestError("schedule", request.schedule_name, problem)
    width, height = request.width or model.resolution, request.height or model.resolution
    multiple = model.family.latents.multiple
    for name, side in (("width", width), ("height", height)):
        if side % multiple:
            raise RequestError(name, side, f"must be a multiple of {multiple} for {model.base}")
    if width * height > MOST_PIXELS:
        problem = f"with height {height} the image has {width * height} pixels; at most {MOST_PIXELS} are allowed"
        raise RequestError("width", width, problem)
    if width * height * request.hires_scale**2 > MOST_PIXELS:
        large = f"{width * request.hires_scale:.0f}x{height * request.hires_scale:.0f}"
        problem = f"enlarges {width}x{height} to {large}, which is over {MOST_PIXELS} pixels"
        raise RequestError("hires_scale", request.hires_scale, problem)
    _check_variant(request, model)
    _check_references(request, model)
    _check_extras(request)
    _check_guidance_and_shift(request, model)
    if model.zero_terminal_snr and not SAMPLERS[request.sampler_name].supports_zero_terminal_snr:
        able = ", ".join(name for name, sampler in SAMPLERS.usable() if sampler.supports_zero_terminal_snr)
        problem = f"cannot begin with pure noise, as {model.name} must (zero terminal SNR); these can: {able}"
        raise RequestError("sampler", request.sampler_name, problem)
    if Feature.PROMPT_WEIGHTS in model.family.features:
        check_texts(with_effective_strength(request, model), inversion_tokens)
    else:
        _refuse_syntax(request, model)
    layers = [c.config.encoder_layers for c in model.manifest.components if c.role in model.family.text_encoders]
    if request.skipped_layers and request.skipped_layers >= min(layers):
        problem = f"{model.name}'s text encoder has only {min(layers)} layers"
        raise RequestError("clip_skip", request.skipped_layers, problem)


def _check_extras(request: Request) -> None:
    """Raise MissingExtraError if the sampler or a preprocessor needs an extra that is not installed."""
    if extra := SAMPLERS[request.sampler_name].extra:
        extras.require(extra, f"the sampler {request.sampler_name}")
    for control in request.controls:
        require_preprocessor(control.preprocessor)


def check_refiner(request: Request, model: Model, refiner: Model) -> None:
    """Raise RequestError if the refiner cannot continue with the model's latents or do what the request asks for."""

    def refuse(problem: str) -> RequestError:
        return RequestError("refiner", refiner.name, problem)

    model_family, refiner_family = model.family, refiner.family
    vaes = [of.manifest.component(of.family.vae).config for of in (model, refiner)]
    if (
        model_family.latent_space != refiner_family.latent_space
        or model_family.noise != refiner_family.noise
        or not model_family.same_latents(*vaes)
    ):
        raise refuse(f"is of {refiner.base}: it cannot go on with the latents of {model.name} ({model.base})")
    if refiner_family.variants.get(refiner.variant) != Variant():
        raise refuse(f"is a checkpoint for {refiner.variant}; a refiner works on latents alone")
    if model_family.variants[model.variant].extra_input_channels == "image":
        raise refuse(f"cannot follow {model.name}: a checkpoint for {model.variant} has no refiner")
    if request.embeddings:
        word = request.embeddings[0].word
        problem = f"the word {word} stands for a textual inversion, which a refiner cannot use; remove one of them"
        raise refuse(problem)
    missing = first_missing(request, refiner_family.features_of(refiner.variant), _NOT_NEEDED_IN_REFINER)
    if missing is not None:
        raise refuse(f"does not have {missing[1]} ({missing[0]})")
    layers = [refiner.manifest.component(role).config.encoder_layers for role in refiner_family.text_encoders]
    if request.skipped_layers and request.skipped_layers >= min(layers):
        raise refuse(f"has a text encoder of only {min(layers)} layers: clip_skip is too large")


def _refuse_syntax(request: Request, model: Model) -> None:
    """Raise RequestError for weights and changes between steps in the prompts of a model that reads plain text."""
    for field, text in (("prompt", request.prompt), ("negative", request.negative)):
        found = find_written_syntax(text)
        if found is not None:
            problem = (
                f"{found} has no meaning for {model.name} ({model.base}), which reads plain text: write it in words"
            )
            raise RequestError(field, f"{text[:20]}…", problem)


def _check_variant(request: Request, model: Model) -> None:
    variant = model.family.variants.get(model.variant)
    what = f"{model.name} is a checkpoint for {model.variant}"
    if variant is None:
        raise RequestError("model", model.name, f"is a checkpoint for {model.variant}, which cannot be run yet")
    if variant.extra_input_channels in MASK_CHANNELS and not request.masked:
        raise RequestError("model", model.name, f"is a checkpoint for {model.variant}: it needs an image and a mask")
    if variant.extra_input_channels == "image":
        if not request.image:
            raise RequestError("image", "", f"is missing: {what}, which needs an image")
        if request.masked:
            name = "mask" if request.mask else "outpaint"
            raise RequestError(name, str(getattr(request, name))[:40], f"has no effect: {what}, which reads no mask")
        if request.strength != _STRENGTH.default:
            problem = f"has no effect: {what}, which starts from noise alone; leave it at {_STRENGTH.default:g}"
            raise RequestError("strength", request.strength, problem)
    if request.image_cfg != _IMAGE_CFG.default and model.family.guidance_of(model.variant) != "image_and_text":
        problem = f"has no effect: {what}, which has no guidance by the image; leave it at {_IMAGE_CFG.default:g}"
        raise RequestError("image_cfg", request.image_cfg, problem)


def _check_references(request: Request, model: Model) -> None:
    references, count = model.family.references_of(model.variant), len(request.references)
    if references is not None and not references.least <= count <= references.most:
        least, most = references.least, references.most
        takes = f"{least} to {most}" if least < most else f"{most}"
        raise RequestError("references", count, f"{model.name} ({model.base}, {model.variant}) takes {takes} pictures")


def _check_guidance_and_shift(request: Request, model: Model) -> None:
    if request.shift is not None and model.family.noise.kind != "flow":
        problem = f"has no effect: {model.name} ({model.base}) is not a rectified flow; leave it out"
        raise RequestError("shift", request.shift, problem)
    if request.guidance is not None and not model.has_distilled_guidance:
        problem = f"has no effect: {model.name} ({model.base}, {model.variant}) does not read the scale of distilled"
        raise RequestError("guidance", request.guidance, f"{problem} guidance; leave it out")


def with_effective_strength(request: Request, model: Model) -> Request:
    """Return the request with the strength that the model uses.

    A model that reads the image as an input starts from noise and computes all steps, so its strength is 1.
    """
    starts_from_noise = model.family.variants[model.variant].extra_input_channels == "image"
    return replace(request, strength=1.0) if starts_from_noise else request


def check_texts(request: Request, inversion_tokens: InversionTokens = NO_INVERSION_TOKENS) -> None:
    """Raise RequestError for prompts that cannot be parsed or are too long. This check needs no model.

    ``inversion_tokens``: token ids by word of a textual inversion.
    """
    for field, text in (("prompt", request.prompt), ("negative", request.negative)):
        if request.prompt_syntax == "compel":
            compel_syntax.check(field, text)
            continue
        texts = dict.fromkeys(prompt_per_step_of(request, text, field))
        chunk_counts = [len(chunks(field, one, 0, inversion_tokens)) for one in texts]
        if len(chunk_counts) * max(chunk_counts) > MAX_CHUNKS:
            many = f"has {len(chunk_counts)} texts of up to {max(chunk_counts)} chunks (75 tokens each)"
            problem = f"{many} for its steps: {len(chunk_counts) * max(chunk_counts)} chunks; at most {MAX_CHUNKS}"
            raise RequestError(field, f"{text[:20]}…", problem)
