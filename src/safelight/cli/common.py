"""Options, tables, progress bars and output that several commands share."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from safelight.errors import printable

if TYPE_CHECKING:
    from safelight.queue.database import Database
    from safelight.settings import Settings
    from safelight.settings_sources import LoadedSettings

RootOption = Annotated[
    Path | None, typer.Option("--root", help="The folder for all data; overrides SAFELIGHT_ROOT.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per line, for scripts.")]


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """The options before the command. They apply to every command."""

    root: Path | None
    config: Path | None
    device: str | None


DESTROYS = frozenset({"remove", "rollback"})
"""Commands that Safelight never suggests for an unknown word."""


class Commands(TyperGroup):
    """A group of commands. For an unknown word it suggests similar commands, but none that removes something."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See :meth:`typer.core.TyperGroup.resolve_command`."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            near = difflib.get_close_matches(args[0], sorted(set(self.commands) - DESTROYS))
            hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


def loaded(context: typer.Context, root: Path | None, **flags: Any) -> LoadedSettings:
    """Return the settings. Warn about entries and variables that Safelight ignores, and about exposed secrets.

    ``root``: ``--root`` behind the command, which overrides ``--root`` before it.
    ``flags``: values that override all other sources; None for a flag that was not given.
    """
    from safelight.settings import OBSOLETE
    from safelight.settings_sources import explain_settings

    chosen: GlobalOptions = context.obj
    found = explain_settings(root or chosen.root, chosen.config, device=chosen.device, **flags)
    unknown = sorted(name for name in found.ignored if name not in OBSOLETE)
    if unknown:
        _warn(f"unknown settings, ignored: {', '.join(unknown)}")
    for name in sorted(found.ignored.keys() & OBSOLETE.keys()):
        _warn(f"{name} is ignored: {found.ignored[name]}")
    if found.exposed is not None:
        _warn(f"{found.exposed} contains a secret, and other users may read it; run: chmod 600 {found.exposed}")
    return found


@contextlib.contextmanager
def server_database(settings: Settings) -> Generator[Database]:
    """Open the server's database, and close it afterwards. A running server may use it at the same time."""
    from safelight.queue.database import Database
    from safelight.workers import running_server

    # A running server may be of another version: then its database stays as it is.
    alone = running_server.find(settings.root) is None
    database = Database(settings.root, url=settings.plain_database_url, migrate=alone)
    try:
        yield database
    finally:
        database.close()


def _warn(text: str) -> None:
    """Print a warning about settings, only once."""
    if text not in _warned:
        _warned.add(text)
        say(f"safelight: {text}", err=True)


WIDE = 10_000
"""Columns of an output that is not a terminal."""

_drawn: list[Any] = []
"""The visible progress bars."""

_warned: set[str] = set()
"""The warnings about settings so far. A command may load the settings more than once."""


def say(text: str, err: bool = False) -> None:
    """Print a line, above the progress bars if there are any."""
    for progress in _drawn:
        progress.stop()
    typer.echo(text, err=err)
    for progress in _drawn:
        progress.start()


def say_json(values: Any) -> None:
    """Print one JSON object on a line of its own, without buffering."""
    # No encoding can represent one half of a surrogate pair; it becomes a JSON escape.
    say(json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace").decode())


@contextlib.contextmanager
def bar(label: str) -> Generator[Callable[[int, int, str], None]]:
    """Show a progress bar on a terminal, nothing in a pipe.

    Yields a function that takes the amount done, the total, and a text about the current work.
    """
    if not sys.stderr.isatty():
        yield lambda done, total, now: None  # noqa: ARG005
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
    # Without redirection by rich, because it would send the output of prints to the terminal and not into the user's
    # file or pipe.
    progress = Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
    with progress:
        task = progress.add_task(label, total=None, now="")
        _drawn.append(progress)
        try:
            yield lambda done, total, now: progress.update(task, completed=done, total=total, now=now)
        finally:
            _drawn.remove(progress)


@contextlib.contextmanager
def byte_bar(label: str) -> Generator[Callable[[int, int], None]]:
    """Show a progress bar of bytes read. Yields a function that takes the bytes done and the total."""
    with bar(label) as update:
        yield lambda done, total: update(done, total, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table, as wide as the terminal. In a pipe it is as wide as its contents, so that no value is cut."""
    grouped_table(columns, {"": rows})


def grouped_table(columns: tuple[str, ...], groups: dict[str, list[tuple[str, ...]]]) -> None:
    """Print a table like :func:`table`, with the name of each group of rows on a line above them."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, overflow="fold", no_wrap=column in ("name", "digest"))
    for group, rows in groups.items():
        if group:
            drawn.add_row(printable(group), style="bold")
        for row in rows:
            drawn.add_row(*map(printable, row))
    Console(width=None if sys.stdout.isatty() else WIDE, markup=False).print(drawn)
