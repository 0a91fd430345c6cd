"""Writes the pages of commands, routes and errors: ``python tools/reference.py docs`` writes them into ``docs``."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_origin
from unittest.mock import MagicMock

import typer

from safelight import errors
from safelight.assembly.services import Services
from safelight.cli.main import app as command_line
from safelight.queue.job import FAILURES
from safelight.server import app as server
from safelight.server.problems import KINDS, RefusedError
from safelight.settings import Settings

COMMANDS_HEAD = """# Commands

`make reference` writes this page from `src/safelight/cli/`, where each command is declared once. The option `--help`
of each command prints the same. [errors.md](errors.md) has the exit codes, and [fields.md](fields.md) says more about
the options of a request.
"""

API_HEAD = """# The HTTP APIs

`make reference` writes this page from `src/safelight/server/apis/`, where each route is declared once. A running server
describes the same at `/api/v1/openapi.json`, together with the [APIs of installed packages](extending.md#an-api).
[errors.md](errors.md) says what the statuses of errors mean, and [people.md](people.md) what roles are.
"""

ERRORS_HEAD = """# Errors

`make reference` writes this page from `src/safelight/errors.py`. The command line and the server read their answers
from the same table.

A command ends with one of these exit codes: 0 if it is done; 1 if it failed, or if a check found a problem; 2 if the
request or the input is invalid; 130 if the user stopped it. `error` is the kind of the error in the body of the HTTP
answer: `error` of Safelight's own API and of AUTOMATIC1111's, `error.code` of OpenAI's.
"""

APIS = {
    "Safelight's own API": ("/api/v1/",),
    "OpenAI's API": ("/v1/",),
    "AUTOMATIC1111's API": (),
    "Metrics": ("/metrics",),
}
"""The sections of the page, each with the start of its paths. AUTOMATIC1111's API has all other paths."""

ROLES = {
    "open": "Nobody needs to log in for it.",
    "guest": "Everybody may use it.",
    "member": "Members and administrators may use it.",
    "admin": "Only administrators may use it.",
}
"""Who may use a route where the server knows people."""

TYPES = {str: "text", int: "whole number", float: "number", Path: "path"}
JSON_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "object": "an object",
    "null": "`null`",
}


def cell(text: object) -> str:
    """Return a text as a cell of a table, a dash for none."""
    return " ".join(str(text).split()).replace("|", "\\|") or "–"


def table(head: str, rows: Sequence[tuple[object, ...]]) -> Iterator[str]:
    """Yield the lines of a table, and an empty line. Yields nothing if there is no row."""
    if not rows:
        return
    yield f"| {head} |"
    yield "|" + "---|" * (head.count("|") + 1)
    for row in rows:
        yield f"| {' | '.join(map(cell, row))} |"
    yield ""


def sentence(text: str | None, of: str) -> str:
    """Return the text. Raises ValueError if it is no sentence: ``of`` has to say what it does."""
    text = inspect.cleandoc(text or "")
    if not (text[:1].isupper() or text.startswith("`")) or not text.split("\n\n")[0].endswith((".", ":")):
        raise ValueError(f"{of} has no sentence that says what it does, only {text!r}")
    return text


# Commands


