"""Jobs for tests that compute nothing, and for tests that have a library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safelight.catalog.catalog import Catalog
from safelight.request.job import Job, ModelReference
from safelight.request.schema import Request
from safelight.resolve.resolve import resolve


def made_up(request: Request, digest: str) -> Job:
    """A job of a model that no library has."""
    return Job(request, ModelReference(request.model, digest, "sd1", "epsilon", False, {}))


def resolved(root: Path, request: Request, digest: str = "") -> Job:
    """The job of a request. ``digest``: replaces the model's, if it is given."""
    job = resolve(request, Catalog.under(root))
    return replace(job, model=replace(job.model, digest=digest)) if digest else job


def small(model: Path, **changes: object) -> Request:
    """Return a request for one of the tiny checkpoints, of two steps and 64 by 64 pixels."""
    values: dict[str, object] = {"prompt": "red apple", "steps": 2, "width": 64, "height": 64, **changes}
    return Request(model=str(model), **values)  # type: ignore[arg-type]
