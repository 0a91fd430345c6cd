"""Parses the JSON documents of jobs that the database stores, and caches the most recent ones."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

from safelight.errors import RequestError, SafelightError
from safelight.request.job import Job, is_resolved
from safelight.request.schema import Request
from safelight.request.stored import read_request

Document = tuple[Request, Job | None, str]
"""The request, the job, and why this version cannot read them. The job of a version that stored only requests is None.
"""

MOST_CACHED = 512
"""Documents in the cache, each of some kilobytes. The server reads a job several times between its arrival and its end,
and parsing takes longer than the query."""

_lock = threading.Lock()
_cached: OrderedDict[str, tuple[Mapping[str, Any], Document]] = OrderedDict()


def parse(job_id: str, document: Mapping[str, Any]) -> Document:
    """Parse the document of a job, or take it from the cache if it has not changed.

    This version cannot read a job of a newer version, or one with a value that is no longer allowed. Then the request
    is a stand-in with the prompt and the model, and the job is None.
    """
    with _lock:
        cached = _cached.get(job_id)
    if cached is not None and cached[0] == document:
        return cached[1]
    found = _parse(document)
    _store(job_id, document, found)
    return found


def remember(job_id: str, document: Mapping[str, Any], job: Job) -> None:
    """Put the document of a new job into the cache."""
    # The database returns lists where a document has tuples.
    _store(job_id, json.loads(json.dumps(document)), (job.request, job, ""))


def model_of(job_id: str) -> str | None:
    """Return the name of a job's model, if the cache has it. A job's model never changes."""
    with _lock:
        cached = _cached.get(job_id)
    return None if cached is None else cached[1][0].model


def _store(job_id: str, document: Mapping[str, Any], parsed: Document) -> None:
    with _lock:
        _cached[job_id] = document, parsed
        _cached.move_to_end(job_id)
        while len(_cached) > MOST_CACHED:
            _cached.popitem(last=False)


def _parse(document: Mapping[str, Any]) -> Document:
    try:
        if is_resolved(document):
            job = Job.from_json(document)
            return job.request, job, ""
        return read_request(document["request"], document["version"]), None, ""
    except (SafelightError, KeyError, TypeError, ValueError, AttributeError) as error:
        stored: Any = document.get("request")
        known = cast("Mapping[str, Any]", stored) if isinstance(stored, Mapping) else {}
        prompt, model = (known.get(name) for name in ("prompt", "model"))
        why = str(error) if isinstance(error, SafelightError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RequestError):
            return Request(str(prompt or ""), str(model or "")), None, why
        return Request("", ""), None, why
