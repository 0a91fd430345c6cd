"""A model with adapters over it: a model like any other, whose components are made when they are wanted."""

from __future__ import annotations

from dataclasses import replace

from safelight.adapters.stack import Layer, Leasing, over
from safelight.library.chosen import Settled
from safelight.library.model import Model
from safelight.weights.manifest import ComponentManifest


def combined(model: Model, settled: Settled, leasing: Leasing) -> Model:
    """The model with the VAE that was asked for, under the adapters; the model itself when nothing changes it.
    ``leasing`` holds the adapters' tensors."""

    def component(base: ComponentManifest) -> ComponentManifest:
        layers = [
            Layer(
                one.adapter.tensors,
                tuple((part, one.strength(base.role, part.block)) for part in one.fit.parts.get(base.role, ())),
                one.scale(base.role),
            )
            for one in settled.loras
        ]
        return over(base, layers, leasing)

    parts = [settled.vae if settled.vae and p.role == "vae" else p for p in model.manifest.components]
    components = tuple(component(part) for part in parts)
    return replace(model, manifest=replace(model.manifest, components=components))
