"""Routes for images and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import FileResponse, Response, StreamingResponse

from safelight.assembly.services import Services
from safelight.pictures.file_format import ENDINGS, LOSSLESS, ImageFormat, encode_picture
from safelight.pictures.opening import opened
from safelight.queue.events import Event
from safelight.queue.export import export
from safelight.queue.stored_image import Facets, ImageChange, StoredImage
from safelight.server import bridge
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
        self._control, self._database, self._table = control, control.database, control.database.images

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

    def images_of(self, job_id: JobId) -> list[ImageModel]:
        """List the finished images of a job, in their order."""
        found(self._database.job(job_id), "job", job_id)
        return [image_model(image) for image in self._table.of_job(job_id)]

    def images(self, asked: Annotated[Listing, Query()]) -> ImagePageModel:
        """List images, the newest first. Images that come or go between two parts of a list skip or repeat no other."""
        page = self._table.page(asked.filter(), asked.limit, asked.cursor)
        return ImagePageModel(
            images=[image_model(image, metadata=asked.metadata) for image in page.images], next=page.next
        )

    def count(self, asked: Annotated[Filter, Query()]) -> Count:
        """Count images."""
        return Count(count=self._table.count(asked.filter()))

    def ids(self, asked: Annotated[Filter, Query()]) -> IdsModel:
        """List the identifiers of images, the newest first, without a limit."""
        return IdsModel(ids=self._table.ids(asked.filter()))

    def details(self, asked: Several) -> list[ImageModel]:
        """Return what is known about several images, also those in the trash, without their metadata."""
        return [image_model(image, metadata=False) for image in self._table.get_all(asked.ids)]

    def facets(self) -> Facets:
        """Count the images of each model, LoRA, tag and program."""
        return self._table.facets()

    def change(self, asked: Changing) -> IdsModel:
        """Star, tag, move to a board, move to the trash or restore images, all or none."""
        change = ImageChange(
            starred=asked.starred,
            board=asked.board,
            add_tags=_stripped(asked.add_tags),
            remove_tags=_stripped(asked.remove_tags),
            trashed=asked.trashed,
        )
        return IdsModel(ids=self._control.images.change(asked.ids, change))

    def delete(self, asked: Several) -> IdsModel:
        """Delete images and their files for ever. The file of an imported image stays where it is."""
        return IdsModel(ids=self._control.images.delete(asked.ids))

    def export(self, asked: Several) -> StreamingResponse:
        """Download images as a ZIP archive of their files, with their metadata in ``images.json``."""
        images = self._table.get_all(asked.ids)
        headers = {"Content-Disposition": 'attachment; filename="safelight-images.zip"'}
        return StreamingResponse(export(images, self._control.gallery), media_type="application/zip", headers=headers)

    def one_image(self, image_id: ImageId) -> ImageModel:
        """Return what is known about an image."""
        return image_model(self._find(image_id))

    async def check(self, image_id: ImageId) -> Checked:
        """Make the image again in a fresh process, which has held no other model, and compare the pixels."""
        image = await bridge.run(self._find, image_id)
        compared = await bridge.long(self._control.fresh_processes.compare, image)
        await bridge.run(self._table.store_check, image_id, compared.same)
        self._control.events.tell(Event("images", "", {"ids": [image_id]}))
        return Checked(same=compared.same, pixels_sha256=compared.pixels_sha256)

    def remove(
        self,
        image_id: ImageId,
        permanently: Annotated[
            bool, Query(description="delete it for ever, in place of moving it to the trash")
        ] = False,
    ) -> Response:
        """Move an image to the trash, from which it can be restored for ``trash_days``."""
        store = self._control.images
        done = store.delete([image_id]) if permanently else store.change([image_id], ImageChange(trashed=True))
        if not done:
            raise RefusedError(404, "not_found", f"there is no image {image_id}")
        return Response(status_code=204)

    def file(
        self,
        image_id: ImageId,
        image_format: Annotated[
            ImageFormat | None, Query(alias="format", description="of the file; by default, the stored file as it is")
        ] = None,
        quality: Annotated[int, Query(ge=1, le=100, description="of JPEG and WebP; 100: WebP is lossless")] = LOSSLESS,
    ) -> Response:
        """Return the file, which contains the metadata, as PNG, JPEG or WebP."""
        image = self._find(image_id)
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

    def thumbnail(self, image_id: ImageId) -> FileResponse:
        """Return a small WebP picture of the image."""
        image = self._find(image_id)
        if not self._control.gallery.thumbnail(image_id).exists():
            require_file(self._control.gallery.path(image), image_id)
        return _send(self._control.gallery.make_thumbnail(image), "image/webp", image_id)

    def _find(self, image_id: str) -> StoredImage:
        return found(self._table.get(image_id), "image", image_id)


def _stripped(tags: Sequence[str]) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in tags)


def require_file(path: Path, image_id: str) -> None:
    """Raise RefusedError (404) if the file of an image is gone."""
    if not path.exists():
        raise RefusedError(404, "not_found", f"the file of image {image_id} is gone")


def _send(path: Path, media_type: str, image_id: str) -> FileResponse:
    require_file(path, image_id)
    return FileResponse(path, media_type=media_type, headers={"Cache-Control": IMMUTABLE})
