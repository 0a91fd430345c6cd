"""Finds the components that a request names: VAEs and text encoders, which replace those of the model, and ControlNets,
which are added to it. Also finds the refiner. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelight.catalog import paths
from safelight.catalog.adapters import Adapters
from safelight.catalog.catalog import Catalog
from safelight.catalog.library import Library
from safelight.catalog.model import Adapter, Model
from safelight.errors import InputError, IntegrityError, ModelNotFoundError, RequestError, UnsupportedModelError
from safelight.families.family import CONTROLNET
from safelight.families.registry import families
from safelight.request.adapters import CONTROL_MODES, Control
from safelight.request.job import ComponentReference
from safelight.request.schema import Request
from safelight.weights.adapter_file import VAE
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import ComponentManifest

_OTHER_CONTENT_REMEDY = "Put the file with the requested content back, or request it without a digest."


@dataclass(frozen=True, slots=True)
class Replacement:
    """A component that replaces the model's own. ``reference``: tells which file has it."""

    component: ComponentManifest
    reference: ComponentReference


def find_vae(request: Request, model: Model, catalog: Catalog, by_path: bool) -> Replacement:
    """Return the VAE that a request names. It is in a file of its own, or in another model with the same latent space.

    Raises RequestError for a VAE with other latents, and IntegrityError if its digest is not the requested one.
    """
    try:
        found = _find_vae_by_name(request.vae, model, catalog, by_path)
    except InputError:
        found = _find_vae_by_digest(request.vae_digest, catalog, by_path)
        if found is None:
            raise
    component = found.component
    if request.vae_digest and component.digest != request.vae_digest:
        problem = f"the VAE {request.vae} has other content than {request.vae_digest[:10]}"
        raise IntegrityError(component.tensors[0].path, "", problem, _OTHER_CONTENT_REMEDY)
    if not model.family.same_latents(component.config, model.manifest.component(model.family.vae).config):
        raise RequestError("vae", request.vae, f"its latents are not those of {model.name}")
    return found


def _component_of_adapter(adapter: Adapter) -> Replacement:
    part = adapter.component
    return Replacement(part, ComponentReference(part.role, part.digest, "adapter", adapter.digest))


def component_of_model(model: Model, role: str) -> Replacement:
    """Return the component of another model as a replacement."""
    part = model.manifest.component(role)
    return Replacement(part, ComponentReference(part.role, part.digest, "model", model.digest))


def _find_vae_by_name(name: str, model: Model, catalog: Catalog, by_path: bool) -> Replacement:
    alone = _find_vae_file(name, catalog.adapters, by_path)
    if alone is not None:
        if alone.base and not _shares_latent_space(alone.base, model):
            raise RequestError("vae", name, f"is a VAE for {alone.base}; {model.name} is {model.base}")
        return _component_of_adapter(catalog.adapters.ensure_unchanged(alone))
    source_model = _find_model_with_vae(name, catalog.library, catalog.adapters, by_path)
    if not _shares_latent_space(source_model.base, model):
        raise RequestError("vae", name, f"is the VAE of a {source_model.base} model; {model.name} is {model.base}")
    return component_of_model(catalog.library.ensure_unchanged(source_model), source_model.family.vae)


def _shares_latent_space(base: str, model: Model) -> bool:
    """Return whether VAEs of the family ``base`` have the latents of the model's family."""
    other = families().get(base)
    return other is not None and other.latent_space == model.family.latent_space


def _find_vae_by_digest(digest: str, catalog: Catalog, by_path: bool) -> Replacement | None:
    """Return the VAE with this digest among the files that were used by their paths; None if there is none.

    The metadata of an image contains the names of files, but not their paths.
    """
    if not digest or not by_path:
        return None
    adapters, library = catalog.adapters, catalog.library
    alone = (
        _component_of_adapter(adapters.ensure_unchanged(one))
        for one in adapters.adapters_used_by_path()
        if one.kind == VAE
    )
    models = (
        component_of_model(one, one.family.vae) for one in library.records.used_by_path() if one.base in families()
    )
    return next((part for part in (*alone, *models) if part.component.digest == digest), None)


def _find_model_with_vae(name: str, library: Library, adapters: Adapters, by_path: bool) -> Model:
    try:
        return library.find(name) if by_path else library.get(name)
    except ModelNotFoundError as error:
        known = [card.name for card in adapters.cards() if card.kind == VAE]
        raise ModelNotFoundError(name, [*paths.similar_names(name, known), *error.near], "VAE") from error


def _find_vae_file(name: str, adapters: Adapters, by_path: bool) -> Adapter | None:
    """Return the VAE with this name or path that has a file of its own; None if there is none."""
    try:
        found = adapters.find(name) if by_path else adapters.get(name)
    except (ModelNotFoundError, UnsupportedModelError):
        return None
    if found.kind != VAE:
        raise RequestError("vae", name, f"is a {found.kind}, not a VAE")
    return found


