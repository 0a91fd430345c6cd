"""``safelight import``: takes over the models of another program."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelight.cli.common import JsonOption, RootOption, loaded, say_json, table

if TYPE_CHECKING:
    from safelight.catalog.importing import ImportedFile

EXAMPLES = "Examples: `safelight import ~/ComfyUI` · `safelight import ~/stable-diffusion-webui ~/loras`"

STATES = {"imported": "imported", "known": "there already", "refused": "refused"}


def import_programs(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of programs, folders of models, or ComfyUI's extra_model_paths.yaml.", show_default=False
        ),
    ],
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="The variant of files that do not say it: VARIANT, or FAMILY=VARIANT. May be repeated.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Take over the models of A1111, Forge, ComfyUI, InvokeAI or SwarmUI, or those of a folder.

    The files stay where they are. Only their headers are read now; a file is read and hashed when it is used for the
    first time. Exit code 2 if a folder has nothing that can be used.
    """
    from safelight.catalog import other_programs
    from safelight.catalog.catalog import Catalog
    from safelight.catalog.importing import import_files
    from safelight.cli.adding import choose_variant, read_variants
    from safelight.errors import InputError

    variants = read_variants(variant or ())
    programs = [(path, other_programs.read(path)) for path in paths]
    catalog = Catalog.under(loaded(context, root).settings.root)
    empty: list[str] = []
    for path, program in programs:
        every: list[ImportedFile] = []
        for one in import_files(program.candidates, catalog, lambda found: choose_variant(found, variants)):
            every.append(one)
            if as_json:
                say_json(asdict(one) | {"path": str(one.path), "program": program.label})
        if not as_json:
            _report(path, program.label, every)
        if not any(one.state != "refused" for one in every):
            empty.append(str(path))
    if empty:
        raise InputError(f"{', '.join(empty)}: has no model that Safelight can use")


def _report(path: Path, label: str, every: list[ImportedFile]) -> None:
    """Print what a folder has: counts by kind and family, then what needs attention."""
    typer.echo(f"{path}{f' ({label})' if label else ''}: {len(every)} files")
    counts = Counter((one.kind, one.base or "any", STATES[one.state]) for one in every if one.state != "refused")
    sizes = Counter[tuple[str, str, str]]()
    for one in every:
        sizes[one.kind, one.base or "any", STATES[one.state]] += one.nbytes
    rows = [(*key, str(count), f"{sizes[key] / 1e9:,.1f} GB") for key, count in sorted(counts.items())]
    if rows:
        table(("kind", "for", "", "files", "size"), rows)
    for one in every:
        if one.note:
            typer.echo(one.note if one.state == "refused" else f"{one.name}: {one.note}")
    if any(one.state == "imported" for one in every):
        typer.echo("Their weights are read and hashed when they are used for the first time.")
