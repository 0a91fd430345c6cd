"""Turns a request into a job: replaces every name by a digest, and fills in everything that is left out. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from safelight.catalog import paths
from safelight.catalog.catalog import Catalog
from safelight.catalog.model import Model
from safelight.errors import ModelNotFoundError, RequestError
from safelight.families.family import Family
from safelight.request.adapters import Control
from safelight.request.assumed import USUAL_SAMPLER
from safelight.request.job import ComponentReference, Job, ModelReference
from safelight.request.model_defaults import OWN_VAE, ModelDefaults, fill_in
from safelight.request.prompts import loras, tags
from safelight.request.schema import Request
from safelight.resolve import inversions, parts
from safelight.resolve.adapters import resolve_lora
from safelight.resolve.check import check, check_refiner
from safelight.resolve.limits import NO_LIMITS, RequestLimits
from safelight.resolve.pictures import resolve_pictures


def resolve(
    request: Request,
    catalog: Catalog,
    limits: RequestLimits = NO_LIMITS,
    by_path: bool = True,
    model: Model | None = None,
) -> Job:
    """Resolve a request: the only place where digests replace names.

    LoRAs that its prompts name are added to its ``loras``. Its images are stored, and their digests replace their
    names.

    ``limits``: may refuse a request; they never change one.
    ``by_path``: whether the request may name models, adapters, VAEs and images by their paths.
    ``model``: the request's model, if the caller has found it already.

    Raises RequestError if the model cannot do what the request asks for, or if an adapter or component does not fit it.
    Raises ModelNotFoundError for an unknown name, and IntegrityError if a digest is not the requested one.
    """
    limits.check_texts(request)
    if model is None:
        model = catalog.library.find(request.model) if by_path else catalog.library.get(request.model)
    for field, text in (("prompt", request.prompt), ("negative", request.negative)):
        tags.refuse_unknown(field, text, request.prompt_syntax)
    prompt, prompt_loras = loras.extract_lora_tags("prompt", request.prompt)
    negative, negative_loras = loras.extract_lora_tags("negative", request.negative)
    adapters = [
        resolve_lora(lora, model, catalog.adapters, by_path, request.lenient)
        for lora in (*request.loras, *prompt_loras, *negative_loras)
    ]
    resolved_fields: dict[str, Any] = resolve_pictures(request, catalog.inputs, by_path, model)
    request = _with_default_vae(request, model, catalog)
    replacements, named = _find_replacements(request, model, catalog, by_path)
    controls = tuple(_resolve_control(control, model, catalog, by_path) for control in request.controls)
    refiner = parts.find_refiner(request, catalog.library, by_path)
    if refiner is not None:
        named |= {"refiner": refiner.name, "refiner_digest": refiner.digest}
    resolved_fields |= named | {"controls": controls, "loras": tuple(one.lora for one in adapters)}
    for side in ("width", "height"):
        default = model.defaults.get(side) or model.resolution
        resolved_fields[side] = resolved_fields.get(side) or getattr(request, side) or default
    resolved_fields |= {"model": model.name, "prompt": prompt, "negative": negative}
    request = with_defaults(replace(request, **resolved_fields), model)
    found = inversions.resolve_inversions(request, model, catalog.adapters, by_path)
    request = replace(request, embeddings=tuple(one.embedding for one in found))
    draws_only_a_part = request.image and request.mask_padding is not None
    limits.check(request, model, catalog.inputs.size(request.image) if draws_only_a_part else None)
    words = {one.embedding.word: one.tokens for one in found}
    check(request, model, words)
    if refiner is not None:
        check_refiner(request, model, refiner)
    refiner_reference = None if refiner is None else model_reference(refiner)
    return Job(request, model_reference(model), replacements, words, refiner_reference)


def _resolve_control(control: Control, model: Model, catalog: Catalog, by_path: bool) -> Control:
    net = parts.find_controlnet(control, model, catalog.adapters, by_path)
    return replace(
        control,
        name=net.name,
        image=catalog.inputs.store_from_request("controls", control.image, by_path),
        digest=net.digest,
        union_type=parts.union_type(control, net, model),
    )


def with_defaults(request: Request, model: Model) -> Request:
    """Return the request with the model's defaults for the fields of sampling that it does not name.

    The user's defaults take precedence over the family's.
    """
    return with_defaults_of(request, model.defaults, model.family, model.variant)


def with_defaults_of(request: Request, user: ModelDefaults, found: Family, variant: str) -> Request:
    """Return the request with defaults as in :func:`with_defaults`, for a model that need not be read.

    ``user``: the user's defaults for the model.
    """
    own = {name: value for name, value in user.items() if name not in ("width", "height", "vae")}
    request = replace(request, **fill_in(request, own))
    family = found.defaults_of(variant)
    rest = {"steps": family.steps, "cfg": family.cfg, "guidance": family.guidance}
    rest |= {"sampler": USUAL_SAMPLER, "schedule": "default", "clip_skip": 0}
    return replace(request, **{name: value for name, value in rest.items() if getattr(request, name) is None})


def _with_default_vae(request: Request, model: Model, catalog: Catalog) -> Request:
    """Return the request with the VAE that the model's defaults name, if it names none.

    Raises RequestError if there is no such VAE any more.
    """
    if request.vae == OWN_VAE:
        return replace(request, vae="")
    vae = "" if request.vae else str(model.defaults.get("vae", ""))
    if not vae:
        return request
    request = replace(request, vae=vae)
    try:
        parts.find_vae(request, model, catalog, by_path=False)
    except ModelNotFoundError as error:
        todo = f"add it, or run `safelight models defaults {model.name} vae=`"
        raise RequestError("vae", vae, f"is the default of {model.name} and not in the library; {todo}") from error
    return request


def model_reference(model: Model) -> ModelReference:
    """Return the values by which a job identifies its model."""
    components = {role: model.manifest.component(role).digest for role in model.roles}
    return ModelReference(
        model.name, model.digest, model.base, model.prediction_type, model.zero_terminal_snr, components
    )


def _find_replacements(
    request: Request, model: Model, catalog: Catalog, by_path: bool
) -> tuple[tuple[ComponentReference, ...], dict[str, Any]]:
    """Find the components that replace the model's own. Return them and the request's fields that name them."""
    replacements: list[ComponentReference] = []
    named: dict[str, Any] = {}
    if request.vae:
        vae = parts.find_vae(request, model, catalog, by_path)
        replacements.append(vae.reference)
        named |= {"vae": paths.name_of(request.vae), "vae_digest": vae.component.digest}
    if request.text_encoder:
        encoders = parts.find_text_encoders(request, model, catalog.library, by_path)
        replacements += [one.reference for one in encoders]
        named["text_encoder"] = paths.name_of(request.text_encoder)
        named["text_encoder_digest"] = parts.hash_components([one.component for one in encoders])
    return tuple(replacements), named
