"""Routes for finished images and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from PIL import Image as PILImage
from starlette.responses import FileResponse, Response

from safelight.assembly.services import Services
from safelight.pictures.file_format import ENDINGS, LOSSLESS, ImageFormat, encode_picture
from safelight.queue.database import StoredImage
from safelight.queue.descriptions import image_to_dict
from safelight.server import bridge
from safelight.server.apis.native_fields import Checked, ImageId, ImageModel, JobId, Limit
from safelight.server.problems import RefusedError, documented, found

IMMUTABLE = "private, max-age=31536000, immutable"
"""The header ``Cache-Control`` of an image's files, which never change."""

FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {f"image/{form}": {} for form in ENDINGS}, "description": "the file"}
}
WEBP: dict[int | str, dict[str, Any]] = {200: {"content": {"image/webp": {}}, "description": "the thumbnail"}}


class ImageRoutes:
    """The routes for images."""

    def __init__(self, control: Services) -> None:
        self._control, self._database = control, control.database

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/jobs/{job_id}/images", tags=["jobs"], responses=documented(404))(self.images_of)
        api.get("/images", tags=["images"])(self.images)
        api.get("/images/{image_id}", tags=["images"], responses=documented(404))(self.one_image)
        api.post("/images/{image_id}/check", tags=["images"], responses=documented(404, 409, 503))(self.check)
        api.delete("/images/{image_id}", tags=["images"], status_code=204, responses=documented(404))(self.forget)
        file, webp = {**FILE, **documented(404)}, {**WEBP, **documented(404)}
        api.get("/images/{image_id}/file", tags=["images"], response_class=FileResponse, responses=file)(self.file)
        api.get("/images/{image_id}/thumbnail", tags=["images"], response_class=FileResponse, responses=webp)(
            self.thumbnail
        )

    def images_of(self, job_id: JobId) -> list[ImageModel]:
        """List the finished images of a job, in their order."""
        found(self._database.job(job_id), "job", job_id)
        return [_image(image) for image in self._database.images(1000, job=job_id)]

    def images(
        self,
        limit: Limit = 100,
        before: Annotated[float | None, Query(description="only images from before this time")] = None,
        model: str | None = None,
    ) -> list[ImageModel]:
        """List the images, the newest first."""
        return [_image(image) for image in self._database.images(limit, before, model=model)]

    def one_image(self, image_id: ImageId) -> ImageModel:
        """Return what is known about an image."""
        return _image(self._find(image_id))

    async def check(self, image_id: ImageId) -> Checked:
        """Make the image again in a fresh process, which has held no other model, and compare the pixels."""
        image = await bridge.run(self._find, image_id)
        compared = await bridge.long(self._control.fresh_processes.compare, image)
        return Checked(same=compared.same, pixels_sha256=compared.pixels_sha256)

    def forget(self, image_id: ImageId) -> Response:
        """Remove an image and its file."""
        if not self._control.dispatcher.forget(image_id):
            raise RefusedError(404, "not_found", f"there is no image {image_id}")
        return Response(status_code=204)

    def file(
        self,
        image_id: ImageId,
        image_format: Annotated[ImageFormat, Query(alias="format", description="of the file")] = "png",
        quality: Annotated[int, Query(ge=1, le=100, description="of JPEG and WebP; 100: WebP is lossless")] = LOSSLESS,
    ) -> Response:
        """Return the file, which contains the metadata, as PNG, JPEG or WebP."""
        image = self._find(image_id)
        path = self._control.gallery.path(image.file)
        if image_format == "png":
            return _send(path, "image/png", image_id)
        _require(path, image_id)
        with PILImage.open(path) as opened:
            file = encode_picture(opened.convert("RGB"), image.metadata, image_format, quality)
        return Response(file, media_type=f"image/{image_format}", headers={"Cache-Control": IMMUTABLE})

    def thumbnail(self, image_id: ImageId) -> FileResponse:
        """Return a small WebP picture of the image."""
        return _send(self._control.gallery.thumbnail(self._find(image_id).file), "image/webp", image_id)

    def _find(self, image_id: str) -> StoredImage:
        return found(self._database.image(image_id), "image", image_id)


def _image(image: StoredImage) -> ImageModel:
    return ImageModel(**image_to_dict(image))


def _require(path: Path, image_id: str) -> None:
    if not path.exists():
        raise RefusedError(404, "not_found", f"the file of image {image_id} is gone")


def _send(path: Path, media_type: str, image_id: str) -> FileResponse:
    _require(path, image_id)
    return FileResponse(path, media_type=media_type, headers={"Cache-Control": IMMUTABLE})
