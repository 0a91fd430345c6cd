"""``safelight config``: what is set, and where each value came from."""

from __future__ import annotations

import typer

from safelight.cli.common import JsonOption, RootOption, loaded, say_json, table

app = typer.Typer(
    help="Show the settings.",
    no_args_is_help=True,
    epilog="Example: `safelight --config ~/invokeai/invokeai.yaml config show`",
)


@app.callback()
def config() -> None:
    """Settings come from flags, SAFELIGHT_* variables, safelight.yaml in the root (or --config FILE), in this order."""


@app.command(epilog="Example: `safelight config show --json`")
def show(context: typer.Context, as_json: JsonOption = False, root: RootOption = None) -> None:
    """Show every setting: its value, where that came from, and what it is for."""
    found = loaded(context, root)
    values = found.settings.model_dump(mode="json")
    if as_json:
        for name, value in values.items():
            say_json({"name": name, "value": value, "origin": found.origins[name]})
        for name, why in found.ignored.items():
            say_json({"name": name, "ignored": why})
        return
    fields = type(found.settings).model_fields
    rows = [
        (name, "by the machine" if value is None else str(value), found.origins[name], fields[name].description or "")
        for name, value in values.items()
    ]
    table(("setting", "value", "from", "what it is"), rows)
