"""The engine of a server that runs elsewhere, over HTTP: the same protocol as that of this process. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from PIL import Image as PILImage

from safelight.engine.base import ignore
from safelight.errors import Cancelled, InputError, IntegrityError, ModelNotFoundError, SafelightError
from safelight.prompts.variants import escaped
from safelight.request.results import Image, OnProgress, Progress, Seconds
from safelight.request.schema import Request

TIMEOUT = httpx.Timeout(30.0, read=120.0)
"""Seconds. A stream of events is never silent for long: the server says that it is still there."""


class ServerEngine:
    """``url``: where the server is; ``key``: its key, if it wants one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self._url = url.rstrip("/")
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=TIMEOUT)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise InputError(f"--server {url}: is not an address ({error})") from error

    def close(self) -> None:
        self._client.close()

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """See :class:`safelight.engine.base.Engine`; InputError also when the server cannot be reached or refuses the
        key. When the caller stops, so does the job."""
        with self._reached():
            # Its choices are made already: what is left of braces is text, to the server too.
            text = {"prompt": escaped(request.prompt), "negative": escaped(request.negative)}
            body = {name: value for name, value in (asdict(request) | text).items() if value is not None}
            job = _answer(self._client.post("/api/v1/generate", json=body))["id"]
            over, images, place = False, 0, 0
            try:
                for kind, data in self._events(job):
                    if kind == "progress":
                        on_progress(Progress(data["stage"], data["image"], data["step"], data["steps"]))
                    over = kind == "job" and data["ended"] is not None
                    # What was finished before anybody listened is not told again: the list has it.
                    if over or kind == "image":
                        for told in _answer(self._client.get(f"/api/v1/jobs/{job}/images")):
                            if told["place"] >= place:
                                images, place = images + 1, told["place"] + 1
                                yield self._image(told)
                    if over:
                        _raise_unless_done(data)
                        break
                else:
                    raise SafelightError(f"the server at {self._url} stopped telling of its job before it ended")
            finally:
                if not over:
                    with contextlib.suppress(httpx.TransportError):
                        self._client.post(f"/api/v1/jobs/{job}/cancel")
            if images < request.count:
                raise SafelightError(f"{request.count - images} images of the server's job were removed meanwhile")

    @contextmanager
    def _reached(self) -> Generator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise InputError(f"the server at {self._url} cannot be reached ({error})") from error

    def _events(self, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._client.stream("GET", "/api/v1/events", params={"job": job}) as stream:
            if not stream.is_success:
                stream.read()
                _answer(stream)
            kind = ""
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)

    def _image(self, told: Mapping[str, Any]) -> Image:
        answer = self._client.get(told["url"])
        if not answer.is_success:
            _answer(answer)
        with PILImage.open(io.BytesIO(answer.content)) as picture:
            pixels = picture.convert("RGB").tobytes()
        received = hashlib.sha256(pixels).hexdigest()
        if received != told["pixels_sha256"]:
            remedy = "Ask for it again; if it stays so, something between here and the server changes pictures."
            problem = f"arrived with other pixels ({received[:16]}) than were made ({told['pixels_sha256'][:16]})"
            raise IntegrityError(Path(told["url"]), "", problem, remedy)
        metadata = dict(told["metadata"])
        made = metadata.pop("made")
        return Image(
            pixels=pixels,
            width=told["width"],
            height=told["height"],
            seed=told["seed"],
            model=told["model"],
            model_digest=told["model_digest"],
            pixels_sha256=told["pixels_sha256"],
            seconds=Seconds(**made["seconds"]),
            host_peak_bytes=made["host_peak_bytes"],
            metadata=metadata,
            warnings=tuple(made["warnings"]),
        )


def _answer(answer: httpx.Response) -> Any:
    """The body of an answer. Raises what the server meant."""
    if answer.is_success:
        return answer.json()
    try:
        problem = answer.json()
        kind, message = problem["error"], problem["message"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"the server answered with status {answer.status_code}, not as Safelight does") from None
    if kind == "model_not_found":
        raise ModelNotFoundError(message.partition("'")[2].partition("'")[0], problem["near"])
    if answer.status_code < 500:
        raise InputError(f"the server refused: {message}")
    raise SafelightError(f"the server failed: {message}")


def _raise_unless_done(job: Mapping[str, Any]) -> None:
    if job["state"] == "cancelled":
        raise Cancelled
    if job["state"] == "failed" and job.get("failure") == "input":
        raise InputError(f"the server's job failed: {job['reason']}")
    if job["state"] == "failed":
        raise SafelightError(f"the server's job failed: {job['reason']}")
