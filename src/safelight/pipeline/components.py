"""Loads and holds a model's components without computing an image."""

from __future__ import annotations

import contextlib

from safelight.catalog.model import Model
from safelight.errors import OutOfMemoryError
from safelight.memory.lease import Use
from safelight.memory.plan import Piece
from safelight.memory.prefetch import prefetch_component
from safelight.memory.segments import needed_segments, piece_keys
from safelight.pipeline.resources import Resources, dtype_of
from safelight.pipeline.stages import skeleton_key, unread_tensors
from safelight.request.run_settings import RunSettings
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import OverlaidComponent


def component_keys(model: Model, settings: RunSettings) -> tuple[str, ...]:
    """Return the planner's names of a model's components, in the order of use."""
    family = model.family
    found = (piece_keys(model.manifest.component(role), dtype_of(settings, family, role)) for role in model.roles)
    return tuple(key for keys in found for key in keys)


def needed_pieces(model: Model, settings: RunSettings) -> frozenset[Piece]:
    """Return the planner's pieces of a model's components that the model reads."""
    found: set[Piece] = set()
    for role in model.roles:
        component, dtype = model.manifest.component(role), dtype_of(settings, model.family, role)
        found.update(one.piece for one in needed_segments(component, dtype, unread_tensors(model, component)))
    return frozenset(found)


def use_of(model: Model, component: ComponentManifest) -> Use:
    """Return how a model uses a component once, without working memory."""
    return Use(unread=unread_tensors(model, component))


def prefetch(model: Model, resources: Resources) -> bool:
    """Prefetch as much of a model as fits without evicting anything. Returns whether all of it is resident."""
    settings, family = resources.run_settings, model.family
    found = {role: model.manifest.component(role) for role in model.roles}
    return all(
        prefetch_component(resources.residency, one, dtype_of(settings, family, role), use_of(model, one))
        for role, one in found.items()
    )


def pin(model: Model, resources: Resources) -> contextlib.ExitStack:
    """Lease all components of a model as a whole. The leases end when the returned stack is closed.

    Raises OutOfMemoryError if a component does not fit as a whole.
    """
    with contextlib.ExitStack() as stack:
        for role in model.roles:
            component, dtype = model.manifest.component(role), dtype_of(resources.run_settings, model.family, role)
            lease = stack.enter_context(resources.residency.lease(component, dtype, use_of(model, component)))
            if lease.ring is not None:
                hint = f"A pinned model is in memory as a whole, and its {role} does not fit beside what is in use."
                raise OutOfMemoryError(f"Pinning {model.name}", 0, None, hint, final=True)
        return stack.pop_all()


def build_skeletons(model: Model, resources: Resources, seamless: str = "") -> None:
    """Build a model's skeletons, so that the first image need not."""
    for component in model.manifest.components:
        key = skeleton_key(
            model, component, dtype_of(resources.run_settings, model.family, component.role), resources, seamless
        )
        resources.skeletons.put_back(resources.skeletons.take(key))


def preload(model: Model, resources: Resources) -> None:
    """Make a model's components resident, the denoiser last, without computing.

    Those with adapters are left out: adding them to the weights computes.
    """
    for component in sorted(model.manifest.components, key=lambda component: component.role == model.family.denoiser):
        if isinstance(component, OverlaidComponent):
            continue
        dtype = dtype_of(resources.run_settings, model.family, component.role)
        with resources.residency.lease(component, dtype, use_of(model, component)):
            pass
