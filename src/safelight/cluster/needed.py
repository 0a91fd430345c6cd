"""What a machine needs for a job: the records of its models and adapters, and its input images. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safelight.catalog import records
from safelight.catalog.catalog import Catalog
from safelight.catalog.model import Adapter, Model
from safelight.request.input_pictures import pictures_of
from safelight.request.job import Job
from safelight.resolve.contents import find_contents, find_model


@dataclass(frozen=True, slots=True)
class NeededFile:
    """A file of a record. ``path``: where the server has it. ``size``: in bytes; -1 for a folder."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class NeededRecord:
    """A model or an adapter.

    ``values``: its record, as :func:`safelight.catalog.records.stored_values` returns it.
    ``files``: those of its manifest, in its order.
    """

    kind: str
    digest: str
    values: Mapping[str, Any]
    files: tuple[NeededFile, ...]


@dataclass(frozen=True, slots=True)
class Needed:
    """Everything that a job needs. ``inputs``: input images as PNG files, by digest."""

    records: tuple[NeededRecord, ...]
    inputs: Mapping[str, bytes]


def needed_for(job: Job, catalog: Catalog) -> Needed:
    """Return what a job needs.

    Raises IntegrityError if any content of the job is gone or changed.
    """
    model = catalog.library.ensure_unchanged(find_model(job.model.name, job.model.digest, catalog.library))
    contents = find_contents(job, catalog, model)
    owners: list[Model | Adapter] = [model, *contents.adapters]
    owners += [] if contents.refiner is None else [contents.refiner]
    owners += [owner for part in job.parts if (owner := catalog.owner(part.digest)) is not None]
    found = {owner.digest: _record(owner) for owner in owners}
    inputs = {digest: catalog.inputs.read(digest) for _, digest in pictures_of(job.request)}
    return Needed(tuple(found.values()), inputs)


def _record(owner: Model | Adapter) -> NeededRecord:
    files = tuple(
        NeededFile(str(stamp.path), -1 if stamp.path.is_dir() else stamp.size) for stamp in owner.manifest.files
    )
    values = records.stored_values(owner)
    return NeededRecord("model" if isinstance(owner, Model) else "adapter", owner.digest, values, files)
