"""How a setting is declared: with its description, group and unit, and what else pydantic does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import Field


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingDetails:
    """The parts of a setting's declaration that pydantic does not know.

    ``group``: heading on docs/settings.md.
    ``unit``: unit of the value; empty for none.
    ``allowed``: allowed values, where type and bounds do not say them.
    ``default_text``: the default in words, where it is None, is empty or depends on the machine.
    ``secret``: Safelight never shows the value, and only the owner may read a file with the value.
    ``in_invokeai``: InvokeAI has a setting with the same name and meaning.
    ``invokeai_values``: Safelight's value for each InvokeAI value that has another name here.
    ``obsolete_names``: names in older InvokeAI files. Safelight ignores them, because their values had another meaning:
    ``vram`` had the default 0.25 GB, and did not limit device memory.
    """

    group: str
    unit: str = ""
    allowed: str = ""
    default_text: str = ""
    secret: bool = False
    in_invokeai: bool = False
    invokeai_values: Mapping[str, str] = field(default_factory=dict[str, str])
    obsolete_names: tuple[str, ...] = ()


def declare(description: str, details: SettingDetails, **attributes: Any) -> Any:
    """Declare a setting.

    ``description``: what the setting does, in one or two sentences.
    ``attributes``: default and bounds, as :func:`pydantic.Field` takes them.
    """
    return Field(description=description, json_schema_extra=asdict(details), **attributes)
