"""``safelight identify``: says what files are, without adding them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.common import JsonOption, say_json
from safelight.errors import printable

EXAMPLES = "Example: `safelight identify ~/Downloads/*.safetensors --json`"


def identify(
    paths: Annotated[list[Path], typer.Argument(help="Files or diffusers folders.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Say what files are (base, kind, prediction type, dtype), and which rule decided it. Reads only file headers."""
    from safelight.catalog.identify import identify as identified
    from safelight.errors import InputError

    failed = False
    for path in paths:
        try:
            found = identified(path)
        except InputError as error:
            failed = True
            if as_json:
                say_json({"name": path.stem, "path": str(path), "error": str(error)})
            typer.echo(f"safelight: {error}", err=True)
            continue
        values = {
            "name": path.stem,
            "kind": found.kind,
            "base": found.base,
            "variant": found.variant,
            "prediction_type": found.prediction_type,
            "dtype": found.dtype,
            "digest": None,
            "path": str(path),
            "origin": "path",
            "rule": found.rule,
            "format": found.format,
            "bytes": found.nbytes,
        }
        if as_json:
            say_json(values)
        else:
            parts = (found.base, found.kind, found.variant, found.prediction_type, found.dtype)
            typer.echo(f"{path}: {', '.join(part for part in parts if part)}, {found.nbytes / 1e6:,.0f} MB")
            typer.echo(f"    because: {printable(found.rule)}")
    if failed:
        raise typer.Exit(2)
