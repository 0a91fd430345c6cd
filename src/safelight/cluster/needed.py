"""What a machine needs for a job: the records of its models and adapters, and its input images. No torch."""

from __future__ import annotations

import json
import threading
import zlib
from collections import OrderedDict
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

    ``packed``: its record, as :func:`safelight.catalog.records.stored_values` returns it: JSON, compressed.
    ``files``: those of its manifest, in its order.
    """

    kind: str
    digest: str
    packed: bytes
    files: tuple[NeededFile, ...]

    @property
    def values(self) -> dict[str, Any]:
        """The record's values."""
        return json.loads(zlib.decompress(self.packed))


@dataclass(frozen=True, slots=True)
class Needed:
    """Everything that a job needs. ``inputs``: input images as PNG files, by digest."""

    records: tuple[NeededRecord, ...]
    inputs: Mapping[str, bytes]


class Packer:
    """Finds what jobs need. It packs the record of a model or an adapter once: a record lists every tensor.

    Several threads may use it.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._packed: OrderedDict[str, tuple[Model | Adapter, NeededRecord]] = OrderedDict()
        self._lock = threading.Lock()

    def needed_for(self, job: Job) -> Needed:
        """Return what a job needs.

        Raises IntegrityError if any content of the job is gone or changed.
        """
        owners = _owners(job, self._catalog)
        inputs = {digest: self._catalog.inputs.read(digest) for _, digest in pictures_of(job.request)}
        return Needed(tuple(self._record(owner) for owner in owners.values()), inputs)

    def _record(self, owner: Model | Adapter) -> NeededRecord:
        with self._lock:
            known = self._packed.get(owner.digest)
        # The catalog returns the same object until the record changes.
        record = known[1] if known is not None and known[0] is owner else _pack(owner)
        with self._lock:
            self._packed[owner.digest] = owner, record
            self._packed.move_to_end(owner.digest)
            while len(self._packed) > KEPT:
                self._packed.popitem(last=False)
        return record


KEPT = 64
"""How many records stay packed."""


def _owners(job: Job, catalog: Catalog) -> dict[str, Model | Adapter]:
    """Return the models and adapters that a job uses, by digest."""
    model = catalog.library.ensure_unchanged(find_model(job.model.name, job.model.digest, catalog.library))
    contents = find_contents(job, catalog, model)
    owners: list[Model | Adapter] = [model, *contents.adapters]
    owners += [] if contents.refiner is None else [contents.refiner]
    owners += [owner for part in job.parts if (owner := catalog.owner(part.digest)) is not None]
    return {owner.digest: owner for owner in owners}


def _pack(owner: Model | Adapter) -> NeededRecord:
    files = tuple(
        NeededFile(str(stamp.path), -1 if stamp.path.is_dir() else stamp.size) for stamp in owner.manifest.files
    )
    packed = zlib.compress(json.dumps(records.stored_values(owner)).encode())
    return NeededRecord("model" if isinstance(owner, Model) else "adapter", owner.digest, packed, files)
