"""Safelight's own API under ``/api/v1``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Path as InPath
from fastapi import Request as HTTPRequest
from starlette.responses import FileResponse, Response, StreamingResponse

from safelight.assembly.services import Services
from safelight.errors import IntegrityError, WorkerDiedError
from safelight.queue.database import StoredImage
from safelight.queue.events import Event
from safelight.queue.job import QueuedJob, State
from safelight.request.schema import Request
from safelight.server import auth, bridge, intake
from safelight.server.apis.native_fields import (
    AdapterModel,
    Adding,
    CancelledModel,
    Checked,
    Generation,
    Health,
    ImageModel,
    JobModel,
    ModelModel,
    Place,
    Queue,
    ResidentModel,
    Verified,
)
from safelight.server.problems import RefusedError, documented
from safelight.workers.dispatcher import advanced, described, pictured
from safelight.workers.messages import Question

ALIVE_SECONDS = 15.0
"""Seconds between two comments in a stream of events. They show clients that the connection is alive."""

ANSWER_SECONDS = 120.0
"""Seconds that the server waits for an answer of the worker, for example while it loads a model."""

IMMUTABLE = "private, max-age=31536000, immutable"


JobId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="a job's identifier")]
ImageId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="an image's identifier")]
Limit = Annotated[int, Query(ge=1, le=1000)]


def router(control: Services) -> APIRouter:  # noqa: PLR0915 - a list of routes
    """Return the router with the routes of Safelight's own API."""
    api = APIRouter(prefix="/api/v1", responses=documented())
    database, dispatcher, library = control.database, control.dispatcher, control.library

    @api.post("/generate", status_code=202, tags=["jobs"], responses=documented(404, 429))
    def generate(asked: Generation) -> JobModel:
        """Queue a request, and return the job at once.

        If a prompt contains choices (``{a|b}``), each image is a job of its own, and the answer is the first job.
        """
        fields = asked.model_dump(exclude={"priority"})
        if fields["seed"] is None:
            fields["seed"] = intake.some_seed(fields["count"])
        return _job(intake.accept(control, Request(**fields), client="api", priority=asked.priority)[0])

    @api.get("/adapters", tags=["models"])
    def adapters() -> list[AdapterModel]:
        """List the adapters: LoRAs and their relatives, VAEs, ControlNets and textual inversions.

        LoRAs and their relatives are for ``loras``, and for ``<lora:name:strength>`` in a prompt.
        """
        return [AdapterModel(**found.summary) for found in control.catalog.adapters.cards()]

    @api.get("/jobs", tags=["jobs"])
    def jobs(
        state: Annotated[list[State] | None, Query()] = None,
        limit: Limit = 100,
        before: Annotated[int | None, Query(ge=0, le=2**53, description="only jobs with a smaller number")] = None,
    ) -> list[JobModel]:
        """List the jobs, the newest first."""
        return [_job(job) for job in database.jobs(state or (), limit, before)]

    @api.get("/jobs/{job_id}", tags=["jobs"], responses=documented(404))
    def one_job(job_id: JobId) -> JobModel:
        return _job(_found(database.job(job_id), "job", job_id))

    @api.get("/jobs/{job_id}/images", tags=["jobs"], responses=documented(404))
    def images_of(job_id: JobId) -> list[ImageModel]:
        _found(database.job(job_id), "job", job_id)
        return [_image(image) for image in database.images(1000, job=job_id)]

    @api.post("/jobs/{job_id}/cancel", tags=["jobs"], responses=documented(404))
    def cancel(job_id: JobId) -> CancelledModel:
        """Cancel a job. A waiting job ends at once, a running one at its next step."""
        _found(database.job(job_id), "job", job_id)
        return CancelledModel(cancelled=dispatcher.cancel(job_id))

    @api.get("/queue", tags=["jobs"])
    def queue(limit: Annotated[int, Query(ge=1, le=200)] = 50) -> Queue:
        """Return the running job, and the waiting jobs in their order, each with the reason for its place."""
        state = dispatcher.state
        return Queue(
            running=_job(state.job) if state is not None else None,
            progress=advanced(state.progress) if state is not None and state.progress is not None else None,
            waiting=[Place(job=_job(job), reason=reason) for job, reason in dispatcher.queue(limit)],
        )

    @api.get(
        "/events",
        tags=["jobs"],
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "events"}},
    )
    async def events(job: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")] = None) -> StreamingResponse:
        """Send server-sent events: ``job``, ``progress``, ``image``, ``removed`` (an image), ``memory``, ``worker``.

        With ``job``, send the events of this job until it ends; otherwise send all events.
        """
        return StreamingResponse(_stream(control, job), media_type="text/event-stream")

    @api.get("/images", tags=["images"])
    def images(
        limit: Limit = 100,
        before: Annotated[float | None, Query(description="only images from before this time")] = None,
        model: str | None = None,
    ) -> list[ImageModel]:
        """List the images, the newest first."""
        return [_image(image) for image in database.images(limit, before, model=model)]

    @api.get("/images/{image_id}", tags=["images"], responses=documented(404))
    def one_image(image_id: ImageId) -> ImageModel:
        return _image(_found(database.image(image_id), "image", image_id))

    @api.post("/images/{image_id}/check", tags=["images"], responses=documented(404, 409, 503))
    async def check(image_id: ImageId) -> Checked:
        """Make the image again in a fresh process, which has held no other model, and compare the pixels."""
        image = _found(await bridge.run(database.image, image_id), "image", image_id)
        found = await bridge.long(control.fresh.compared, image)
        return Checked(same=found.same, pixels_sha256=found.pixels_sha256)

    @api.delete("/images/{image_id}", tags=["images"], status_code=204, responses=documented(404))
    def forget(image_id: ImageId) -> Response:
        """Remove an image and its file."""
        if not dispatcher.forget(image_id):
            raise RefusedError(404, "not_found", f"there is no image {image_id}")
        return Response(status_code=204)

    png = {200: {"content": {"image/png": {}}, "description": "the file"}}

    @api.get(
        "/images/{image_id}/file", tags=["images"], response_class=FileResponse, responses={**png, **documented(404)}
    )
    def file(image_id: ImageId) -> FileResponse:
        """Return the PNG file, which contains the metadata."""
        image = _found(database.image(image_id), "image", image_id)
        return _sent(control.gallery.path(image.file), "image/png", image_id)

    webp = {200: {"content": {"image/webp": {}}, "description": "the thumbnail"}}

    @api.get(
        "/images/{image_id}/thumbnail",
        tags=["images"],
        response_class=FileResponse,
        responses={**webp, **documented(404)},
    )
    def thumbnail(image_id: ImageId) -> FileResponse:
        image = _found(database.image(image_id), "image", image_id)
        return _sent(control.gallery.thumbnail(image.file), "image/webp", image_id)

    @api.get("/models", tags=["models"])
    def models() -> list[ModelModel]:
        return [_model(control, card.name, card.summary) for card in library.cards()]

    @api.post("/models", tags=["models"], status_code=201, responses=documented())
    async def add(adding: Adding) -> ModelModel:
        """Add a checkpoint to the library: identify it, hash it and name it. Its file stays where it is."""
        path = _within(Path(adding.path), control.settings.model_folders)
        model = await bridge.long(library.add, path, adding.name, adding.prediction_type)
        return _model(control, model.name, model.summary())

    @api.get("/models/{name}", tags=["models"], responses=documented(404))
    def one_model(name: str) -> ModelModel:
        model = library.get(name)
        return _model(control, model.name, model.summary())

    @api.post("/models/{name}/verify", tags=["models"], responses=documented(404, 409))
    async def verify(name: str) -> Verified:
        """Read all bytes of the model's files again, and compare them with the manifest."""
        try:
            await bridge.long(library.verify, name)
        except IntegrityError as error:
            return Verified(ok=False, problem=str(error))
        return Verified(ok=True)

    async def ask_worker(what: Question, name: str) -> ResidentModel:
        model = await bridge.run(library.get, name)
        argument = model.digest if what == "unload" else model.name
        return ResidentModel(resident=await bridge.long(_wait, control.supervisor.ask(what, argument)))

    @api.post("/models/{name}/load", tags=["models"], responses=documented(404, 409, 503))
    async def load(name: str) -> ResidentModel:
        """Load a model into memory, as far as it fits."""
        return await ask_worker("load", name)

    @api.post("/models/{name}/unload", tags=["models"], responses=documented(404, 409, 503))
    async def unload(name: str) -> ResidentModel:
        """Evict a model from memory, unless a job uses it."""
        return await ask_worker("unload", name)

    @api.post("/models/{name}/pin", tags=["models"], responses=documented(404, 409, 503))
    async def pin(name: str) -> ResidentModel:
        """Load a model into memory and keep it there between jobs."""
        return await ask_worker("pin", name)

    @api.post("/models/{name}/unpin", tags=["models"], responses=documented(404, 409, 503))
    async def unpin(name: str) -> ResidentModel:
        return await ask_worker("unpin", name)

    @api.get("/memory", tags=["server"], responses=documented(409, 503))
    async def memory() -> dict[str, Any]:
        """Return the budgets, the resident models and their leases, and the last plan with its reasons.

        Sizes are in bytes.
        """
        return dict(await bridge.long(_wait, control.supervisor.ask("memory")))

    @api.get("/health", tags=["server"])
    def health(http: HTTPRequest) -> Health:
        from importlib.metadata import version

        run = control.supervisor.run_settings(0.0)
        trouble = control.dispatcher.trouble
        status, worker = "waiting" if trouble else "ok", "ready" if run is not None else "starting"
        if not auth.may_use(http, control.settings):
            return Health(status=status, worker=worker)
        return Health(
            status=status,
            worker=worker,
            problem=trouble,
            version=version("safelight"),
            spare=control.supervisor.spare_is_ready(),
            restarts=control.supervisor.restarts,
            run=dict(run) if run is not None else None,
        )

    return api


def _job(job: QueuedJob) -> JobModel:
    return JobModel(**described(job))


def _image(image: StoredImage) -> ImageModel:
    return ImageModel(**pictured(image))


def _model(control: Services, name: str, summary: Mapping[str, Any]) -> ModelModel:
    shown = {key: value for key, value in summary.items() if key != "path"}
    return ModelModel(**shown, pinned=name in control.supervisor.pinned)


def _found(thing: Any, what: str, name: str) -> Any:
    if thing is None:
        raise RefusedError(404, "not_found", f"there is no {what} {name}")
    return thing


def _sent(path: Path, media_type: str, image_id: str) -> FileResponse:
    if not path.exists():
        raise RefusedError(404, "not_found", f"the file of image {image_id} is gone")
    return FileResponse(path, media_type=media_type, headers={"Cache-Control": IMMUTABLE})


def _within(path: Path, folders: tuple[Path, ...]) -> Path:
    """Return the resolved path. Raises RefusedError when it is in none of the folders."""
    try:
        real = path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise RefusedError(422, "invalid_request", f"path: {error}", "path") from error
    if not any(real.is_relative_to(folder.expanduser().resolve()) for folder in folders):
        allowed = ", ".join(map(str, folders)) or "none; set model_folders"
        message = f"{path} is in none of the folders from which models may be added: {allowed}"
        raise RefusedError(403, "forbidden", message, "path")
    return real


def _wait(future: Future[Any]) -> Any:
    try:
        return future.result(ANSWER_SECONDS)
    except (WorkerDiedError, TimeoutError) as error:
        raise RefusedError(503, "worker_not_ready", f"the worker did not answer: {error}") from error
    except RuntimeError as error:
        raise RefusedError(409, "failed", str(error)) from error


async def _stream(control: Services, job_id: str | None) -> AsyncGenerator[str]:
    async with bridge.listening(control.events, job_id) as arrived:
        if job_id is not None:
            job = await bridge.run(control.database.job, job_id)
            if job is None:
                return
            yield _encode(Event("job", job.id, described(job)))
            if job.ended is not None:
                return
        while True:
            try:
                event = await asyncio.wait_for(arrived.get(), ALIVE_SECONDS)
            except TimeoutError:
                yield ": still here\n\n"
                continue
            yield _encode(event)
            if job_id is not None and event.kind == "job" and event.data["ended"] is not None:
                return


def _encode(event: Event) -> str:
    data: Mapping[str, Any] = {"job": event.job, **event.data}
    return f"event: {event.kind}\ndata: {json.dumps(data, ensure_ascii=False, default=str)}\n\n"
