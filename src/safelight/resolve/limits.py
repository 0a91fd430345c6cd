"""The limits of a server. They may refuse a request, and never change one."""

from __future__ import annotations

from dataclasses import dataclass

from safelight.catalog.model import Model
from safelight.errors import RequestError
from safelight.request.schema import Request


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The largest allowed values; None for no limit. Each is a setting of the same name.

    ``max_pixels``: width times height of an image, after the hires fix.
    ``max_steps``: denoising steps.
    ``max_images``: images of one request.
    ``max_prompt_chars``: characters of a prompt.
    """

    max_pixels: int | None = None
    max_steps: int | None = None
    max_images: int | None = None
    max_prompt_chars: int | None = None

    def check_texts(self, request: Request) -> None:
        """Raise RequestError for a prompt that is too long."""
        most = self.max_prompt_chars
        for field, text in (("prompt", request.prompt), ("negative", request.negative)):
            if most is not None and len(text) > most:
                problem = f"this server allows at most {most} characters (max_prompt_chars)"
                raise RequestError(field, f"{text[:20]}…", problem)

    def check(self, request: Request, model: Model, whole_picture_size: tuple[int, int] | None) -> None:
        """Raise RequestError for too many pixels, steps or images.

        ``whole_picture_size``: (width, height) of the input picture if only a part of it is drawn; else None.
        """
        self._check_pixels(request, model, whole_picture_size)
        self.check_count(request)
        for field, value, most, name in (
            ("steps", request.step_count, self.max_steps, "max_steps"),
            ("hires_steps", request.hires_steps, self.max_steps, "max_steps"),
        ):
            if most is not None and value > most:
                raise RequestError(field, value, f"this server allows at most {most} ({name})")

    def check_count(self, request: Request) -> None:
        """Raise RequestError for too many images."""
        most = self.max_images
        if most is not None and request.count > most:
            raise RequestError("count", request.count, f"this server allows at most {most} (max_images)")

    def _check_pixels(self, request: Request, model: Model, whole_picture_size: tuple[int, int] | None) -> None:
        most = self.max_pixels
        if most is None:
            return
        scale = request.hires_scale
        width, height = ((side or model.resolution) * scale for side in (request.width, request.height))
        if width * height > most:
            pixels = f"with height {height:g} the image has {width * height:.0f} pixels"
            raise RequestError("width", f"{width:g}", f"{pixels}; at most {most} are allowed (max_pixels)")
        if whole_picture_size is not None:
            # The drawn part is pasted into the whole picture, so the whole picture counts too.
            left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
            whole = whole_picture_size[0] + left + right, whole_picture_size[1] + top + bottom
            if whole[0] * whole[1] > most:
                raise RequestError("image", f"{whole[0]}x{whole[1]}", f"is over {most} pixels (max_pixels)")


NO_LIMITS = RequestLimits()
