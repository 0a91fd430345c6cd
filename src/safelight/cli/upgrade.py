"""``safelight upgrade`` and ``safelight rollback``: another version, and back."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelight.cli.common import RootOption, loaded, table

if TYPE_CHECKING:
    from safelight.trust.environment import Environment, Kept

UPGRADE_EXAMPLES = (
    "Examples: `safelight upgrade ~/safelight-0.2.0-py3-none-any.whl` · `safelight upgrade ~/src/safelight` · "
    "`safelight upgrade https://packages.example.org/simple --to 0.2.0`"
)
ROLLBACK_EXAMPLES = "Examples: `safelight rollback --list` · `safelight rollback`"

SHOWN = ("safelight", "torch", "diffusers", "transformers")


def _environment(context: typer.Context, root: Path | None) -> Environment:
    from safelight.trust.environment import Environment

    return Environment(loaded(context, root).settings.root)


def upgrade(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="A wheel, a checkout, or an index's address; where the running version came from by default.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[str | None, typer.Option(help="A version of the index's; the newest by default.")] = None,
    root: RootOption = None,
) -> None:
    """Install another version of Safelight, keep the one that it replaces, and prove the models' canaries again.

    A package's name alone is never enough: the source is named, or is the one that the running version came from.
    """
    from safelight.errors import InputError
    from safelight.trust import sources

    environment = _environment(context, root)
    wanted = sources.named(source, to or "") if source else sources.of_running()
    if to and not wanted.index:
        raise InputError(f"--to {to}: only an index has several versions; {wanted} is one")
    if why := environment.refusal():
        raise InputError(f"{why}; upgrade it yourself: pip install --upgrade {wanted.requirement}")
    typer.echo("the models' canaries, for comparing afterwards, are made by the versions that are here")
    _doctor(context, root, stdout=subprocess.DEVNULL)
    kept = environment.keep()
    typer.echo(f"kept: {_said(kept)} (`safelight rollback` goes back)")
    typer.echo(f"installing {wanted}")
    environment.install(wanted.requirement, options=wanted.options)
    environment.complete(sources.NAME)
    _prove(context, root)


def rollback(
    context: typer.Context,
    listed: Annotated[bool, typer.Option("--list", help="Show what can be gone back to.")] = False,
    root: RootOption = None,
) -> None:
    """Put back the packages that the last upgrade replaced, and prove the models' canaries again."""
    from safelight.errors import InputError

    environment = _environment(context, root)
    there = environment.kept()
    if listed:
        rows = [(time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.when)), _said(kept)) for kept in there]
        table(("replaced", "versions"), rows)
        return
    if not there:
        raise InputError("nothing was kept to go back to: `safelight upgrade` keeps what it replaces")
    if why := environment.refusal():
        raise InputError(f"{why}; go back yourself: {environment.command(there[0])}")
    environment.restore(there[0])
    typer.echo(f"back: {_said(there[0])}")
    _prove(context, root)


def _said(kept: Kept) -> str:
    return ", ".join(f"{name} {kept.versions[name]}" for name in SHOWN if name in kept.versions) or "nothing known"


def _prove(context: typer.Context, root: Path | None) -> None:
    raise typer.Exit(_doctor(context, root))


def _doctor(context: typer.Context, root: Path | None, stdout: int | None = None) -> int:
    """In a new process, as this one has imported what is replaced."""
    home = loaded(context, root).settings.root
    command = [sys.executable, "-m", "safelight.cli", "--root", str(home), "doctor", "--since-upgrade"]
    return subprocess.run(command, check=False, stdout=stdout).returncode
