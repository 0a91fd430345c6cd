"""A model in a combination: a model like any other, whose components are made when they are wanted."""

from __future__ import annotations

from dataclasses import replace

from safelight.catalog.model import Model
from safelight.pipeline.adapter_stack import Inserted, Layer, Leasing, over
from safelight.resolve.contents import Contents
from safelight.weights.manifest import ComponentManifest

_TOKENS = "token_embedding.weight"


def combined(contents: Contents, leasing: Leasing) -> Model:
    """The model with the components that were asked for in place of its own, under the adapters, and the ControlNets
    behind them; the model itself when nothing changes it. ``leasing`` holds the adapters' tensors."""

    def component(base: ComponentManifest) -> ComponentManifest:
        layers = [
            Layer(
                one.adapter.tensors,
                tuple((part, one.strength(base.role, part.block)) for part in one.fit.parts.get(base.role, ())),
                one.scale(base.role),
            )
            for one in contents.loras
        ]
        inserted = [
            Inserted(one.adapter.tensors, one.vectors[base.role], _token_embedding(base), one.tokens)
            for one in contents.inversions
            if base.role in one.vectors
        ]
        return over(base, layers, leasing, inserted)

    model = contents.model
    own = {part.role: part for part in contents.own}
    parts = [own.get(part.role, part) for part in model.manifest.components]
    components = (*(component(part) for part in parts), *(control.tensors for control in contents.controls))
    return replace(model, manifest=replace(model.manifest, components=components))


def _token_embedding(encoder: ComponentManifest) -> str:
    return next(tensor.name for tensor in encoder.tensors if tensor.name.endswith(_TOKENS))
