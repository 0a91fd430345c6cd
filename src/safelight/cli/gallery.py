"""``safelight gallery``: the images of the server."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelight.cli.common import Commands, JsonOption, RootOption, loaded, say_json, server_database, table

if TYPE_CHECKING:
    from safelight.queue.image_import import ImportedPicture

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The images of the server, and pictures of other programs.",
)

EXAMPLES = "Example: `safelight gallery import ~/stable-diffusion-webui/outputs`"

SHOWN = 10
"""Refused pictures that are named."""


@app.command("import", epilog=EXAMPLES)
def import_pictures(
    context: typer.Context,
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of pictures; folders in them count, too.", show_default=False)
    ],
    every: Annotated[
        bool, typer.Option("--all", help="Also pictures that do not say how they were made.", show_default=False)
    ] = False,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Add the pictures of A1111, Forge, ComfyUI, InvokeAI, NovelAI, Fooocus, SwarmUI or Draw Things to the gallery.

    The files stay where they are, and nothing is copied. Run the command again to add what is new. Exit code 2 if a
    folder has no picture that says how it was made.
    """
    from safelight.errors import InputError
    from safelight.queue.image_import import import_pictures as pictures_of

    empty: list[str] = []
    with server_database(loaded(context, root).settings) as database:
        for folder in folders:
            every_one: list[ImportedPicture] = []
            for one in pictures_of(folder, database.images, every=every):
                every_one.append(one)
                if as_json:
                    say_json(asdict(one) | {"path": str(one.path)})
            if not as_json:
                _report(folder, every_one)
            if not any(one.state in ("imported", "known") for one in every_one):
                empty.append(str(folder))
    if empty:
        raise InputError(f"{', '.join(empty)}: has no picture that says how it was made (--all adds others, too)")


def _report(folder: Path, every: list[ImportedPicture]) -> None:
    typer.echo(f"{folder}: {len(every)} pictures")
    counts = Counter((one.state, one.program) for one in every)
    if counts:
        table(("", "made by", "pictures"), [(*key, str(count)) for key, count in sorted(counts.items())])
    refused = [one for one in every if one.state == "refused"]
    for one in refused[:SHOWN]:
        typer.echo(f"{one.path}: {one.problem}")
    if len(refused) > SHOWN:
        typer.echo(f"and {len(refused) - SHOWN} more that were refused (--json names all)")
    if any(one.state == "left out" for one in every):
        typer.echo("The pictures that were left out do not say how they were made. --all adds them, too.")
