"""``safelight upgrade`` and ``safelight rollback``: install another version, and go back."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelight import extras
from safelight.cli.common import RootOption, loaded, table

if TYPE_CHECKING:
    from safelight.diagnostics.environment import Environment

UPGRADE_EXAMPLES = (
    "Examples: `safelight upgrade ~/safelight-0.2.0-py3-none-any.whl` · `safelight upgrade ~/src/safelight` · "
    "`safelight upgrade https://packages.example.org/simple --to 0.2.0`"
)
ROLLBACK_EXAMPLES = "Examples: `safelight rollback --list` · `safelight rollback` · `safelight rollback first`"


def upgrade(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="A wheel, a checkout, or the address of a package index. Default: the source of the running version.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[str | None, typer.Option(help="A version in the package index; the newest by default.")] = None,
    root: RootOption = None,
) -> None:
    """Install another version of Safelight in an environment of its own and use it from now on. Then draw each
    model's canary, a small test image, again and compare it.

    The name of a package is not enough: give the source, or leave it out to use the source of the running version.
    """
    from safelight.diagnostics import sources
    from safelight.diagnostics.environment import Environments
    from safelight.errors import InputError

    environments = Environments()
    wanted = sources.parse_source(source, to or "") if source else sources.of_running()
    if to and not wanted.index:
        raise InputError(f"--to {to}: needs a package index; {wanted} is a single version")
    if why := environments.refusal():
        raise InputError(f"{why}; upgrade it yourself: pip install --upgrade {wanted.requirement}")
    typer.echo("making the models' canaries with the present version, to compare them afterwards")
    if _doctor(context, root, Path(sys.executable), stdout=subprocess.DEVNULL):
        typer.echo("some canaries differ even before the upgrade; `safelight doctor` looks for the cause", err=True)
    typer.echo(f"installing {wanted}")
    try_out = ("-m", "safelight.cli", "version")
    built = environments.build(
        sources.NAME, wanted.requirement, wanted.options, bool(wanted.index), try_out, extras.installed()
    )
    environments.activate(built)
    typer.echo(f"active: {_described(built)} (`safelight rollback` goes back)")
    raise typer.Exit(_doctor(context, root, built.python))


def rollback(
    context: typer.Context,
    environment: Annotated[
        str | None,
        typer.Argument(help="The name of an environment; by default the one that was active before the present one."),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show all environments.")] = False,
    root: RootOption = None,
) -> None:
    """Use the environment that the last upgrade replaced. Then draw each model's canary, a small test image, again and
    compare it."""
    from safelight.diagnostics.environment import Environments
    from safelight.errors import InputError

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
        raise InputError("there is no earlier environment: `safelight upgrade` has not been used yet")
    environments.activate(wanted)
    typer.echo(f"active: {_described(wanted)}")
    raise typer.Exit(_doctor(context, root, wanted.python))


def _when(environment: Environment) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(environment.when)) if environment.when else ""


def _versions(environment: Environment) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment.shown_versions.items()) or "unknown"


def _described(environment: Environment) -> str:
    return f"{environment.name}, {_versions(environment)}"


def _doctor(context: typer.Context, root: Path | None, python: Path, stdout: int | None = None) -> int:
    """Compare the canaries with the packages of ``python``. Returns the exit code."""
    home = loaded(context, root).settings.root
    command = [str(python), "-P", "-m", "safelight.cli", "--root", str(home), "doctor", "--since-upgrade"]
    return subprocess.run(command, check=False, stdout=stdout).returncode
