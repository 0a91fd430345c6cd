"""A1111's titles of models: ``name [hash]``."""

from __future__ import annotations

from safelight.assembly.services import Services
from safelight.catalog.cards import Card
from safelight.catalog.model import Model
from safelight.server import intake
from safelight.server.problems import RefusedError


def title_of(model: Model | Card) -> str:
    """Return the title of a model. One that was imported and has not been read yet has no hash."""
    return f"{model.name} [{model.digest[:10]}]" if model.digest else model.name


def by_title(control: Services, title: str) -> Model:
    """Return the model with this A1111 title (``name [hash]``), name, file name or hash.

    Raises ModelNotFoundError when there is none.
    Raises RefusedError when the title has another model's hash, or several models have this file name.
    """
    is_title = title.endswith("]") and " [" in title
    name, _, mark = title.removesuffix("]").rpartition(" [") if is_title else (title, "", "")
    named = control.library.find_by_name(name)
    if named is not None:
        if not named.digest.startswith(mark):
            message = f"the model {name} now has the hash {named.digest[:10]}, not {mark}"
            raise RefusedError(409, "which_model", message, "sd_model_checkpoint")
        return named
    cards = control.library.cards()
    found = [card for card in cards if card.name == name]
    hashes = [card for card in cards if card.digest and name in (card.digest, card.digest[:10])]
    found = found or hashes or [card for card in cards if name in (card.path.name, card.stem)]
    if len(found) > 1:
        names = ", ".join(card.name for card in found)
        raise RefusedError(409, "which_model", f"{name} can be {names}; send the model's name", "sd_model_checkpoint")
    return intake.model_named(control, found[0].name if found else name)
