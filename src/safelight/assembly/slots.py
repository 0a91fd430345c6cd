"""The slots of a server: which devices it uses, and the settings of each one's worker. No torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from safelight.devices import machine
from safelight.devices.gpus import VISIBLE, nvidia_gpus
from safelight.errors import SettingError
from safelight.settings import Settings

GB = 1 << 30

_ENTRY = re.compile(r"([a-z][a-z0-9_]*)(?::([0-9]+))?")


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """A slot to open.

    ``settings``: of its worker. ``environment``: variables of the worker's processes.
    """

    name: str
    settings: Settings
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def plan_slots(settings: Settings) -> list[SlotPlan]:
    """Return the slots that the settings ask for.

    Several slots share the machine: each one's weights use an equal share of the host's memory, and slots on the CPU an
    equal share of its threads.
    Raises SettingError for a device that cannot have a slot.
    """
    names = [name for entry in settings.devices for name in _names(entry, settings)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SettingError("devices", repeated[0], "devices", "names a device twice")
    if len(names) == 1 and ":" not in names[0]:
        return [SlotPlan(names[0], settings.model_copy(update={"device": names[0]}))]
    host = settings.max_cache_ram_gb or machine.tightest_limit().available / GB
    on_cpu = sum(_device(name) == "cpu" for name in names)
    threads = settings.threads or os.cpu_count() or 1
    plans: list[SlotPlan] = []
    for name in names:
        own: dict[str, object] = {"device": _device(name), "max_cache_ram_gb": host / len(names)}
        if _device(name) == "cpu":
            own["threads"] = max(1, threads // on_cpu)
        visible = {VISIBLE: name.partition(":")[2]} if _device(name) == "cuda" and ":" in name else {}
        plans.append(SlotPlan(name, settings.model_copy(update=own), visible))
    return plans


def _device(name: str) -> str:
    return name.partition(":")[0]


def _names(entry: str, settings: Settings) -> Sequence[str]:
    """Return the names of the slots of an entry: ``cuda:1`` is one GPU, ``cpu:2`` are two slots on the CPU."""
    found = _ENTRY.fullmatch(entry)
    if found is None:
        raise SettingError("devices", entry, "devices", "must be auto, a device, cuda:NUMBER or cpu:COUNT")
    device, number = found.groups()
    if device == "auto":
        if settings.device != "auto":
            return [settings.device]
        gpus = nvidia_gpus()
        return [f"cuda:{gpu}" for gpu in gpus] if len(gpus) > 1 else ["auto"]
    if device == "cuda" and number is not None:
        return [entry]
    if number is None:
        return [device]
    if device not in ("cpu", "simulated") or int(number) < 1:
        raise SettingError("devices", entry, "devices", f"{device} has no numbered slots")
    return [f"{device}:{place}" for place in range(int(number))]
