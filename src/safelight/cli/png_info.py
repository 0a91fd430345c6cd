"""``safelight png-info``: shows the text in an image file that says how the image was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.common import JsonOption, say_json

EXAMPLES = "Example: `safelight png-info out/starter-noto-0.png`"


def png_info(
    path: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP file.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show the text that Safelight or another program wrote into an image file. Exit code 1 if there is none."""
    from safelight.catalog.inputs import FORMATS
    from safelight.pictures import infotext
    from safelight.pictures.opening import opened

    with opened(path, FORMATS) as image:
        text, items = infotext.read(image)
    if as_json:
        say_json({"info": text, "items": items, "parameters": infotext.fields(text)})
    else:
        typer.echo(text or f"{path} contains no text about how it was made")
    if not text:
        raise typer.Exit(1)
