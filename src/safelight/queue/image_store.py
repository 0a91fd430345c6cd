"""The finished images of a server: their files, their rows, and what listeners learn about them. No torch."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict

from safelight.queue.database import Database, StoredImage
from safelight.queue.descriptions import image_to_dict
from safelight.queue.events import Event, Events
from safelight.queue.image_files import Gallery
from safelight.queue.job import QueuedJob
from safelight.request.results import Image


class ImageStore:
    """Stores and removes images: files in the gallery, rows in the database. Every row has its file."""

    def __init__(self, database: Database, gallery: Gallery, events: Events) -> None:
        self._database = database
        self._gallery = gallery
        self._events = events

    def add(self, job: QueuedJob, index: int, image: Image) -> None:
        """Store an image of a running job; do nothing if the job no longer runs.

        Write the file first, then the row. So every row has its file, and the next start removes files without a row.
        """
        image_id = uuid.uuid4().hex
        stored = StoredImage(
            id=image_id,
            job=job.id,
            place=index,
            file=self._gallery.put(image, image_id),
            width=image.width,
            height=image.height,
            seed=image.seed,
            model=image.model,
            model_digest=image.model_digest,
            pixels_sha256=image.pixels_sha256,
            created=time.time(),
            metadata={
                **image.metadata,
                "made": {
                    "seconds": asdict(image.seconds),
                    "host_peak_bytes": image.host_peak_bytes,
                    "warnings": list(image.warnings),
                },
            },
        )
        try:
            added = self._database.add_image(stored)
        except BaseException:
            self._gallery.remove(stored.file)
            raise
        if not added:
            self._gallery.remove(stored.file)
            return
        self._events.tell(Event("image", job.id, image_to_dict(stored)))

    def forget(self, image_id: str) -> bool:
        """Remove an image and its files. Returns whether it existed."""
        image = self._database.forget_image(image_id)
        if image is None:
            return False
        self._gallery.remove(image.file)
        self._events.tell(Event("removed", image.job, {"id": image.id}))
        return True

    def sweep(self) -> None:
        """Remove files without a row. A killed server leaves such files."""
        self._gallery.sweep(self._database.files())
