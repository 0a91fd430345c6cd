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
    from safelight.trust.environment import Environment

UPGRADE_EXAMPLES = (
    "Examples: `safelight upgrade ~/safelight-0.2.0-py3-none-any.whl` · `safelight upgrade ~/src/safelight` · "
    "`safelight upgrade https://packages.example.org/simple --to 0.2.0`"
)
ROLLBACK_EXAMPLES = "Examples: `safelight rollback --list` · `safelight rollback` · `safelight rollback first`"

SHOWN = ("safelight", "torch", "diffusers", "transformers")


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
    """Install another version of Safelight in an environment of its own, use it from now on, and draw each
    model's canary, a small test image, again to compare.

    A package's name alone is never enough: the source is named, or is the one that the running version came from.
    """
    from safelight.errors import InputError
    from safelight.trust import sources
    from safelight.trust.environment import Environments

    environments = Environments()
    wanted = sources.named(source, to or "") if source else sources.of_running()
    if to and not wanted.index:
        raise InputError(f"--to {to}: only an index has several versions; {wanted} is one")
    if why := environments.refusal():
        raise InputError(f"{why}; upgrade it yourself: pip install --upgrade {wanted.requirement}")
    typer.echo("the present version makes the models' canaries, for comparing afterwards")
    if _doctor(context, root, Path(sys.executable), stdout=subprocess.DEVNULL):
        typer.echo("some differ already, before the upgrade: `safelight doctor` looks for the cause", err=True)
    typer.echo(f"installing {wanted}")
    try_out = ("-m", "safelight.cli", "version")
    built = environments.build(sources.NAME, wanted.requirement, wanted.options, bool(wanted.index), try_out)
    environments.activate(built)
    typer.echo(f"active: {_described(built)} (`safelight rollback` goes back)")
    raise typer.Exit(_doctor(context, root, built.python))


def rollback(
    context: typer.Context,
    environment: Annotated[
        str | None,
        typer.Argument(help="An environment by its name; the one before the last change by default."),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show what can be gone back to.")] = False,
    root: RootOption = None,
) -> None:
    """Use the environment that the last upgrade replaced, and draw each model's canary, a small test image, again to
    compare."""
    from safelight.errors import InputError
    from safelight.trust.environment import Environments

    environments = Environments()
    if listed:
        active = environments.active()
        rows = [
            (found.name, "active" if found == active else "", _when(found), _versions(found))
            for found in environments.all()
        ]
        table(("name", "", "made", "versions"), rows)
        return
    wanted = environments.named(environment) if environment else environments.before()
    if wanted is None:
        raise InputError("there is nothing to go back to: `safelight upgrade` was not used yet")
    environments.activate(wanted)
    typer.echo(f"active: {_described(wanted)}")
    raise typer.Exit(_doctor(context, root, wanted.python))


def _when(environment: Environment) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(environment.when)) if environment.when else ""


def _versions(environment: Environment) -> str:
    known = environment.versions
    return ", ".join(f"{name} {known[name]}" for name in SHOWN if name in known) or "unknown"


def _described(environment: Environment) -> str:
    return f"{environment.name}, {_versions(environment)}"


def _doctor(context: typer.Context, root: Path | None, python: Path, stdout: int | None = None) -> int:
    """Prove the canaries with the packages of ``python``; the exit code."""
    home = loaded(context, root).settings.root
    command = [str(python), "-P", "-m", "safelight.cli", "--root", str(home), "doctor", "--since-upgrade"]
    return subprocess.run(command, check=False, stdout=stdout).returncode
