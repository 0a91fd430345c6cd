"""The command line's options for a request, generated from the schema."""

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
from safelight.request.samplers import sampler_of
from safelight.request.schema import Request

FIELDS: Mapping[str, Field] = fields_of(Request)

MODEL_OPTION = "A model's name or path{}. By default the setting default_model."


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads an option whose form on the command line differs from the field's value.

    ``type``: what typer reads. ``read``: turns that, and the address of a server or None, into the field's value.
    """

    type: Any
    read: Callable[[Any, str | None], Any]


_READERS: Mapping[str, _Reader] = {
    "image": _Reader(Path | None, lambda path, server: values.picture("image", path, server)),
    "mask": _Reader(Path | None, lambda path, server: values.picture("mask", path, server)),
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
        """A request for each model. Raises RequestError for what cannot be read or is not allowed."""
        read: dict[str, Any] = {
            name: _READERS[name].read(value, server) if name in _READERS else value
            for name, value in self.items()
            if name not in ("seed", "model")
        }
        read["sampler"], read["schedule"] = sampler_of(read["sampler"], read["schedule"])
        return [Request(model=model, seed=seed, **read) for model in models]


Command = Callable[..., None]


def takes_request(without: Collection[str] = (), **changes: Any) -> Callable[[Command], Command]:
    """Give a command the options of a request, in place of its parameter ``given``, which then is a :class:`Given`.

    ``without``: fields that the command does not have. ``changes``: other options for fields, as typer's annotations.
    """

    def decorated(command: Command) -> Command:
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

    return decorated


def _option(field: Field, changed: Any) -> inspect.Parameter:
    """As typer reads it from a signature."""
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
    """The declared sentence, with the bounds of a number behind it."""
    said = field.declared
    if field.type not in (int, float) or field.type is bool or said.most is None or said.most > 1000:
        return field.help
    low = f"above {said.above:g}" if said.above is not None else f"{said.least:g}"
    return f"{field.help} ({low} to {said.most:g})"


def refuse_without_effect(context: typer.Context) -> None:
    """Raise RequestError for an option that was given and has no effect beside the others."""
    given = context.params
    for field in FIELDS.values():
        needed = [FIELDS[name] for name in field.declared.needs]
        if not needed or not was_given(context, field.name):
            continue
        if not any(given.get(other.name) not in (None, other.default) for other in needed):
            of = " or ".join(other.options[0] for other in needed)
            raise RequestError(field.name, given[field.name], f"has no effect without {of}")


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