def find_text_encoders(request: Request, model: Model, library: Library, by_path: bool) -> tuple[Replacement, ...]:
    """Return the text encoders of the model that the request names as ``text_encoder``.

    Raises RequestError for a model of another family or of other widths, and IntegrityError if the digest of its text
    encoders is not the requested one.
    """
    name = request.text_encoder
    source_model = library.ensure_unchanged(_find_encoder_model(request, library, by_path))
    if source_model.base != model.base:
        raise RequestError("text_encoder", name, f"is of {source_model.base}; {model.name} is {model.base}")
    found = tuple(component_of_model(source_model, role) for role in source_model.family.text_encoders)
    components = [part.component for part in found]
    odd = [c.role for c in components if c.config != model.manifest.component(c.role).config]
    if odd:
        raise RequestError("text_encoder", name, f"its {odd[0]} is not like that of {model.name}")
    if request.text_encoder_digest and hash_components(components) != request.text_encoder_digest:
        problem = f"the text encoders of {name} have other content than {request.text_encoder_digest[:10]}"
        raise IntegrityError(source_model.path, "", problem, _OTHER_CONTENT_REMEDY)
    return found


def find_refiner(request: Request, library: Library, by_path: bool) -> Model | None:
    """Return the model that computes the last steps; None without one.

    Raises IntegrityError if its digest is not the requested one.
    """
    name, digest = request.refiner, request.refiner_digest
    if not name:
        return None
    try:
        found = library.find(name) if by_path else library.get(name)
    except InputError:
        found = next(library.records.used_by_path(digest), None) if digest and by_path else None
        if found is None:
            raise
    if digest and found.digest != digest:
        problem = f"the refiner {name} has other content than {digest[:10]}"
        raise IntegrityError(found.path, "", problem, _OTHER_CONTENT_REMEDY)
    if found.base not in families():
        raise RequestError("refiner", name, f"is a {found.base}, which this version cannot compute")
    return library.ensure_unchanged(found)


def _find_encoder_model(request: Request, library: Library, by_path: bool) -> Model:
    """Return the model with the requested name.

    If there is none, return the one that was used by its path and whose text encoders have the requested digest.
    """
    name = request.text_encoder
    try:
        return library.find(name) if by_path else library.get(name)
    except InputError:
        for one in library.records.used_by_path() if request.text_encoder_digest and by_path else ():
            if hash_components(_encoders(one)) == request.text_encoder_digest:
                return one
        raise


def _encoders(model: Model) -> tuple[ComponentManifest, ...]:
    return tuple(model.manifest.component(role) for role in model.family.text_encoders)


def hash_components(components: Sequence[ComponentManifest]) -> str:
    """Return one digest for several components."""
    return hash_texts(*(component.digest for component in components))


def find_controlnet(control: Control, model: Model, adapters: Adapters, by_path: bool) -> Adapter:
    """Return the ControlNet that a request names. Raises RequestError if it was made for another kind of UNet."""
    if control.digest:
        found = adapters.find_by_digest(control.name, control.digest, by_path)
    else:
        found = adapters.ensure_unchanged(adapters.find(control.name) if by_path else adapters.get(control.name))
    if found.kind != CONTROLNET:
        raise RequestError("controls", control.name, f"is a {found.kind}, not a ControlNet")
    problem = model.family.find_controlnet_mismatch(
        found.component.config, model.manifest.component(model.family.denoiser).config
    )
    if problem:
        raise RequestError("controls", control.name, problem.replace("{model}", f"{model.name} ({model.base})"))
    if control.mode not in model.family.control_modes:
        able = ", ".join(mode for mode in CONTROL_MODES if mode in model.family.control_modes)
        raise RequestError(
            "controls", control.mode, f"{control.name}: ControlNets for {model.base} have the mode {able}"
        )
    return found


def union_type(control: Control, net: Adapter, model: Model) -> str:
    """Return the type of the picture for a union of ControlNets; "" for another ControlNet.

    Raises RequestError if the union does not know the type, and if the request names none.
    """
    known = net.component.config.union_types
    if not known:
        if control.union_type:
            problem = f"{control.name} reads one type of pictures; leave union_type out"
            raise RequestError("controls", control.union_type, problem)
        return ""
    chosen = control.union_type or (control.preprocessor if control.preprocessor in known else "")
    if chosen not in known:
        what = f"{control.name} ({model.base}) reads several types of pictures"
        raise RequestError("controls", control.union_type, f"{what}; union_type must be one of {', '.join(known)}")
    return chosen
