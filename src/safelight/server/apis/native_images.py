"""Routes for images and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Request as HTTPRequest
from starlette.responses import FileResponse, Response, StreamingResponse

from safelight.assembly.services import Services
from safelight.pictures.file_format import ENDINGS, LOSSLESS, ImageFormat, encode_picture
from safelight.pictures.opening import opened
from safelight.queue.events import Event
from safelight.queue.export import export
from safelight.queue.person import Person
from safelight.queue.stored_image import Facets, ImageChange, StoredImage
from safelight.server import bridge, intake
from safelight.server.access import DETAIL, Who
from safelight.server.apis.native_fields import Checked, ImageId, JobId
from safelight.server.apis.native_image_fields import (
    Changing,
    Count,
    Filter,
    IdsModel,
    ImageModel,
    ImagePageModel,
    Listing,
    Several,
    image_model,
)
from safelight.server.problems import RefusedError, documented, found

NAMED = 20
"""Deleted images that the audit log names."""

IMMUTABLE = "private, max-age=31536000, immutable"
"""The header ``Cache-Control`` of an image's files, which never change."""

MEDIA_TYPES = {ending: f"image/{form}" for form, ending in ENDINGS.items()} | {
    ".jpeg": "image/jpeg",
    ".avif": "image/avif",
}

FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: {} for media in sorted(set(MEDIA_TYPES.values()))}, "description": "the file"}
}
WEBP: dict[int | str, dict[str, Any]] = {200: {"content": {"image/webp": {}}, "description": "the thumbnail"}}
ZIP: dict[int | str, dict[str, Any]] = {200: {"content": {"application/zip": {}}, "description": "the archive"}}


