"""``safelight users``: the people who use the server, with their passwords and roles."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight import extras
from safelight.cli.common import Commands, JsonOption, RootOption, loaded, say_json, server_database, table
from safelight.errors import InputError

if TYPE_CHECKING:
    from safelight.queue.database import Database

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The people who use the server. As soon as there is one, everybody must log in.",
)

NameArgument = Annotated[str, typer.Argument(help="The person's name.", show_default=False)]
FromInput = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input, in place of asking for it.")
]


@app.command("add", epilog="Example: `safelight users add ann --role admin`")
def add(
    context: typer.Context,
    name: NameArgument,
    role: Annotated[str, typer.Option(help="admin, member or guest.")] = "member",
    weight: Annotated[
        float, typer.Option(help="The share of computing time, relative to other people.", min=0.01, max=100)
    ] = 1.0,
    password_stdin: FromInput = False,
    root: RootOption = None,
) -> None:
    """Add a person. The first one must be an administrator, and gets all jobs, images and boards that there are.

    The server knows people as soon as there is one; it need not be started again.
    """
    with _database(context, root) as database:
        from safelight.queue.person import Person
        from safelight.server.people_names import check_name

        person = Person(check_name(name), _role(role), weight)
        first = not database.people.any()
        if first and person.role != "admin":
            raise InputError(f"{name}: the first person must be an administrator (--role admin)")
        database.people.add(person, _hash(password_stdin))
        database.audit.add("", "users add", name, f"{role}, weight {weight:g}")
        typer.echo(f"{name} is {'an' if role == 'admin' else 'a'} {role}")
        if first:
            typer.echo("From now on, everybody who uses the server must log in.")


@app.command("list", epilog="Example: `safelight users list`")
def show(context: typer.Context, as_json: JsonOption = False, root: RootOption = None) -> None:
    """List the people with their roles, weights and the size of their images."""
    with _database(context, root) as database:
        people = [(one, database.images.bytes_of(one.name)) for one in database.people.all()]
        if as_json:
            for person, size in people:
                say_json(asdict(person) | {"bytes": size})
            return
        if not people:
            typer.echo("The server has no log-in: anyone who can reach it can use it. `safelight users add` adds one.")
            return
        rows = [(one.name, one.role, f"{one.weight:g}", f"{size / 1e6:.1f} MB") for one, size in people]
        table(("name", "role", "weight", "images"), rows)


@app.command("remove", epilog="Example: `safelight users remove ann --heir bob`")
def remove(
    context: typer.Context,
    name: NameArgument,
    heir: Annotated[str, typer.Option(help="Who gets the images and boards; by default, only administrators.")] = "",
    root: RootOption = None,
) -> None:
    """Remove a person with their keys and presets. Waiting jobs are cancelled; images stay.

    When the last person is removed, the server has no log-in any more.
    """
    with _database(context, root) as database:
        if database.people.remove(name, heir) is None:
            raise InputError(f"there is no person {name!r}; `safelight users list` lists them")
        database.audit.add("", "users remove", name, f"heir: {heir}" if heir else "")
        typer.echo(f"{name} is removed")
        if not database.people.any():
            typer.echo("The server has no log-in now: anyone who can reach it can use it.")


@app.command("reset", epilog="Example: `safelight users reset ann --role guest`")
def reset(
    context: typer.Context,
    name: NameArgument,
    role: Annotated[str | None, typer.Option(help="Change the role, and keep the password.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Change the weight, and keep the password.", min=0.01, max=100)
    ] = None,
    password_stdin: FromInput = False,
    root: RootOption = None,
) -> None:
    """Give a person a new password, or another role or weight. A new password ends their sessions."""
    with _database(context, root) as database:
        if database.people.get(name) is None:
            raise InputError(f"there is no person {name!r}; `safelight users list` lists them")
        keeps = (role is not None or weight is not None) and not password_stdin
        password = None if keeps else _hash(password_stdin)
        changed = database.people.change(name, None if role is None else _role(role), weight, password)
        assert changed is not None
        weight_text = "" if weight is None else f"weight {weight:g}"
        what = ", ".join(filter(None, ("password" if password else "", f"role {role}" if role else "", weight_text)))
        database.audit.add("", "users reset", name, what)
        typer.echo(f"{name}: {what} changed")


@contextmanager
def _database(context: typer.Context, root: Any) -> Generator[Database]:
    extras.require("server", "`safelight users`")
    with server_database(loaded(context, root).settings) as database:
        yield database


def _role(text: str) -> Any:
    from safelight.queue.person import ROLES

    if text not in ROLES:
        raise InputError(f"--role {text}: must be one of {', '.join(ROLES)}")
    return text


def _hash(from_input: bool) -> str:
    """Ask for a new password, or read it from standard input, and return its hash."""
    from safelight.server.passwords import hash_password

    if from_input:
        return hash_password(sys.stdin.readline().rstrip("\r\n"))
    return hash_password(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
