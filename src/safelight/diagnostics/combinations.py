"""Lists combinations of a model with adapters, for the doctor and for soaks. Adapters of the starters count too."""

from __future__ import annotations

import contextlib

from safelight.catalog.model import Model
from safelight.errors import InputError, IntegrityError
from safelight.request.adapters import Lora
from safelight.request.schema import Request
from safelight.resolve.resolve import resolve
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS
from safelight.workers.local_engine import LocalEngine

STRENGTH = 0.7

MOST_ADAPTERS = 4
"""Limit of adapters that are tried with one model."""


def list_combinations(engine: LocalEngine, model: Model, prompt: str) -> list[tuple[Lora, ...]]:
    """Return combinations of adapters for a model: none, each intact weight adapter that fits, and two at once."""
    fitting: list[Lora] = []
    for adapter in engine.catalog.adapters.all():
        lora = Lora(adapter.name, STRENGTH)
        if adapter.kind in WEIGHT_ADAPTER_KINDS and len(fitting) < MOST_ADAPTERS:
            with contextlib.suppress(InputError, IntegrityError):
                resolve(Request(prompt, model.name, loras=(lora,)), engine.catalog, model=model)
                fitting.append(lora)
    both = [tuple(fitting[:2])] if len(fitting) > 1 else []
    return [(), *((lora,) for lora in fitting), *both]
