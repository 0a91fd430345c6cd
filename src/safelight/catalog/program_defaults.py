"""The defaults that other programs have for a model.

- InvokeAI 4 and later: ``default_settings`` in its database (``MainModelDefaultSettings``)
- AUTOMATIC1111 and Forge: the VAE that ``NAME.json`` beside a checkpoint names
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.errors import FileError, RequestError
from safelight.families.family import Family
from safelight.files.disk import read_file
from safelight.files.json_values import json_object
from safelight.request import foreign_samplers
from safelight.request.model_defaults import check_defaults
from safelight.request.samplers import SAMPLERS

MOST_BYTES = 1 << 20
"""A larger file beside a checkpoint is not AUTOMATIC1111's."""

INVOKE_FIELDS = {"steps": "steps", "cfg_scale": "cfg", "guidance": "guidance", "width": "width", "height": "height"}
"""InvokeAI's names of fields, and Safelight's."""


@dataclass(frozen=True, slots=True)
class ProgramDefaults:
    """A model's defaults.

    ``values``: see :data:`safelight.request.model_defaults.ModelDefaults`.
    ``left_out``: what Safelight does not take over, in the program's words.
    """

    values: Mapping[str, Any]
    left_out: tuple[str, ...] = ()


NONE = ProgramDefaults({})


def of_invoke(settings: Mapping[str, Any], vae: str) -> ProgramDefaults:
    """Return the defaults of InvokeAI. ``vae``: the name of the VAE, "" for none."""
    values: dict[str, Any] = {"vae": vae} if vae else {}
    left_out: list[str] = []
    for name, value in settings.items():
        if value in (None, "", 0, False) or name == "vae":
            continue
        if name in INVOKE_FIELDS:
            values[INVOKE_FIELDS[name]] = value
        elif name == "scheduler":
            found = foreign_samplers.of_invoke(str(value))
            if found is None:
                left_out.append(f"scheduler {value}")
            else:
                values["sampler"], values["schedule"] = found
        else:
            left_out.append(f"{name} {value}")
    return ProgramDefaults(values, tuple(left_out))


def beside(path: Path) -> ProgramDefaults:
    """Return the defaults of AUTOMATIC1111's file beside a checkpoint."""
    try:
        values = json_object(read_file(path.with_name(path.stem + ".json"), MOST_BYTES))
    except FileError:
        return NONE
    vae = values.get("vae")
    if not isinstance(vae, str) or vae in ("", "None", "Automatic"):
        return NONE
    # The file may come from Windows.
    return ProgramDefaults({"vae": Path(vae.replace("\\", "/")).stem})


def fitting(found: ProgramDefaults, family: Family, variant: str) -> ProgramDefaults:
    """Return the defaults that a model of the family may have. The others are left out, and named."""
    values: dict[str, Any] = {}
    left_out = list(found.left_out)
    for name, value in found.values.items():
        try:
            check_defaults({name: value})
        except RequestError:
            left_out.append(f"{name} {value}")
            continue
        if _fits(name, value, family, variant):
            values[name] = value
        elif name != "schedule":
            left_out.append(f"{name} {value}")
    if "sampler" not in values:
        values.pop("schedule", None)
    return ProgramDefaults(check_defaults(values), tuple(left_out))


def refuse_unfitting(values: Mapping[str, Any], family: Family, variant: str) -> None:
    """Raise RequestError for a default that no request to a model of the family may have."""
    for name, value in values.items():
        if not _fits(name, value, family, variant):
            raise RequestError(name, value, f"does not fit {family.name}, so every request would be refused")
    schedules = SAMPLERS[values.get("sampler", "euler")].schedules_for(family.noise_of(variant).kind)
    if values.get("schedule") not in (None, *schedules):
        sampler = values.get("sampler", "euler")
        raise RequestError("schedule", values["schedule"], f"the sampler {sampler} has {', '.join(schedules)}")


def _fits(name: str, value: Any, family: Family, variant: str) -> bool:
    if name == "sampler":
        return bool(SAMPLERS[value].schedules_for(family.noise_of(variant).kind))
    if name in ("width", "height"):
        return value % family.latents.multiple == 0
    if name == "guidance":
        return family.defaults_of(variant).guidance is not None
    return True
