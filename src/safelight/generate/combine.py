"""A model with adapters over it: a model like any other, whose components are made when they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from safelight.adapters.stack import Layer, Leasing, over
from safelight.library.chosen import Chosen
from safelight.library.model import Model
from safelight.weights.manifest import ComponentManifest


def combined(model: Model, chosen: Sequence[Chosen], leasing: Leasing) -> Model:
    """The model under the adapters; the model itself when none changes anything. ``leasing`` holds their tensors."""

    def component(base: ComponentManifest) -> ComponentManifest:
        layers = [
            Layer(
                one.adapter.tensors,
                tuple((part, one.strength(base.role, part.block)) for part in one.fit.parts.get(base.role, ())),
                one.scale(base.role),
            )
            for one in chosen
        ]
        return over(base, layers, leasing)

    components = tuple(component(base) for base in model.manifest.components)
    return replace(model, manifest=replace(model.manifest, components=components))
