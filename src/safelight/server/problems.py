"""Errors as HTTP answers: a status, and a body in the form of the API to which the request belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from safelight.errors import ModelNotFoundError, RequestError, SafelightError, answer_to
from safelight.queue.job import FAILURES, QueuedJob

T = TypeVar("T")


class Problem(BaseModel):
    """An error. ``error``: its kind; ``field``: the field of the request that caused it, if any."""

    error: str
    message: str
    field: str | None = None
    near: list[str] = Field(default=[], description="the most similar names that exist")


class RefusedError(SafelightError):
    """The server refuses a request, for a reason that only a server has.

    ``status``: the HTTP status.
    ``kind``, ``field``: as in :class:`Problem`.
    ``final``: clients must not send the request again by themselves, as OpenAI's do for some statuses.
    """

    def __init__(self, status: int, kind: str, message: str, field: str | None = None, final: bool = False) -> None:
        super().__init__(message)
        self.status, self.kind, self.field, self.final = status, kind, field, final


def found(thing: T | None, what: str, name: str) -> T:
    """Return ``thing``. Raises RefusedError (404) when it is None; ``what`` and ``name`` are for the message."""
    if thing is None:
        raise RefusedError(404, "not_found", f"there is no {what} {name}")
    return thing


def of_job(job: QueuedJob) -> RefusedError:
    """Return the error for a client that waited for a job which failed or was cancelled."""
    if job.state == "failed":
        _, status, kind = answer_to(FAILURES.get(job.failure, SafelightError))
        return RefusedError(status, kind, job.reason, final=True)
    return RefusedError(409, job.state, job.reason, final=True)


KINDS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
}
"""The kinds of the errors that need no error class: the access check and the framework answer so."""

OPENAI, A1111 = "/v1/", ("/sdapi/", "/controlnet/", "/internal/")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of a route for OpenAPI: these statuses, and those that every route can answer."""
    what = {
        400: "The body is malformed",
        401: "The key is missing or wrong",
        403: "The server does not allow this host, site or folder",
        404: "Not found",
        409: "The state or content does not allow this",
        413: "The body is too large",
        422: "A field has a value that is not allowed",
        429: "The queue is full, or there were too many tries with a password",
        503: "The worker is not ready",
        507: "A disk is full or cannot be written",
    }
    every = sorted({400, 401, 403, 413, 422, 507, *statuses})
    return {status: response(Problem, what[status]) for status in every}


def response(model: type[BaseModel], description: str) -> dict[str, Any]:
    """Describe an error response for OpenAPI.

    ``model``: the model of its body. The application must pass it to :func:`schemas`, too.

    The routes refer to the model by name. If they had the model itself, FastAPI would build it for every route and
    status, which takes half of the time of the server's start.
    """
    body = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    return {"description": description, "content": {"application/json": body}}


def schemas(*models: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI components of the models of error responses."""
    _, found = models_json_schema(
        [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
    )
    return found["$defs"]


def answer(path: str, status: int, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer with the problem, in the form of the API to which ``path`` belongs."""
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
    """Register the handlers that turn every error into an answer."""

    def ours(request: Request, error: Exception) -> Response:
        path = request.url.path
        if isinstance(error, RefusedError):
            headers = {"x-should-retry": "false"} if error.final else None
            return answer(path, error.status, Problem(error=error.kind, message=str(error), field=error.field), headers)
        assert isinstance(error, SafelightError)
        _, status, kind = answer_to(type(error))
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
        problem = Problem(error=KINDS.get(error.status_code, "failed"), message=str(error.detail))
        return answer(request.url.path, error.status_code, problem, error.headers)

    app.add_exception_handler(SafelightError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
