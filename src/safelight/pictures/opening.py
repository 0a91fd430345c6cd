"""Opens picture files that may be damaged."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Sequence
from pathlib import Path

from PIL import Image as PILImage

from safelight.errors import CorruptFileError
from safelight.files.disk import open_regular

DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, PILImage.DecompressionBombError)
"""What Pillow and its decoders raise for a file that is damaged or of another kind, also later, while it is decoded."""


@contextlib.contextmanager
def opened(path: Path, formats: Sequence[str]) -> Generator[PILImage.Image]:
    """Yield the picture in a file.

    ``formats``: those that may be read, by Pillow's names.
    Raises UnreadableFileError if the file cannot be opened, CorruptFileError if it has no such picture.
    """
    descriptor, _ = open_regular(path)
    with open(descriptor, "rb") as file:
        data = file.read()
    try:
        with PILImage.open(io.BytesIO(data), formats=list(formats)) as image:
            yield image
    except DAMAGED as error:
        raise CorruptFileError(path, f"is not one of {', '.join(formats)}, or is damaged") from error
