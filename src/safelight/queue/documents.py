"""Reads the documents of jobs, as the database stores them. Those that were read last stay read."""

from __future__ import annotations

import contextlib
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

DOCUMENTS = 64
"""Documents that stay read. A job is read some eight times between its arrival and its end, and to read its document
takes longer than the query for its row."""

_lock = threading.Lock()
_known: OrderedDict[str, tuple[Mapping[str, Any], Document]] = OrderedDict()


def read(job_id: str, document: Mapping[str, Any]) -> Document:
    """Read the document of a job.

    This version cannot read a job of a newer version, or one with a value that is no longer allowed. Then the request
    is a stand-in with the prompt and the model, and the job is None.
    """
    with _lock:
        known = _known.get(job_id)
    if known is not None and known[0] == document:
        return known[1]
    found = _read(document)
    with _lock:
        _known[job_id] = document, found
        _known.move_to_end(job_id)
        while len(_known) > DOCUMENTS:
            _known.popitem(last=False)
    return found


def _read(document: Mapping[str, Any]) -> Document:
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
