"""Finds the contents of a job by their digests alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from safelight.catalog.catalog import Catalog
from safelight.catalog.library import Library
from safelight.catalog.model import Adapter, Model
from safelight.errors import IntegrityError
from safelight.request.job import ComponentReference, Job
from safelight.request.schema import Request
from safelight.resolve.adapters import ResolvedLora, resolve_lora
from safelight.resolve.inversions import Inversion, tensor_names_by_encoder
from safelight.resolve.resolve import model_reference, with_defaults
from safelight.weights.manifest import ComponentManifest


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a job.

    ``loras``: LoRAs and relatives, and what they change.
    ``replacements``: components that replace the model's own.
    ``controls``: ControlNets, in the order of the request.
    ``inversions``: words of the prompts that stand for vectors.
    ``refiner``: the model that computes the last steps; None without one.
    """

    job: Job
    model: Model
    loras: tuple[ResolvedLora, ...] = ()
    replacements: tuple[ComponentManifest, ...] = ()
    controls: tuple[Adapter, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    refiner: Model | None = None

    @classmethod
    def plain(cls, request: Request, model: Model) -> Contents:
        """Return the contents of a request that names nothing but its model. The model's defaults fill in the rest."""
        return cls(Job(with_defaults(request, model), model_reference(model)), model)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters whose files the job needs."""
        return (*(one.adapter for one in self.loras), *self.controls, *(one.adapter for one in self.inversions))


def find_contents(job: Job, catalog: Catalog, model: Model) -> Contents:
    """Find the contents of a job. ``model``: has the job's digest. Raises IntegrityError if any content is gone."""
    request = job.request
    loras = tuple(resolve_lora(lora, model, catalog.adapters, True, request.lenient) for lora in request.loras)
    controls = tuple(catalog.adapters.find_by_digest(control.name, control.digest) for control in request.controls)
    inversions = tuple(
        Inversion(adapter, embedding, job.words[embedding.word], tensor_names_by_encoder(embedding, adapter, model))
        for embedding in request.embeddings or ()
        for adapter in (catalog.adapters.find_by_digest(embedding.name, embedding.digest),)
    )
    replacements = tuple(_find_part(part, catalog) for part in job.parts)
    refiner = None
    if job.refiner is not None:
        refiner = catalog.library.ensure_unchanged(find_model(job.refiner.name, job.refiner.digest, catalog.library))
    return Contents(job, model, loras, replacements, controls, inversions, refiner)


def _find_part(part: ComponentReference, catalog: Catalog) -> ComponentManifest:
    found = catalog.component(part.digest)
    if found is None:
        problem = f"no model and no adapter has a component of the content {part.digest[:10]}"
        remedy = "It was changed or removed. Add the file that has it with `safelight models add` or `adapters add`."
        raise IntegrityError(Path(part.role), "", problem, remedy)
    return found


def find_model(name: str, digest: str, library: Library) -> Model:
    """Find a model by its content; the one called ``name`` comes first. Raises IntegrityError if there is none."""
    named = (library.find_by_name(card.name) for card in library.cards() if card.digest == digest)
    # Evaluated lazily, because each look-up reads a record file.
    for model in chain((library.find_by_name(name),), named, library.records.used_by_path(digest)):
        if model is not None and model.digest == digest:
            return model
    remedy = "It was changed or removed. Add the model with this content with `safelight models add`."
    raise IntegrityError(Path(name), "", f"no model has the content {digest[:10]}", remedy)
