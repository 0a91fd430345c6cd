"""``safelight config``: shows and changes the settings."""

from __future__ import annotations

from typing import Annotated

import typer

from safelight.cli.common import Commands, JsonOption, RootOption, loaded, say_json, table

app = typer.Typer(
    cls=Commands,
    help="Show and change the settings.",
    no_args_is_help=True,
    epilog="Example: `safelight --config ~/invokeai/invokeai.yaml config show`",
)


@app.callback()
def config() -> None:
    """Settings come from flags, SAFELIGHT_* variables, safelight.yaml in the root (or --config FILE), in this order."""


def _shown(name: str, value: object) -> str:
    """Return the text of a value: its default in words when it is None."""
    from safelight.settings import details_of

    return details_of(name).default_text if value is None else str(value)


@app.command(epilog="Example: `safelight config show --json`")
def show(context: typer.Context, as_json: JsonOption = False, root: RootOption = None) -> None:
    """Show every setting: its value, the origin of the value, and what it is for."""
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
        (name, _shown(name, value), found.origins[name], fields[name].description or "")
        for name, value in values.items()
    ]
    table(("setting", "value", "from", "what it is"), rows)


@app.command(
    "set", epilog="Examples: `safelight config set attention_type normal` · `safelight config set canary switch`"
)
def set_one(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A setting's name.", show_default=False)],
    value: Annotated[str, typer.Argument(help="The value, as in YAML.", show_default=False)],
    root: RootOption = None,
) -> None:
    """Set a value in safelight.yaml of the root."""
    from safelight.settings_sources import FILE, write_setting

    home = loaded(context, root).settings.root
    held = write_setting(home, name.rstrip(":").replace("-", "_"), value)
    typer.echo(f"{name.rstrip(':')} is {held} in {home / FILE}")


@app.command(epilog="Example: `safelight config unset default_seed`")
def unset(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A setting's name.", show_default=False)],
    root: RootOption = None,
) -> None:
    """Remove a value from safelight.yaml of the root, so that the setting has its default again."""
    from safelight.settings_sources import unset_setting

    home = loaded(context, root).settings.root
    name = name.rstrip(":").replace("-", "_")
    unset_setting(home, name)
    found = loaded(context, root)
    value = found.settings.model_dump(mode="json")[name]
    typer.echo(f"{name} is now {_shown(name, value)} (from {found.origins[name]})")
