"""Writes the page of settings from their declarations: ``python tools/settings.py docs/settings.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from safelight.setting_descriptions import describe_allowed
from safelight.settings import PREFIX, Settings, details_of

HEAD = f"""# Settings

`make settings` writes this page from `src/safelight/settings.py`, where each setting is declared once.

A setting has one of these sources. The first that has a value wins:

1. the command line, for the settings that a command has as an option, such as `--port` of `safelight serve`;
2. the environment variable `{PREFIX}` with the name in capitals, such as `{PREFIX}PORT`;
3. the file `safelight.yaml` in the root, or the file that `safelight --config FILE` names;
4. the default.

`safelight config show` prints every value and its source. `safelight config set NAME VALUE` writes a value into
`safelight.yaml`, and `safelight config unset NAME` removes it. Only the variable and the command line set `root`.

The file may also be InvokeAI's `invokeai.yaml`. Safelight reads the settings that have *yes* in the last column, and
translates InvokeAI's values where they have other names. It ignores these older settings of InvokeAI, because their
values had another meaning: {{obsolete}}.
"""


def page() -> Iterator[str]:
    """Yield the page's lines. Raises ValueError for a setting without a sentence or without a default."""
    details = {name: details_of(name) for name in Settings.model_fields}
    obsolete = [f"`{old}`" for one in details.values() for old in one.obsolete_names]
    yield HEAD.format(obsolete=", ".join(obsolete))
    for group in dict.fromkeys(one.group for one in details.values()):
        yield f"## {group}\n"
        yield "| setting | what it does | default | allowed | unit | InvokeAI |"
        yield "|---|---|---|---|---|---|"
        for name, one in details.items():
            if one.group == group:
                described = (_sentence(name), _default(name), _allowed(name), one.unit)
                cells = " | ".join(cell or "–" for cell in described)
                yield f"| `{name}` | {cells} | {_invokeai(name)} |"
        yield ""


def _sentence(name: str) -> str:
    text = Settings.model_fields[name].description or ""
    if not (text[:1].isupper() and text.endswith(".")):
        raise ValueError(f"setting {name} has no sentence that says what it does, only {text!r}")
    return text


def _default(name: str) -> str:
    declared: FieldInfo = Settings.model_fields[name]
    text = details_of(name).default_text
    if declared.default in (None, (), {}) or declared.default_factory is not None:
        if not text:
            raise ValueError(f"setting {name} has no words for its default")
        return text
    value = declared.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _allowed(name: str) -> str:
    # The unit has a column of its own.
    return describe_allowed(name).removesuffix(f" ({details_of(name).unit})")


def _invokeai(name: str) -> str:
    one = details_of(name)
    values = ", ".join(f"`{theirs}` is `{ours}`" for theirs, ours in one.invokeai_values.items())
    return f"yes; {values}" if values else "yes" if one.in_invokeai else "–"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(page()))
