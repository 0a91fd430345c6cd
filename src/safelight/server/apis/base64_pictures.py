"""Opens pictures that clients send in base64."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
from collections.abc import Generator

from PIL import Image as PILImage

from safelight.catalog.inputs import FORMATS
from safelight.pictures.opening import DAMAGED
from safelight.request.bounds import MOST_PIXELS
from safelight.server.problems import RefusedError


@contextlib.contextmanager
def opened(field: str, text: str, formats: tuple[str, ...] = FORMATS) -> Generator[PILImage.Image]:
    """Yield a picture in base64, with or without ``data:image/…;base64,``. Raises RefusedError if it cannot be read.

    ``field``: the field that the text comes from.
    """
    try:
        data = base64.b64decode(text.rpartition(",")[2], validate=True)
        with PILImage.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MOST_PIXELS:
                raise RefusedError(422, "invalid_request", f"{field}: has more than {MOST_PIXELS} pixels", field)
            yield image
    except (binascii.Error, *DAMAGED) as error:
        raise RefusedError(422, "invalid_request", f"{field}: cannot be read ({error})", field) from error
