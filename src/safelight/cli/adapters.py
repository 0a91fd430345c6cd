"""``safelight adapters``: the adapters in the library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelight.cli.common import Commands, JsonOption, RootOption, loaded, say_json, table

if TYPE_CHECKING:
    from safelight.catalog.adapters import Adapters

app = typer.Typer(
    cls=Commands,
    help="Add adapters to the library, list, verify and remove them: LoRAs and relatives, VAEs, ControlNets, "
    "embeddings.",
    no_args_is_help=True,
    epilog="Example: `safelight adapters add ~/loras/*.safetensors`, then `generate … --lora NAME:0.8`",
)


def _adapters(context: typer.Context, root: Path | None) -> Adapters:
    from safelight.catalog.adapters import Adapters

    return Adapters(loaded(context, root).settings.root)


@app.command(epilog="Example: `safelight adapters add style.safetensors --name style`")
def add(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(help="Adapter files, or folders of them.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Its name in the library; the file's name by default.")] = None,
    base: Annotated[
        str, typer.Option(help="The family that the adapter is for, such as sdxl, if its file names a wrong one.")
    ] = "",
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Add adapters: identify them, and read and hash every tensor. The files stay where they are."""
    from safelight.catalog.found import Found, found_in
    from safelight.errors import InputError, StorageError
    from safelight.families.registry import families

    if base and base not in families():
        raise InputError(f"--base {base!r}: must be one of {', '.join(sorted(families()))}")
    candidates = [candidate for path in paths for candidate in found_in(path)]
    if name is not None and len(candidates) != 1:
        raise InputError(f"--name {name!r} needs exactly one path, not {len(candidates)}")
    adapters, failed = _adapters(context, root), False
    for candidate in candidates:
        try:
            card = next((card for card in adapters.cards() if card.path == candidate.path.absolute()), None)
            known = candidate.within and card is not None and card.digest and card.state() == "there"
            added = adapters.get(card.name) if known and card is not None else adapters.add(candidate.path, name, base)
        except StorageError:
            # The disk would also refuse the other files.
            raise
        except InputError as error:
            failed = failed or not candidate.within
            if as_json:
                say_json({"path": str(candidate.path), "error": str(error)})
            typer.echo(f"safelight: {error}", err=True)
            continue
        if as_json:
            say_json(added.summary())
        elif known:
            typer.echo(f"{added.name} is already in the library")
        else:
            typer.echo(f"added {added.name}: {added.kind} for {added.base or 'an unknown base'}")
    if not candidates:
        given = ", ".join(map(str, paths))
        raise InputError(f"{given}: contains no file that could be an adapter ({', '.join(Found.endings)})")
    if failed:
        raise typer.Exit(2)


@app.command("list", epilog="Example: `safelight adapters list --json`")
def list_adapters(context: typer.Context, as_json: JsonOption = False, root: RootOption = None) -> None:
    """List all adapters."""
    found = _adapters(context, root).cards()
    if as_json:
        for adapter in found:
            say_json(adapter.summary)
        return
    if not found:
        typer.echo("No adapters yet. Add one with `safelight adapters add FILE`.")
        return
    rows = [
        (
            card.name,
            card.kind,
            card.summary["base"] or "?",
            card.summary["dtype"],
            f"{card.summary['bytes'] / 1e6:,.1f} MB",
            card.digest[:10] or "not read yet",
        )
        for card in found
    ]
    table(("name", "kind", "base", "dtype", "size", "digest"), rows)


@app.command(epilog="Examples: `safelight adapters verify` · `safelight adapters verify style`")
def verify(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Names; all by default.", show_default=False)] = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Read every tensor again and compare it with what was added. Exit code 1 if anything differs."""
    from safelight.errors import IntegrityError

    adapters = _adapters(context, root)
    failed = False
    for adapter in [adapters.get(name) for name in names] if names else adapters.all():
        problem = None
        try:
            adapters.verify(adapter)
        except IntegrityError as error:
            problem, failed = str(error), True
        if as_json:
            say_json(adapter.summary() | {"intact": problem is None, "problem": problem})
        else:
            typer.echo(f"{adapter.name}: {'intact' if problem is None else problem}")
    if failed:
        raise typer.Exit(1)


@app.command(epilog="Example: `safelight adapters remove style`")
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="An adapter's name.", show_default=False)],
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Remove an adapter from the library. Its file stays where it is."""
    _adapters(context, root).remove(name)
    if as_json:
        say_json({"name": name, "removed": True})
    else:
        typer.echo(f"removed {name} from the library; its file stays where it is")


@app.command(epilog="Example: `safelight adapters rename style style-v2`")
def rename(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="An adapter's name.", show_default=False)],
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Give an adapter another name. Its file stays as it is."""
    adapter = _adapters(context, root).rename(name, new)
    if as_json:
        say_json(adapter.summary)
    else:
        typer.echo(f"renamed {name} to {adapter.name}")
