"""What several commands share."""

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
    from safelight.settings_sources import LoadedSettings

RootOption = Annotated[
    Path | None, typer.Option("--root", help="Where everything lives; overrides SAFELIGHT_ROOT.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object to a line, for scripts.")]


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """The options before the command, which hold for every command."""

    root: Path | None
    config: Path | None
    device: str | None


DESTROYS = frozenset({"remove", "rollback"})
"""Commands that are never suggested for another word."""


class Commands(TyperGroup):
    """A group of commands. What is suggested for a word that is none never takes anything away."""

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
        _warn(f"not settings of Safelight, ignored: {', '.join(unknown)}")
    for name in sorted(found.ignored.keys() & OBSOLETE.keys()):
        _warn(f"{name} is not taken: {found.ignored[name]}")
    if found.exposed is not None:
        _warn(f"{found.exposed} holds a secret and others may read it: chmod 600 {found.exposed}")
    return found


def _warn(text: str) -> None:
    """A warning about settings, once."""
    if text not in _said:
        _said.add(text)
        say(f"safelight: {text}", err=True)


WIDE = 10_000
"""Columns of what is no terminal."""

_drawn: list[Any] = []
"""Progress bars on the terminal now."""

_said: set[str] = set()
"""Warnings about settings, which a command may load more than once."""


def say(text: str, err: bool = False) -> None:
    """A line, above a progress bar where there is one."""
    for progress in _drawn:
        progress.stop()
    typer.echo(text, err=err)
    for progress in _drawn:
        progress.start()


def say_json(values: Any) -> None:
    """One JSON object on a line of its own, at once."""
    # A lone half of a surrogate pair, which no encoding has, becomes its JSON escape.
    say(json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace").decode())


@contextlib.contextmanager
def bar(label: str) -> Generator[Callable[[int, int, str], None]]:
    """A progress bar on a terminal, nothing in a pipe. The function takes done, total and what is done now."""
    if not sys.stderr.isatty():
        yield lambda done, total, now: None  # noqa: ARG005
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
    # Redirected, what is printed meanwhile would go to the terminal and not into the file or pipe that it is for.
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
    """A progress bar of bytes read."""
    with bar(label) as update:
        yield lambda done, total: update(done, total, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table for people, as wide as the terminal; in a pipe as wide as it is, so that no value is cut."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, overflow="fold", no_wrap=column in ("name", "digest"))
    for row in rows:
        drawn.add_row(*map(printable, row))
    Console(width=None if sys.stdout.isatty() else WIDE).print(drawn)
