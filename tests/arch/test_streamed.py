"""Streamed parameters: whatever touches a weight gets it, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import memory, toy
from torch import nn
from torch.nn import functional as F

from safelight.arch.bind import bound
from safelight.arch.streamed import StreamedParameter
from safelight.errors import AbsentTensorError, BindingError
from safelight.memory.budget import HOST
from safelight.memory.residency import Residency
from safelight.memory.segments import cut
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import Overlay

CPU = torch.device("cpu")
X = torch.randn(2, toy.WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return toy.weights(5)


@pytest.fixture
def component(state: dict[str, torch.Tensor], tmp_path: Path) -> ComponentManifest:
    toy.write(tmp_path / "toy", state)
    return toy.manifest(tmp_path / "toy", state, "toy")


@pytest.fixture
def residency(component: ComponentManifest) -> Residency:
    """Room for one segment: everything is streamed."""
    return memory.host(max(segment.nbytes for segment in cut(component, torch.float32)))


def test_outputs_are_equal_bit_for_bit(component, residency: Residency, state) -> None:
    right = toy.output(state, X)
    with residency.lease(component, torch.float32) as lease, bound(toy.skeletons(), toy.key(CPU), lease) as module:
        assert all(isinstance(p, StreamedParameter) for p in module.parameters())
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(module(X), right)
    assert residency.ledger.peak(HOST) <= residency.ledger.budget(HOST)


def test_load_12_a_captured_or_wrapped_forward_streams_too(component, residency: Residency, state) -> None:
    right = toy.output(state, X)
    with residency.lease(component, torch.float32) as lease, bound(toy.skeletons(), toy.key(CPU), lease) as module:
        captured = module.forward
        first = module.layers[0].forward  # type: ignore[index, union-attr]
        module.layers[0].forward = lambda x: first(x)  # type: ignore[index, union-attr]
        with torch.no_grad():
            assert torch.equal(captured(X), right)
        # What was wrapped is unwrapped: else the image would be made again.
        del module.layers[0].forward  # type: ignore[index, union-attr]
    with pytest.raises(AbsentTensorError):
        captured(X)


def test_a_view_that_is_kept_keeps_its_bytes_and_not_the_slot(component, residency: Residency, state) -> None:
    residency.ledger.set_budget(HOST, 1 << 20)
    residency.most = None
    small = memory.host(max(s.nbytes for s in cut(component, torch.float32)) * 3)
    with small.lease(component, torch.float32) as lease, bound(toy.skeletons(), toy.key(CPU), lease) as module:
        with torch.no_grad():
            kept = module.tied.weight.t()  # type: ignore[union-attr, operator]
            module(X)
            module(X)
        assert torch.equal(kept, state["tied.weight"].t())


def test_what_may_be_asked_of_it_without_bringing_it(component, residency: Residency) -> None:
    with residency.lease(component, torch.float32) as lease, bound(toy.skeletons(), toy.key(CPU), lease) as module:
        weight = module.tied.weight  # type: ignore[union-attr]
        assert (weight.shape, weight.dtype, weight.device) == ((16, 16), torch.float32, CPU)
        assert "absent" in repr(weight)
        assert isinstance(weight, nn.Parameter)


def test_a_parameter_that_is_kept_raises_after_its_binding(component, residency: Residency) -> None:
    with residency.lease(component, torch.float32) as lease, bound(toy.skeletons(), toy.key(CPU), lease) as module:
        weight = module.tied.weight  # type: ignore[union-attr]
        weight + 1
    with pytest.raises(AbsentTensorError, match=r"tied\.weight"):
        weight + 1
    with pytest.raises(AbsentTensorError):
        F.linear(X, weight)


@pytest.mark.parametrize("whole", [True, False])
def test_overlays_take_the_weights_place_and_leave_them_alone(component, residency, state, whole: bool) -> None:
    place = memory.host() if whole else residency
    overlays = {name: Overlay(lambda weight: weight * 0.5 + 1, state[name].nbytes) for name in ("tied.weight", "scale")}
    changed = {name: tensor * 0.5 + 1 if name in overlays else tensor for name, tensor in state.items()}
    skeletons = toy.skeletons()
    if not whole:
        place.ledger.set_budget(HOST, place.ledger.budget(HOST) * 2)
    for _ in range(2):
        with (
            place.lease(component, torch.float32) as lease,
            bound(skeletons, toy.key(CPU), lease, overlays) as module,
            torch.no_grad(),
        ):
            assert torch.equal(module(X), toy.output(changed, X))
        with (
            place.lease(component, torch.float32) as lease,
            bound(skeletons, toy.key(CPU), lease) as module,
            torch.no_grad(),
        ):
            assert torch.equal(module(X), toy.output(state, X))
    assert not [entry for entry in place.ledger.entries() if "overlay" in entry.reason]


def test_overlays_that_do_not_fit_are_refused(component) -> None:
    place = memory.host()
    for overlays in (
        {"nobody.weight": Overlay(lambda w: w.clone(), 1)},
        {"scale": Overlay(lambda w: w.bfloat16(), 1)},
        {"scale": Overlay(lambda w: w[:3].clone(), 1)},
    ):
        with (
            place.lease(component, torch.float32) as lease,
            pytest.raises(BindingError),
            bound(toy.skeletons(), toy.key(CPU), lease, overlays),
        ):
            pass
    place.drop()
    assert place.ledger.stored(HOST) == 0
