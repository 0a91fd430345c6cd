"""The images of a server: their files, their rows, and what listeners learn about them. No torch."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict

from safelight.errors import SafelightError
from safelight.queue.database import Database
from safelight.queue.descriptions import image_to_dict
from safelight.queue.events import Event, Events
from safelight.queue.image_files import Gallery
from safelight.queue.job import QueuedJob
from safelight.queue.person import LOCAL, Person
from safelight.queue.stored_image import ImageChange, StoredImage
from safelight.request.results import Image

DAY = 86_400.0


class ImageStore:
    """Stores, changes and deletes images: files in the gallery, rows in the database. Every row has its file."""

    def __init__(self, database: Database, gallery: Gallery, events: Events) -> None:
        self._database = database
        self._gallery = gallery
        self._events = events

    def add(self, job: QueuedJob, index: int, image: Image, slot: str = "", machine: str = "") -> None:
        """Store an image of a running job; do nothing if the job no longer runs.

        ``slot``, ``machine``: where it was made; ``machine`` is "" for the server's own.
        """
        image_id = uuid.uuid4().hex
        request = image.metadata.get("request", {})
        file = self._gallery.put(image, image_id)
        stored = StoredImage(
            id=image_id,
            job=job.id,
            place=index,
            file=file,
            bytes=self._gallery.size(file),
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
                    **{name: value for name, value in (("slot", slot), ("machine", machine)) if value},
                },
            },
            prompt=str(request.get("prompt", "")),
            negative=str(request.get("negative", "")),
            loras=tuple(str(one["name"]) for one in request.get("loras", ())),
        )
        try:
            added = self._database.add_image(stored)
        except SafelightError:
            self._clear_up(stored)
            raise
        if added is None:
            self._gallery.remove(stored)
            return
        self._gallery.finish(image_id)
        self._events.tell(Event("image", job.id, image_to_dict(added), added.person))

    def _clear_up(self, image: StoredImage) -> None:
        """Remove the files of an image whose row could not be written.

        A connection that is lost leaves open whether the row is there. If it is, its files stay. If the database does
        not answer, the next start decides.
        """
        with contextlib.suppress(SafelightError):
            if self._database.images.get_all([image.id]):
                self._gallery.finish(image.id)
            else:
                self._gallery.remove(image)

    def change(self, ids: Sequence[str], change: ImageChange, person: Person = LOCAL) -> list[str]:
        """See :meth:`ImageTable.change`. ``person``: who asks."""
        changed = self._database.images.seen_by(person).change(ids, change)
        self._tell(self._database.images.get_all(changed))
        return changed

    def _tell(self, images: Sequence[StoredImage]) -> None:
        """Tell each owner which of their images are changed or deleted."""
        for owner in dict.fromkeys(image.person for image in images):
            ids = [image.id for image in images if image.person == owner]
            self._events.tell(Event("images", "", {"ids": ids}, owner))

    def delete(self, ids: Sequence[str], person: Person = LOCAL) -> list[str]:
        """Delete a person's images and their files permanently. Returns the identifiers of the deleted images."""
        images = self._database.images.seen_by(person).own(ids)
        # If the server is killed meanwhile, its next start removes the files of deleted rows.
        self._gallery.mark(images)
        deleted = self._database.images.delete([image.id for image in images])
        for image in images:
            # If another call has deleted it, a new image may have the name of its file already.
            if image.id in deleted:
                self._gallery.remove(image)
            else:
                self._gallery.finish(image.id)
        gone = [image for image in images if image.id in deleted]
        self._tell(gone)
        return [image.id for image in gone]

    def empty_trash(self, days: float) -> int:
        """Delete the images that are in the trash for longer than ``days``. Returns their number."""
        return len(self.delete(self._database.images.trashed_before(time.time() - days * DAY)))

    def sweep(self) -> None:
        """Remove the files of images that a killed server did not finish."""
        self._gallery.sweep(self._database.images.files())
