"""Opens picture files that may be damaged."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Sequence
from pathlib import Path

from PIL import Image as PILImage

from safelight.errors import CorruptFileError
from safelight.files.disk import read_file

DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, PILImage.DecompressionBombError)
"""What Pillow and its decoders raise for a file that is damaged or of another kind, also later, while it is decoded."""


@contextlib.contextmanager
def opened(path: Path, formats: Sequence[str]) -> Generator[PILImage.Image]:
    """Yield the picture in a file.

    ``formats``: Pillow's names of the formats to accept.
    Raises UnreadableFileError if the file cannot be opened, CorruptFileError if it has no such picture.
    """
    data = read_file(path)
    try:
        with PILImage.open(io.BytesIO(data), formats=list(formats)) as image:
            yield image
    except DAMAGED as error:
        raise CorruptFileError(path, f"is not one of {', '.join(formats)}, or is damaged") from error
