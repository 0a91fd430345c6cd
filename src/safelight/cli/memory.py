"""``safelight memory`` and ``safelight fits``: show the use of memory, and predict that of a model."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from safelight.cli.common import JsonOption, RootOption, byte_bar, loaded, say_json, table
from safelight.errors import InputError

MEMORY_EXAMPLES = "Example: `safelight memory -m starter-noto -m starter-fluent`"
FITS_EXAMPLES = "Example: `safelight fits starter-noto --size 64x64`"

ModelsOption = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="Load this model first; repeat for several.", show_default=False),
]


def memory(
    context: typer.Context, models: ModelsOption = None, as_json: JsonOption = False, root: RootOption = None
) -> None:
    """Show the memory budgets and their origin, what is resident, and the last plan with its reasons.

    It shows the memory of this command's process, not that of a running server. Without `-m` nothing is resident;
    a generation would have the same budgets.
    """
    from safelight.assembly.importing import open_engine

    engine = open_engine(loaded(context, root).settings)
    for name in models or []:
        with byte_bar(f"reading {name}") as on_bytes:
            engine.loaded.load(engine.library.find(name, on_bytes))
    found = engine.memory()
    if as_json:
        say_json(found)
        return
    for place, values in found["places"].items():
        typer.echo(f"{place}: budget {_mb(values['budget'])}, set by {values['set_by']}")
        if values["for_models"] is not None:
            typer.echo(f"  the settings limit models to {_mb(values['for_models'])}")
        typer.echo(f"  stored {_mb(values['stored'])}, reserved for computing {_mb(values['promised'])}")
        rows = [
            (holding["component"], _mb(holding["nbytes"]), _mb(holding["total"]), str(holding["leases"]))
            for holding in values["resident"]
        ]
        if rows:
            table(("component", "resident", "of", "leases"), rows)
        reasons: dict[tuple[str, str], int] = {}
        for step in values["last_plan"]:
            key = (step["action"], step["reason"])
            reasons[key] = reasons.get(key, 0) + step["nbytes"]
        if reasons:
            table(("last plan", "", "because"), [(action, _mb(n), why) for (action, why), n in reasons.items()])
    if found["forms"]:
        table(("quantised component", "in memory"), list(found["forms"].items()))
    typer.echo(f"verification: {found['verification']}")


def fits(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A model's name or path.", show_default=False)] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="A published size, such as flux2-klein-4b, in place of a model: answers before you fetch the files.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="With --family: the form of the file, such as q4, q8_0 or fp8; bf16 by default."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's resolution by default.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto.")] = "auto",
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Say whether a model fits in this machine's memory, how much of it is streamed, how much slower that is, and what
    would make it faster. Exit code 1 if it does not fit.
    """
    from safelight.assembly.importing import open_engine
    from safelight.catalog.published import describe_published
    from safelight.request.schema import Request

    found = re.fullmatch(r"([0-9]+)x([0-9]+)", size) if size else None
    if size and found is None:
        raise InputError(f"--size {size!r}: must be WIDTHxHEIGHT in pixels, such as 512x512")
    if (model is None) == (family is None):
        raise InputError("fits: name a model, or a published size with --family, and not both")
    if form is not None and family is None:
        raise InputError("--form: only with --family; a model's file has its form")
    engine = open_engine(loaded(context, root).settings)
    if family is not None:
        resolved = describe_published(family, form or "bf16")
    else:
        assert model is not None
        with byte_bar(f"reading {model}") as on_bytes:
            resolved = engine.library.find(model, on_bytes)
    width, height = (int(found[1]), int(found[2])) if found else (None, None)
    answer = engine.fits(
        Request("", resolved.name, width=width, height=height, precision=precision),  # pyright: ignore[reportArgumentType]
        resolved,
    )
    if as_json:
        say_json(answer)
    else:
        _print(answer)
    if not answer["fits"]:
        raise typer.Exit(1)


def _print(answer: dict[str, Any]) -> None:
    typer.echo(f"{answer['model']} at {answer['width']}x{answer['height']} in {answer['dtype']}: {answer['summary']}")
    rows = [
        (c["component"], _mb(c["total"]), _mb(c["resident"]), _mb(c["streamed"]), _mb(c["working"]), c["source"])
        for c in answer["components"]
    ]
    table(("component", "weights", "resident", "streamed each pass", "for computing", "known"), rows)
    for line in answer["advice"]:
        typer.echo(f"  {line}")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
