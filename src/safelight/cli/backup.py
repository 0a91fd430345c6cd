"""``safelight backup`` and ``safelight restore``: the jobs, images and records of a root in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.common import JsonOption, RootOption, byte_bar, loaded, say_json

BACKUP_EXAMPLE = "Example: `safelight backup ~/safelight-2026-11.zip --pictures`"
RESTORE_EXAMPLE = "Example: `safelight restore ~/safelight-2026-11.zip --root ~/restored`"


def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The zip file to write; it must not exist yet.", show_default=False)],
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Also the images, and the pictures that they began with.")
    ] = False,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Write jobs, boards, records of models and settings into one file, and the pictures if you like.

    A server may run meanwhile. The files of models are not copied: their records name them and their digests.
    """
    from safelight.assembly.backup import write

    with byte_bar("writing") as on_bytes:
        made = write(loaded(context, root).settings, file.expanduser().absolute(), pictures, on_bytes)
    if as_json:
        say_json({"file": str(made.path), "files": made.files, "bytes": made.nbytes, "pictures": made.pictures})
    else:
        what = "with" if made.pictures else "without"
        typer.echo(f"{made.path}: {made.files} files, {made.nbytes / 1e6:.1f} MB, {what} pictures")


def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="What `safelight backup` wrote.", show_default=False)],
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Restore a backup into a folder without data. Each file is verified before any is put into its place."""
    from safelight.assembly.backup import restore as restore_into

    settings = loaded(context, root).settings
    with byte_bar("restoring") as on_bytes:
        made = restore_into(file.expanduser().absolute(), settings, on_bytes)
    if as_json:
        say_json({"root": str(settings.root), "files": made.files, "bytes": made.nbytes, "pictures": made.pictures})
    else:
        typer.echo(f"{settings.root}: {made.files} files, {made.nbytes / 1e6:.1f} MB")