def every_command() -> Iterator[tuple[str, Any]]:
    """Yield each command and group of commands with its words, such as ``safelight models add``."""

    def below(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from below(f"{words} {name}", inner)

    return below("safelight", typer.main.get_command(command_line))


def commands() -> Iterator[str]:
    """Yield the lines of the page of commands."""
    yield COMMANDS_HEAD
    for words, command in every_command():
        yield f"## `{words}`\n"
        yield sentence(command.help, words) + "\n"
        arguments = [one for one in command.params if not one.opts[0].startswith("-")]
        options = [one for one in command.params if one.opts[0].startswith("-")]
        named = [(f"`{_metavar(one)}`", _takes(one), _needed(one), one.help) for one in arguments]
        yield from table("argument | takes | required | what it is", named)
        named = [
            (" ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts)), _takes(one), _default(one), one.help)
            for one in options
        ]
        yield from table("option | takes | default | what it does", named)
        if command.epilog:
            yield command.epilog + "\n"


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _needed(argument: Any) -> str:
    return "yes" if argument.required else "no"


def _takes(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    kind = parameter.type_descriptor.annotation
    several = get_origin(kind) is list
    if several:
        (kind,) = get_args(kind)
    if isinstance(kind, UnionType):
        kind = next(one for one in get_args(kind) if one is not type(None))
    return TYPES[kind] + (", several times" if several else "")


def _default(option: Any) -> str:
    if option.required:
        return "(required)"
    if isinstance(option.show_default, str):
        return option.show_default
    empty = option.default is None or option.default is False or option.default == ""
    return "" if empty else f"`{option.default}`"


# Routes


def description() -> dict[str, Any]:
    """Return the OpenAPI document of a server without installed packages."""
    # No route reads the services before the first request.
    whole: dict[str, Any] = server.create(_unopened()).openapi()
    own = tuple(server.APIS)
    whole["paths"] = {path: methods for path, methods in whole["paths"].items() if path.startswith(own)}
    every, used, new = whole["components"]["schemas"], set[str](), _references(whole["paths"])
    while new:
        used |= new
        new = {name for found in new for name in _references(every[found])} - used
    whole["components"]["schemas"] = {name: every[name] for name in sorted(used)}
    return whole


def _unopened() -> Services:
    """Return services that do nothing: the routes are described without a server."""
    return cast("Services", MagicMock(settings=Settings()))


def _references(part: Any) -> set[str]:
    """Return the names of the schemas to which a part of the document refers."""
    return set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(part)))


def routes(described: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, path and description of each route."""
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def api() -> Iterator[str]:
    """Yield the lines of the page of routes."""
    described = description()
    schemas = described["components"]["schemas"]
    yield API_HEAD
    special = tuple(start for starts in APIS.values() for start in starts)
    for name, starts in APIS.items():
        yield f"## {name}\n"
        for method, path, operation in routes(described):
            if path.startswith(starts) if starts else not path.startswith(special):
                yield from _route(method, path, operation, schemas)
    yield "## Bodies\n"
    for name, schema in schemas.items():
        if not name.startswith("Body_"):
            yield f"### `{name}`\n"
            yield sentence(schema.get("description"), name) + "\n"
            yield from _fields(schema)


def _route(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"### `{method} {path}`\n"
    yield sentence(operation.get("description"), f"{method} {path}") + "\n"
    rows = [
        (f"`{one['name']}`", one["in"], *_described(one["schema"], one["required"]), one.get("description", ""))
        for one in operation.get("parameters", ())
    ]
    yield from table("parameter | in | type | default | allowed | what it is", rows)
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        name = schema.get("$ref", "").rpartition("/")[2]
        if name.startswith("Body_"):
            yield f"The body is `{kind}`:\n"
            yield from _fields(schemas[name])
        else:
            yield f"The body is {_type(schema)}.\n"
    for status, answer in operation["responses"].items():
        if int(status) < 400:
            kinds = [
                _type(content["schema"]) if content.get("schema", {}) and kind == "application/json" else f"`{kind}`"
                for kind, content in answer.get("content", {}).items()
            ]
            yield f"The answer is {status}{' with ' if kinds else ''}{', '.join(kinds)}."
    failures = sorted(status for status in operation["responses"] if int(status) >= 400)
    yield f"Errors: {', '.join(failures)}." if failures else "It has no errors of its own."
    yield ROLES[operation["x-role"]] + "\n"


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    rows = [
        (f"`{name}`", *_described(field, name in required), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]
    return table("field | type | default | allowed | what it is", rows)


def _described(schema: Mapping[str, Any], required: bool) -> tuple[str, str, str]:
    """Return the type, the default and what is allowed."""
    default = schema.get("default")
    shown = (
        "(required)"
        if required
        else ""
        if default in (None, "", [], {})
        else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    )
    nested = [inner["items"] for inner in (schema, *schema.get("anyOf", ())) if "items" in inner]
    allowed = [text for one in (schema, *schema.get("anyOf", ()), *nested) if (text := _allowed(one))]
    return _type(schema), shown, "; ".join(allowed)


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[`{name}`](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if schema.get("type") == "array":
        return f"a list of {_type(schema['items'])}"
    if schema.get("format") == "binary" or "contentMediaType" in schema:
        return "a file"
    return JSON_TYPES[schema["type"]] if "type" in schema else "any value"


def _allowed(schema: Mapping[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    limits = {
        "minimum": "at least {:.16g}",
        "exclusiveMinimum": "above {:.16g}",
        "maximum": "at most {:.16g}",
        "multipleOf": "a multiple of {:.16g}",
        "minItems": "at least {} items",
        "maxItems": "at most {} items",
        "minLength": "at least {} characters",
        "maxLength": "at most {} characters",
        "pattern": "`{}`",
    }
    return ", ".join(text.format(schema[name]) for name, text in limits.items() if name in schema)


# Errors


def every_error() -> Iterator[tuple[type[errors.SafelightError], int]]:
    """Yield each error class of Safelight, and how many classes are above it."""

    def below(above: type[errors.SafelightError], depth: int) -> Iterator[tuple[type[errors.SafelightError], int]]:
        yield above, depth
        for kind in above.__subclasses__():
            if kind.__module__.startswith("safelight."):
                yield from below(kind, depth + 1)

    return below(errors.SafelightError, 0)


def errors_page() -> Iterator[str]:
    """Yield the lines of the page of errors."""
    yield ERRORS_HEAD
    rows: list[tuple[object, ...]] = []
    for kind, depth in every_error():
        # What the attributes are comes after the meaning.
        meaning = re.split(r"\s+``\w+``:", sentence(kind.__doc__, kind.__name__).split("\n\n")[0])[0]
        above = f"`{kind.__bases__[0].__name__}`" if depth else ""
        answer = errors.ANSWERS.get(kind)
        answers = ("", "that of the refusal", "that of the refusal")
        if answer is not None:
            answers = (answer.exit_code, answer.status, f"`{answer.kind}`")
        elif kind is not RefusedError:
            raise ValueError(f"{kind.__name__} is not in the table of errors.py")
        rows.append((f"`{kind.__name__}`", above, meaning, *answers))
    yield from table("class | is a | means | exit code | HTTP status | `error`", rows)
    yield "## Errors of the server alone\n"
    yield "The access check and the framework answer these, before a route is called:\n"
    yield from table("HTTP status | `error`", [(status, f"`{kind}`") for status, kind in sorted(KINDS.items())])
    yield "## Jobs that failed\n"
    yield "A failed job has a kind of failure. A client that waits for the job gets the answer of the class.\n"
    yield from table("`failure` | class", [(f"`{name}`", f"`{kind.__name__}`") for name, kind in FAILURES.items()])


PAGES: Mapping[str, Callable[[], Iterator[str]]] = {"commands.md": commands, "api.md": api, "errors.md": errors_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(sys.argv[1]) / name).write_text("\n".join(page()))
