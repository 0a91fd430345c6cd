"""Generates the command-line options of a request from the schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from safelight.cli import values
from safelight.errors import RequestError
from safelight.request.field import Field, fields_of
from safelight.request.samplers import parse_sampler_and_schedule
from safelight.request.schema import Request

FIELDS: Mapping[str, Field] = fields_of(Request)

MODEL_OPTION = "A model's name or path{}. Default: the setting default_model."


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads an option whose form on the command line differs from the field's value.

    type: the type that typer reads.
    read: computes the field's value from that, and from the address of a server or None.
    """

    type: Any
    read: Callable[[Any, str | None], Any]


_READERS: Mapping[str, _Reader] = {
    "image": _Reader(Path | None, lambda path, server: values.picture("image", path, server)),
    "mask": _Reader(Path | None, lambda path, server: values.picture("mask", path, server)),
    "references": _Reader(
        list[Path] | None,
        lambda paths, server: tuple(values.picture("references", path, server) for path in paths or ()),
    ),
    "outpaint": _Reader(str | None, lambda text, _: values.pixels(text)),
    "loras": _Reader(list[str] | None, lambda texts, _: tuple(values.lora_of(text) for text in texts or ())),
    "controls": _Reader(
        list[str] | None, lambda texts, server: tuple(values.control(text, server) for text in texts or ())
    ),
}

_PLAIN = (str, int, float, bool)


class Given(dict[str, Any]):
    """The values of a request's options, by field, in the command line's form."""

    def requests(self, models: Collection[str], seed: int, server: str | None = None) -> list[Request]:
        """Build a request for each model. Raises RequestError if a value cannot be read or is not allowed."""
        read: dict[str, Any] = {
            name: _READERS[name].read(value, server) if name in _READERS else value
            for name, value in self.items()
            if name not in ("seed", "model")
        }
        read["sampler"], read["schedule"] = parse_sampler_and_schedule(read["sampler"], read["schedule"])
        return [Request(model=model, seed=seed, **read) for model in models]


Command = Callable[..., None]


def takes_request(without: Collection[str] = (), **changes: Any) -> Callable[[Command], Command]:
    """Replace the parameter ``given`` of a command by the options of a request. The command receives a :class:`Given`.

    without: the fields that the command lacks.
    changes: typer's annotations of options that differ, by field.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        fields = [field for field in FIELDS.values() if field.options and field.name not in without]
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "given":
                parameters += [_option(field, changes.get(field.name)) for field in fields]
            else:
                parameters.append(
                    parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
                )
        names = {field.name for field in fields}

        def run(**arguments: Any) -> None:
            given = Given({name: value for name, value in arguments.items() if name in names})
            command(given=given, **{name: value for name, value in arguments.items() if name not in names})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _option(field: Field, changed: Any) -> inspect.Parameter:
    """The option of a field, as a parameter in a signature that typer reads."""
    kind, panel = inspect.Parameter.KEYWORD_ONLY, field.declared.group
    if changed is not None:
        return inspect.Parameter(field.name, kind, default=None, annotation=changed)
    if field.name == "prompt":
        argument = Annotated[str, typer.Argument(help=field.help, show_default=False)]
        return inspect.Parameter(field.name, kind, annotation=argument)
    if field.name == "seed":
        option = typer.Option(help=values.SEED_HELP, show_default="random", rich_help_panel=panel)
        return inspect.Parameter(field.name, kind, default=None, annotation=Annotated[str | None, option])
    reader = _READERS.get(field.name)
    if reader is not None:
        option = typer.Option(*field.options, help=field.help, show_default=False, rich_help_panel=panel)
        return inspect.Parameter(field.name, kind, default=None, annotation=Annotated[reader.type, option])
    plain = field.type if field.type in _PLAIN else str
    written = Annotated[
        plain | None if field.optional else plain,
        typer.Option(*field.options, help=_help(field), rich_help_panel=panel),
    ]
    return inspect.Parameter(field.name, kind, default=field.default, annotation=written)


def _help(field: Field) -> str:
    """The field's help text, followed by the bounds if it is a number."""
    declared = field.declared
    if field.type not in (int, float) or field.type is bool or declared.maximum is None or declared.maximum > 1000:
        return field.help
    low = f"above {declared.exclusive_minimum:g}" if declared.exclusive_minimum is not None else f"{declared.minimum:g}"
    return f"{field.help} ({low} to {declared.maximum:g})"


def refuse_without_effect(context: typer.Context) -> None:
    """Raise RequestError for an option on the command line that has no effect without another option."""
    given = context.params
    for field in FIELDS.values():
        needed = [FIELDS[name] for name in field.declared.needs]
        if not needed or not was_given(context, field.name):
            continue
        if not any(given.get(other.name) not in (None, other.default) for other in needed):
            options = " or ".join(other.options[0] for other in needed)
            raise RequestError(field.name, given[field.name], f"has no effect without {options}")


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
