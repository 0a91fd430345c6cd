"""The memory as bars: models, working memory and free memory; and the reasons of the last plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from safelight.catalog.cards import Card
from safelight.weights.adapter_file import ROLE as ADAPTER

COLOURS = ("#b5371f", "#8a6d3b", "#4d7358", "#4a6d8c", "#7a5a86", "#a0704f", "#5f7f7a", "#8c5a5a")


def show(into: ui.element, memory: Mapping[str, Any], library: Sequence[Card]) -> None:
    """Draw the memory, if it has changed since the last call.

    ``memory``: the worker's last report.
    ``library``: the cards of models and adapters, for their names.
    """
    places: Mapping[str, Any] = memory.get("places", {})
    shown = json.dumps(places, default=str, sort_keys=True)
    if getattr(into, "safelight_shown", None) == shown:
        return
    into.safelight_shown = shown  # pyright: ignore[reportAttributeAccessIssue]
    into.clear()
    with into:
        if not places:
            ui.label("Nothing is in memory yet.").classes("sl-quiet")
        for name, place in places.items():
            _place(name, place, library)


def _place(name: str, place: Mapping[str, Any], library: Sequence[Card]) -> None:
    budget = max(1, place["budget"])
    models = _by_model(place["resident"], library)
    with ui.element("div").style("display: flex; flex-direction: column; gap: 7px; width: 100%"):
        ui.label(f"{name}: {_size(place['stored'])} of {_size(budget)}")
        parts = [(COLOURS[n % len(COLOURS)], size) for n, size in enumerate(models.values())]
        parts.append(("var(--quiet)", place["promised"]))
        bar = "".join(f'<i style="width:{size / budget:.2%};background:{colour}"></i>' for colour, size in parts)
        ui.html(f'<div class="sl-bar">{bar}</div>', sanitize=False).classes("w-full")
        for number, (model, size) in enumerate(models.items()):
            _line(COLOURS[number % len(COLOURS)], model, size)
        if place["promised"]:
            _line("var(--quiet)", "for computing and copying", place["promised"])
        ui.label(f"The budget is set by {place['set_by']}.").classes("sl-quiet")
        reasons: dict[str, int] = {}
        for step in place["last_plan"]:
            reason = f"{step['action']}: {step['reason']}"
            reasons[reason] = reasons.get(reason, 0) + step["nbytes"]
        with ui.expansion("Why").props('dense header-class="sl-quiet"').classes("w-full"):
            for reason, size in reasons.items():
                ui.label(f"{_size(size)} {reason}").classes("sl-quiet")


def _line(colour: str, text: str, size: int) -> None:
    with ui.element("div").classes("sl-row"):
        ui.element("span").classes("sl-key").style(f"background: {colour}")
        ui.label(text).classes("sl-text sl-quiet")
        ui.label(_size(size)).classes("sl-quiet")


def _by_model(resident: Sequence[Mapping[str, Any]], library: Sequence[Card]) -> dict[str, int]:
    """Return the bytes of each model.

    A component of several models has the names of all of them; a component of no model has the name of its role.
    """
    out: dict[str, int] = {}
    for holding in resident:
        role, digest, *_ = holding["component"].split(" ")
        owners = [
            one.name
            for one in library
            if any(known == role and whole.startswith(digest) for known, whole in one.components)
        ]
        name = ", ".join(owners) or ("adapters" if role == ADAPTER else f"a {role.replace('_', ' ')}")
        out[name] = out.get(name, 0) + holding["nbytes"]
    return out


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
