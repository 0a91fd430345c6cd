"""The Engine protocol over HTTP: a Safelight server elsewhere makes the images. No torch."""

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

from safelight.errors import ANSWERS, Cancelled, InputError, IntegrityError, ModelNotFoundError, SafelightError
from safelight.request.prompts.variants import escaped
from safelight.request.results import Image, OnProgress, Progress, Seconds
from safelight.request.schema import Request
from safelight.workers.engine import ignore

TIMEOUT = httpx.Timeout(30.0, read=120.0)
"""Seconds. The server sends keep-alive messages, so a stream of events is never silent for long."""


class ServerEngine:
    """Makes images on a Safelight server. ``url``: its address. ``key``: its API key, if it requires one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self._url = url.rstrip("/")
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=TIMEOUT)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise InputError(f"--server {url} is not a valid address ({error})") from error

    def close(self) -> None:
        self._client.close()

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """See :class:`safelight.workers.engine.Engine`.

        When the caller closes the iterator, the server cancels the job.

        Raises InputError also when the server cannot be reached or refuses the key.
        """
        with self._reachable():
            # This process has already expanded the choices in the prompts. The remaining braces are text.
            text = {"prompt": escaped(request.prompt), "negative": escaped(request.negative)}
            body = {name: value for name, value in (asdict(request) | text).items() if value is not None}
            # Each job has a part of the images, in order. A server with several slots makes them at the same time.
            jobs: list[str] = _read_body(self._client.post("/api/v1/generate", json={**body, "spread": True}))["jobs"]
            images = 0
            try:
                while jobs:
                    for image in self._images(jobs[0], images, on_progress):
                        images += 1
                        yield image
                    del jobs[0]
            finally:
                for job in jobs:
                    # This does not change a job that has ended.
                    with contextlib.suppress(httpx.TransportError):
                        self._client.post(f"/api/v1/jobs/{job}/cancel")
            if images < request.count:
                missing = request.count - images
                raise SafelightError(f"the server removed {missing} images of the job before they were fetched")

    def _images(self, job: str, before: int, on_progress: OnProgress) -> Iterator[Image]:
        """Yield the images of a job until it has ended. ``before``: the number of images of the jobs before it."""
        place = 0
        for kind, data in self._events(job):
            if kind == "progress":
                on_progress(Progress(data["stage"], before + data["image"], data["step"], data["steps"]))
            ended = kind == "job" and data["ended"] is not None
            # The server sends no events for images that it finished before this stream began. The list has them.
            if ended or kind == "image":
                for entry in _read_body(self._client.get(f"/api/v1/jobs/{job}/images")):
                    if entry["place"] >= place:
                        place = entry["place"] + 1
                        yield self._fetch_image(entry)
            if ended:
                _raise_unless_done(data)
                return
        raise SafelightError(f"the server at {self._url} closed the stream of events before the job ended")

    @contextmanager
    def _reachable(self) -> Generator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise InputError(f"the server at {self._url} cannot be reached ({error})") from error

    def _events(self, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._client.stream("GET", "/api/v1/events", params={"job": job}) as stream:
            if not stream.is_success:
                stream.read()
                _read_body(stream)
            kind = ""
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)

    def _fetch_image(self, entry: Mapping[str, Any]) -> Image:
        response = self._client.get(entry["url"])
        if not response.is_success:
            _read_body(response)
        with PILImage.open(io.BytesIO(response.content)) as picture:
            pixels = picture.convert("RGB").tobytes()
        received = hashlib.sha256(pixels).hexdigest()
        if received != entry["pixels_sha256"]:
            remedy = "Fetch it again. If the error persists, something between here and the server changes images."
            sent = entry["pixels_sha256"]
            problem = f"the received pixels ({received[:16]}) differ from those that the server made ({sent[:16]})"
            raise IntegrityError(Path(entry["url"]), "", problem, remedy)
        metadata = dict(entry["metadata"])
        details = metadata.pop("made")
        return Image(
            pixels=pixels,
            width=entry["width"],
            height=entry["height"],
            seed=entry["seed"],
            model=entry["model"],
            model_digest=entry["model_digest"],
            pixels_sha256=entry["pixels_sha256"],
            seconds=Seconds(**details["seconds"]),
            host_peak_bytes=details["host_peak_bytes"],
            metadata=metadata,
            warnings=tuple(details["warnings"]),
        )


def _read_body(response: httpx.Response) -> Any:
    """Parse the body of a response. An error response raises the matching exception."""
    if response.is_success:
        return response.json()
    try:
        problem = response.json()
        kind, message = problem["error"], problem["message"]
    except (ValueError, KeyError, TypeError):
        status = response.status_code
        raise InputError(f"the server answered with status {status}; it is not a Safelight server") from None
    if kind == "model_not_found":
        raise ModelNotFoundError(message.partition("'")[2].partition("'")[0], problem["near"])
    refused = response.status_code < 500
    message = f"the server {'refused the request' if refused else 'failed'}: {message}"
    # A kind that is not in the table comes from the access check, such as a wrong key.
    codes = {answer.exit_code for answer in ANSWERS.values() if answer.kind == kind} or {2}
    raise InputError(message) if refused and codes == {2} else SafelightError(message)


def _raise_unless_done(job: Mapping[str, Any]) -> None:
    if job["state"] == "cancelled":
        raise Cancelled
    if job["state"] == "failed" and job.get("failure") == "input":
        raise InputError(f"the server's job failed: {job['reason']}")
    if job["state"] == "failed":
        raise SafelightError(f"the server's job failed: {job['reason']}")
