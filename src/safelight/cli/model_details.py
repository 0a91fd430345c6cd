"""``safelight models defaults`` and ``safelight models hashes``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from safelight.cli.common import JsonOption, RootOption, loaded, say_json
from safelight.errors import InputError

DEFAULTS_EXAMPLES = (
    "Examples: `safelight models defaults dream steps=30 sampler='DPM++ 2M Karras'`"
    " · `safelight models defaults dream steps=`"
)

HASHES_EXAMPLES = "Example: `safelight models hashes`"


def defaults(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.", show_default=False)],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            help="FIELD=VALUE, several times; FIELD= removes a default. Without any, they are shown.",
            metavar="[FIELD=VALUE]...",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Set what a request gets that does not say otherwise: size, steps, guidance, sampler, schedule, CLIP skip, VAE.

    The commands, the page and all APIs use these defaults. Another program's defaults arrive with `safelight import`.
    """
    from safelight.assembly.library import open_library
    from safelight.catalog.cards import find_card
    from safelight.catalog.defaults import set_defaults
    from safelight.request.model_defaults import read_defaults

    library = open_library(loaded(context, root).settings)
    card = find_card(library.cards(), library.root, name)
    found: dict[str, Any] = dict(card.summary["defaults"])
    written = dict[str, str]()
    for text in values or ():
        field, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r}: must be FIELD=VALUE", param_hint="FIELD=VALUE")
        found.pop(field, None)
        written[field] = value
    if values:
        given = read_defaults({field: value for field, value in written.items() if value})
        if "sampler" in given and "schedule" not in given:
            # The schedule belonged to the sampler before.
            found.pop("schedule", None)
        found = dict(set_defaults(library, card.name, found | given))
    if as_json:
        say_json({"name": card.name, "defaults": found})
    elif found:
        for field, value in found.items():
            typer.echo(f"{field:12} {value}")
    else:
        typer.echo(f"{card.name} has no defaults of its own; its family's count")


def hashes(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(help="Models and adapters; all by default.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Compute and show the hashes by which other programs name a file: SHA-256 (AutoV2 is its start) and AutoV3.

    Pictures of other programs are then matched with the library by hash, too, and not only by name.
    """
    from dataclasses import asdict

    from safelight.assembly.library import open_library
    from safelight.catalog.cards import find_card
    from safelight.catalog.catalog import Catalog
    from safelight.catalog.file_hashes import FileHashes

    library = open_library(loaded(context, root).settings)
    every = [*library.cards(), *Catalog.under(library.root).adapters.cards()]
    known = FileHashes(library.root)
    for card in [find_card(every, library.root, name) for name in names] if names else every:
        found = known.of(card.path)
        if found is None:
            if names:
                raise InputError(f"{card.path}: {card.name} is a folder, or its file is gone; it has no hash")
            continue
        if as_json:
            say_json({"name": card.name, "path": str(card.path), **asdict(found)})
        else:
            typer.echo(f"{card.name}: SHA-256 {found.sha256}, AutoV3 {found.autov3[:12] or 'none'}")
