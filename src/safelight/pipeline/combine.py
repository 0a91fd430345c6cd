"""Combines a model with adapters: replaces its components by components with overlays.

The overlays are computed only when a segment is loaded.
"""

from __future__ import annotations

from dataclasses import replace

from safelight.catalog.model import Model
from safelight.pipeline.adapter_stack import AdapterLayer, Leasing, RowReplacement, stack_adapters
from safelight.resolve.contents import Contents
from safelight.weights.manifest import ComponentManifest

_TOKENS = "token_embedding.weight"


def combine(contents: Contents, leasing: Leasing) -> Model:
    """Return the model with replaced components, overlays of the adapters, and ControlNets appended.

    Returns an equal model if the request has none of them.
    ``leasing``: leases the adapters' tensors while overlays are computed.
    """

    def component(underlying: ComponentManifest) -> ComponentManifest:
        layers = [
            AdapterLayer(
                one.adapter.component,
                tuple(
                    (change, one.strength(underlying.role, change.block))
                    for change in one.match.changes.get(underlying.role, ())
                ),
                one.scale(underlying.role),
            )
            for one in contents.loras
        ]
        replacements = [
            RowReplacement(
                one.adapter.component, one.tensor_names[underlying.role], _token_embedding(underlying), one.tokens
            )
            for one in contents.inversions
            if underlying.role in one.tensor_names
        ]
        return stack_adapters(underlying, layers, leasing, replacements)

    model = contents.model
    by_role = {part.role: part for part in contents.replacements}
    parts = [by_role.get(part.role, part) for part in model.manifest.components]
    components = (*(component(part) for part in parts), *(control.component for control in contents.controls))
    return replace(model, manifest=replace(model.manifest, components=components))


def _token_embedding(encoder: ComponentManifest) -> str:
    return next(tensor.name for tensor in encoder.tensors if tensor.name.endswith(_TOKENS))
