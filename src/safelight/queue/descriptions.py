"""What listeners and clients learn about jobs, images and progress, as plain values. No torch."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Any

from safelight.queue.events import Event, Events
from safelight.queue.job import QueuedJob
from safelight.queue.stored_image import StoredImage
from safelight.request.results import Progress


def tell_job(job: QueuedJob, events: Events) -> None:
    """Tell the listeners the state of a job."""
    events.tell(Event("job", job.id, job_to_dict(job), job.person))


def progress_to_dict(progress: Progress) -> dict[str, Any]:
    """The progress of a job as plain values."""
    return {"stage": progress.stage, "image": progress.image, "step": progress.step, "steps": progress.steps}


def job_to_dict(job: QueuedJob) -> dict[str, Any]:
    """A job as plain values."""
    request = job.request
    return {
        "id": job.id,
        "number": job.number,
        "state": job.state,
        "model": request.model,
        "model_digest": job.model_digest,
        "request": {name: getattr(request, name) for name in request.__slots__},
        "client": job.client,
        "person": job.person,
        "slot": job.slot,
        "priority": job.priority,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "attempts": job.attempts,
        "images": job.images,
        "overtaken": job.overtaken,
        "reason": job.reason,
        "failure": job.failure,
    }


def image_to_dict(image: StoredImage) -> dict[str, Any]:
    """An image as plain values."""
    return {
        "id": image.id,
        "job": image.job,
        "place": image.place,
        "width": image.width,
        "height": image.height,
        "seed": image.seed,
        "model": image.model,
        "model_digest": image.model_digest,
        "pixels_sha256": image.pixels_sha256,
        "created": image.created,
        "prompt": image.prompt,
        "negative": image.negative,
        "loras": list(image.loras),
        "program": image.program,
        "imported": image.imported,
        "starred": image.starred,
        "board": image.board,
        "tags": list(image.tags),
        "trashed": image.trashed,
        "same": image.same,
        "person": image.person,
        "marks": [str(mark) for mark in image.metadata.get("marks", ())],
        "metadata": dict(image.metadata),
        "file_name": Path(image.file).name,
        "mime": mimetypes.guess_type(image.file)[0] or "application/octet-stream",
        "url": f"/api/v1/images/{image.id}/file",
        "thumbnail": f"/api/v1/images/{image.id}/thumbnail",
    }
