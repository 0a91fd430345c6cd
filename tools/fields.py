"""The table of a request's fields: ``python tools/fields.py docs/fields.md`` writes it from the schema."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from safelight.request.adapters import Control, Embedding, Lora
from safelight.request.field import Field, fields_of
from safelight.request.schema import Request

HEAD = """# The fields of a request

`make fields` writes this page from `src/safelight/request/schema.py`, where each field is declared once. The native
API takes each field under its name. The command line has an option for most fields. The next two columns have the
field's name in Safelight's AUTOMATIC1111 and OpenAI APIs; the OpenAI API also takes fields that OpenAI's own API lacks.
A dash means that the API does not have the field. The last column is the version of stored requests in which the field
first appeared.
"""


def page() -> Iterator[str]:
    """The page's lines."""
    yield HEAD
    groups = dict.fromkeys(field.declared.group for field in fields_of(Request).values())
    for group in groups:
        yield f"## {group}\n"
        yield "| field | default | allowed | what it does | command line | AUTOMATIC1111 | OpenAI | since version |"
        yield "|---|---|---|---|---|---|---|---|"
        for field in fields_of(Request).values():
            if field.declared.group == group:
                declared = field.declared
                options = "PROMPT" if field.name == "prompt" else " ".join(map(_code, field.options))
                names = (options, _code(declared.a1111), _code(declared.openai))
                shown = " | ".join(name or "–" for name in names)
                first = f"| `{field.name}` | {_default(field)} | {_allowed(field)} | {_cell(declared.help)}"
                yield f"{first} | {shown} | {declared.since} |"
        yield ""
    for kind, name in ((Lora, "loras"), (Control, "controls"), (Embedding, "embeddings")):
        yield f"## Each of `{name}`\n"
        yield "| field | default | allowed | what it does |\n|---|---|---|---|"
        for field in fields_of(kind).values():
            yield f"| `{field.name}` | {_default(field)} | {_allowed(field)} | {_cell(field.declared.help)} |"
        yield ""


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: Field) -> str:
    if field.required:
        return "(required)"
    if field.name == "seed":
        return f"random; in Python {_code(str(field.default))}"
    return "" if field.default in ("", (), None) else _code(str(field.default))


def _allowed(field: Field) -> str:
    declared = field.declared
    if field.builtin:
        return ", ".join(_code(value) for value in field.builtin if value)
    if field.type is bool:
        return "`true`, `false`"
    if field.type not in (int, float) or declared.maximum is None:
        return ""
    low = (
        f"above {declared.exclusive_minimum:g}"
        if declared.exclusive_minimum is not None
        else f"{declared.minimum or 0:g}"
    )
    multiple = f", a multiple of {declared.multiple}" if declared.multiple > 1 else ""
    most = int(declared.maximum) if declared.maximum == int(declared.maximum) else declared.maximum
    return f"{low} to {most}{multiple}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(page()))
