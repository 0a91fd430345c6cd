"""``safelight preprocess``: computes from a picture what a ControlNet reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer

from safelight.request.adapters import PREPROCESSORS, Control

EXAMPLES = "Example: `safelight preprocess canny photo.png --out edges.png`"

HELP = "; ".join(f"{name}: {what}" for name, what in PREPROCESSORS.builtin.items())


def preprocess(
    name: Annotated[
        str,
        typer.Argument(help=HELP, show_default=False),
    ],
    image: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write (PNG).")] = Path("out/preprocessed.png"),
    low: Annotated[int, typer.Option(help="The lower threshold.")] = 100,
    high: Annotated[int, typer.Option(help="The upper threshold.")] = 200,
) -> None:
    """Compute from a picture what a ControlNet reads, and save it as a picture."""
    from safelight.catalog.inputs import decode_image
    from safelight.files.disk import read_file, write_whole
    from safelight.pipeline import preprocess as preprocessing

    control = Control(name, str(image), preprocessor=name, low=low, high=high)
    picture = decode_image("image", read_file(image.expanduser()))
    buffer = io.BytesIO()
    preprocessing.preprocess(picture, control).save(buffer, "PNG")
    write_whole(out, buffer.getvalue())
    typer.echo(str(out))