class ImageRoutes:
    """The routes for images."""

    def __init__(self, control: Services) -> None:
        self._control, self._table = control, control.database.images

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/jobs/{job_id}/images", tags=["jobs"], responses=documented(404))(self.images_of)
        api.get("/images", tags=["images"])(self.images)
        api.patch("/images", tags=["images"])(self.change)
        api.get("/images/count", tags=["images"])(self.count)
        api.get("/images/ids", tags=["images"])(self.ids)
        api.get("/images/facets", tags=["images"])(self.facets)
        api.post("/images/details", tags=["images"])(self.details)
        api.post("/images/delete", tags=["images"])(self.delete)
        api.post(
            "/images/export", tags=["images"], response_class=StreamingResponse, responses={**ZIP, **documented()}
        )(self.export)
        api.get("/images/{image_id}", tags=["images"], responses=documented(404))(self.one_image)
        api.post("/images/{image_id}/check", tags=["images"], responses=documented(404, 409, 503))(self.check)
        api.delete("/images/{image_id}", tags=["images"], status_code=204, responses=documented(404))(self.remove)
        file, webp = {**FILE, **documented(404)}, {**WEBP, **documented(404)}
        api.get("/images/{image_id}/file", tags=["images"], response_class=FileResponse, responses=file)(self.file)
        api.get("/images/{image_id}/thumbnail", tags=["images"], response_class=FileResponse, responses=webp)(
            self.thumbnail
        )

    def images_of(self, job_id: JobId, who: Who) -> list[ImageModel]:
        """List the finished images of a job, in their order."""
        intake.own_job(self._control, who, job_id)
        return [image_model(image) for image in self._table.seen_by(who).of_job(job_id)]

    def images(self, asked: Annotated[Listing, Query()], who: Who) -> ImagePageModel:
        """List images, the newest first. Images that come or go between two parts of a list skip or repeat no other.

        People see their own images and those on shared boards; administrators see all.
        """
        page = self._table.seen_by(who).page(asked.filter(), asked.limit, asked.cursor)
        return ImagePageModel(
            images=[image_model(image, metadata=asked.metadata) for image in page.images], next=page.next
        )

    def count(self, asked: Annotated[Filter, Query()], who: Who) -> Count:
        """Count images."""
        return Count(count=self._table.seen_by(who).count(asked.filter()))

    def ids(self, asked: Annotated[Filter, Query()], who: Who) -> IdsModel:
        """List the identifiers of images, the newest first, without a limit."""
        return IdsModel(ids=self._table.seen_by(who).ids(asked.filter()))

    def details(self, asked: Several, who: Who) -> list[ImageModel]:
        """Return what is known about several images, also those in the trash, without their metadata."""
        return [image_model(image, metadata=False) for image in self._table.seen_by(who).get_all(asked.ids)]

    def facets(self, who: Who) -> Facets:
        """Count the images of each model, LoRA, tag and program."""
        return self._table.seen_by(who).facets()

    def change(self, asked: Changing, who: Who) -> IdsModel:
        """Star, tag, move to a board, move to the trash or restore images, all or none."""
        change = ImageChange(
            starred=asked.starred,
            board=asked.board,
            add_tags=_stripped(asked.add_tags),
            remove_tags=_stripped(asked.remove_tags),
            trashed=asked.trashed,
        )
        return IdsModel(ids=self._control.images.change(asked.ids, change, who))

    def delete(self, asked: Several, who: Who, http: HTTPRequest) -> IdsModel:
        """Delete images and their files for ever. The file of an imported image stays where it is."""
        deleted = self._control.images.delete(asked.ids, who)
        http.scope[DETAIL] = f"{len(deleted)} images: {', '.join(deleted[:NAMED])}"
        return IdsModel(ids=deleted)

    def export(self, asked: Several, who: Who) -> StreamingResponse:
        """Download images as a ZIP archive of their files, with their metadata in ``images.json``."""
        images = self._table.seen_by(who).get_all(asked.ids)
        headers = {"Content-Disposition": 'attachment; filename="safelight-images.zip"'}
        return StreamingResponse(export(images, self._control.gallery), media_type="application/zip", headers=headers)

    def one_image(self, image_id: ImageId, who: Who) -> ImageModel:
        """Return what is known about an image."""
        return image_model(self._find(image_id, who))

    async def check(self, image_id: ImageId, who: Who) -> Checked:
        """Make the image again in a fresh process, which has held no other model, and compare the pixels."""
        image = await bridge.run(self._find, image_id, who)
        compared = await bridge.long(self._control.fresh_processes.compare, image)
        await bridge.run(self._table.seen_by(who).store_check, image_id, compared.same)
        self._control.events.tell(Event("images", "", {"ids": [image_id]}, image.person))
        return Checked(same=compared.same, pixels_sha256=compared.pixels_sha256)

    def remove(
        self,
        image_id: ImageId,
        who: Who,
        permanently: Annotated[
            bool, Query(description="delete it for ever, in place of moving it to the trash")
        ] = False,
    ) -> Response:
        """Move an image to the trash, from which it can be restored for ``trash_days``."""
        store = self._control.images
        change = ImageChange(trashed=True)
        done = store.delete([image_id], who) if permanently else store.change([image_id], change, who)
        if not done:
            raise RefusedError(404, "not_found", f"there is no image {image_id}")
        return Response(status_code=204)

    def file(
        self,
        image_id: ImageId,
        who: Who,
        image_format: Annotated[
            ImageFormat | None, Query(alias="format", description="of the file; by default, the stored file as it is")
        ] = None,
        quality: Annotated[int, Query(ge=1, le=100, description="of JPEG and WebP; 100: WebP is lossless")] = LOSSLESS,
    ) -> Response:
        """Return the file, which contains the metadata, as PNG, JPEG or WebP."""
        image = self._find(image_id, who)
        path = self._control.gallery.path(image)
        stored = MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
        if image_format is None or f"image/{image_format}" == stored == "image/png":
            return _send(path, stored, image_id)
        if image.program != "Safelight":
            problem = f"image {image_id} was made by {image.program}; only its own file ({stored}) can be returned"
            raise RefusedError(422, "invalid_request", problem, "format")
        require_file(path, image_id)
        with opened(path, ("PNG", "JPEG", "WEBP")) as picture:
            file = encode_picture(picture.convert("RGB"), image.metadata, image_format, quality)
        return Response(file, media_type=f"image/{image_format}", headers={"Cache-Control": IMMUTABLE})

    def thumbnail(self, image_id: ImageId, who: Who) -> FileResponse:
        """Return a small WebP picture of the image."""
        image = self._find(image_id, who)
        if not self._control.gallery.thumbnail(image_id).exists():
            require_file(self._control.gallery.path(image), image_id)
        return _send(self._control.gallery.make_thumbnail(image), "image/webp", image_id)

    def _find(self, image_id: str, who: Person) -> StoredImage:
        return found(self._table.seen_by(who).get(image_id), "image", image_id)


def _stripped(tags: Sequence[str]) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in tags)


def require_file(path: Path, image_id: str) -> None:
    """Raise RefusedError (404) if the file of an image is gone."""
    if not path.exists():
        raise RefusedError(404, "not_found", f"the file of image {image_id} is gone")


def _send(path: Path, media_type: str, image_id: str) -> FileResponse:
    require_file(path, image_id)
    return FileResponse(path, media_type=media_type, headers={"Cache-Control": IMMUTABLE})
