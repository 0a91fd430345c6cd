"""Errors as answers: a status, and a body in the form of the API that was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from safelight.errors import (
    DeviceLostError,
    FileError,
    IntegrityError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
    SafelightError,
    StorageError,
    WorkerDiedError,
)
from safelight.jobs.job import Failure, Job


class Problem(BaseModel):
    """What went wrong. ``error``: its kind; ``field``: of the request, where it is about one."""

    error: str
    message: str
    field: str | None = None
    near: list[str] = Field(default=[], description="names that were perhaps meant")


class RefusedError(SafelightError):
    """A request that is not answered, with the HTTP ``status`` that says so."""

    def __init__(self, status: int, kind: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.field = status, kind, field


_STATUS: tuple[tuple[type[SafelightError], int, str], ...] = (
    (ModelNotFoundError, 404, "model_not_found"),
    (StorageError, 507, "storage"),
    (RequestError, 422, "invalid_request"),
    (FileError, 422, "bad_file"),
    (QueueFullError, 429, "queue_full"),
    (IntegrityError, 409, "integrity"),
    (OutOfMemoryError, 409, "out_of_memory"),
    (WorkerDiedError, 503, "worker_not_ready"),
    (DeviceLostError, 503, "device_lost"),
    (SafelightError, 500, "failed"),
)

FAILURES: Mapping[Failure, tuple[int, str]] = {
    "input": (422, "invalid_request"),
    "device": (503, "device_lost"),
    "storage": (507, "storage"),
    "worker": (503, "worker_not_ready"),
}
"""Status and kind for a job that failed so; 500 for any other."""


def of_job(job: Job) -> RefusedError:
    """The answer to who waited for a job that did not end well."""
    if job.state == "failed":
        status, kind = FAILURES.get(job.failure, (500, "failed"))
        return RefusedError(status, kind, job.reason)
    return RefusedError(409, job.state, job.reason)


_KINDS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
}

OPENAI, A1111 = "/v1/", ("/sdapi/", "/controlnet/", "/internal/")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: these statuses answer with a :class:`Problem`, beside those that every request may meet."""
    what = {
        400: "The body is not what it should be",
        401: "The key is missing or wrong",
        403: "Not from here",
        404: "There is no such thing",
        409: "It is not as it should be",
        413: "The body is too large",
        422: "A field is not allowed",
        429: "Too many jobs wait",
        503: "The worker is not ready",
        507: "A disk is full, or cannot be written",
    }
    every = sorted({400, 401, 403, 413, 422, 507, *statuses})
    return {status: {"model": Problem, "description": what[status]} for status in every}


def answer(path: str, status: int, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The problem in the form that clients of the API of ``path`` read."""
    if path.startswith(OPENAI):
        kind = "invalid_request_error" if status < 500 else "server_error"
        body: dict[str, Any] = {
            "error": {"message": problem.message, "type": kind, "param": problem.field, "code": problem.error}
        }
    elif path.startswith(A1111):
        body = {"error": problem.error, "detail": problem.message, "body": "", "errors": problem.message}
    else:
        body = problem.model_dump()
    return JSONResponse(body, status, headers)


def install(app: FastAPI) -> None:
    """Have every error answered."""

    def ours(request: Request, error: Exception) -> Response:
        path = request.url.path
        if isinstance(error, RefusedError):
            return answer(path, error.status, Problem(error=error.kind, message=str(error), field=error.field))
        status, kind = next((status, kind) for of, status, kind in _STATUS if isinstance(error, of))
        field = error.field if isinstance(error, RequestError) else None
        near = list(error.near) if isinstance(error, ModelNotFoundError) else []
        return answer(path, status, Problem(error=kind, message=str(error), field=field, near=near))

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        field = ".".join(where) or None
        kind = "not_json" if first["type"] == "json_invalid" else "invalid_request"
        message = f"{field or 'the body'}: {first['msg']}"
        return answer(request.url.path, 422, Problem(error=kind, message=message, field=field))

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        problem = Problem(error=_KINDS.get(error.status_code, "failed"), message=str(error.detail))
        return answer(request.url.path, error.status_code, problem, error.headers)

    app.add_exception_handler(SafelightError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
