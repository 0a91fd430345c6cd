"""Stores the defaults of a model: what a request gets for fields that it does not name."""

from __future__ import annotations

from dataclasses import replace

from safelight.catalog.cards import find_card, not_own
from safelight.catalog.library import Library
from safelight.catalog.lock import library_lock
from safelight.catalog.program_defaults import refuse_unfitting
from safelight.families.registry import families
from safelight.request.model_defaults import ModelDefaults, check_defaults


def set_defaults(library: Library, name: str, values: ModelDefaults) -> ModelDefaults:
    """Replace a model's defaults. Nothing is read. Returns them in their order.

    Raises RequestError for a field or value that cannot be a default, InputError for a starter.
    Raises ModelNotFoundError for an unknown name.
    """
    checked = check_defaults(values)
    card = find_card(library.cards(), library.root, name)
    known = families().get(card.summary["base"])
    if known is not None:
        refuse_unfitting(checked, known, card.summary["variant"] or next(iter(known.variants)))
    with library_lock(library.root):
        model, unread = library.records.get(name), library.unread.find(name, models=True)
        if model is not None:
            library.records.write(replace(model, defaults=checked))
        elif unread is not None:
            library.unread.change(unread, defaults=checked)
        else:
            raise not_own(card, name, "changed")
    return checked
