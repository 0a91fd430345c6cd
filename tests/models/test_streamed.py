"""Streamed parameters: whatever touches a weight gets it, and nothing of it stays."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from support import memory, toy
from torch import nn
from torch.nn import functional as F

from safelight.errors import AbsentTensorError, IntegrityError
from safelight.memory.budget import HOST
from safelight.memory.lease import Use
from safelight.memory.residency import Residency
from safelight.memory.scratch import Scratch
from safelight.memory.segments import component_key, split_into_segments
from safelight.models.bind import bind
from safelight.models.streamed import StreamedParameter
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import Bring, OpenedOverlays, Overlay, with_overlays

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
    return memory.host(max(segment.nbytes for segment in split_into_segments(component, torch.float32)))


def test_outputs_are_equal_bit_for_bit(component, residency: Residency, state) -> None:
    right = toy.output(state, X)
    with residency.lease(component, torch.float32) as lease, bind(toy.skeletons(), toy.key(CPU), lease) as module:
        assert all(isinstance(p, StreamedParameter) for p in module.parameters())
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(module(X), right)
    assert residency.ledger.peak(HOST) <= residency.ledger.budget(HOST)


def test_load_12_a_captured_or_wrapped_forward_streams_too(component, residency: Residency, state) -> None:
    right = toy.output(state, X)
    with residency.lease(component, torch.float32) as lease, bind(toy.skeletons(), toy.key(CPU), lease) as module:
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
    residency.planner.max_bytes = None
    small = memory.host(max(s.nbytes for s in split_into_segments(component, torch.float32)) * 3)
    with small.lease(component, torch.float32) as lease, bind(toy.skeletons(), toy.key(CPU), lease) as module:
        with torch.no_grad():
            kept = module.tied.weight.t()  # type: ignore[union-attr, operator]
            module(X)
            module(X)
        assert torch.equal(kept, state["tied.weight"].t())


def test_what_may_be_asked_of_it_without_bringing_it(component, residency: Residency) -> None:
    with residency.lease(component, torch.float32) as lease, bind(toy.skeletons(), toy.key(CPU), lease) as module:
        weight = module.tied.weight  # type: ignore[union-attr]
        assert (weight.shape, weight.dtype, weight.device) == ((16, 16), torch.float32, CPU)
        assert "absent" in repr(weight)
        assert isinstance(weight, nn.Parameter)


def test_a_parameter_that_is_kept_raises_after_its_binding(component, residency: Residency) -> None:
    with residency.lease(component, torch.float32) as lease, bind(toy.skeletons(), toy.key(CPU), lease) as module:
        weight = module.tied.weight  # type: ignore[union-attr]
        weight + 1
    with pytest.raises(AbsentTensorError, match=r"tied\.weight"):
        weight + 1
    with pytest.raises(AbsentTensorError):
        F.linear(X, weight)


@pytest.mark.parametrize("whole", [True, False])
def test_overlays_take_the_weights_place_and_leave_them_alone(component, residency, state, whole: bool) -> None:
    """Streamed, each is computed twice: then it is read from where it was kept."""
    place, computed = memory.host() if whole else residency, list[str]()

    def over(name: str) -> Overlay:
        def function(weight: torch.Tensor) -> None:
            computed.append(name)
            weight.mul_(0.5).add_(1)

        return function

    @contextlib.contextmanager
    def open_overlays(bring: Bring) -> Generator[OpenedOverlays]:
        yield OpenedOverlays({name: over(name) for name in touched})

    touched = frozenset({"tied.weight", "scale"})
    changed = {name: tensor * 0.5 + 1 if name in touched else tensor for name, tensor in state.items()}
    skeletons, under = toy.skeletons(), with_overlays(component, "f" * 64, touched, open_overlays)
    for _ in range(2):
        for what, right in ((under, changed), (component, state)):
            with (
                place.lease(what, torch.float32, Use(forward_passes=5)) as lease,
                bind(skeletons, toy.key(CPU), lease) as made,
            ):
                for _ in range(5):
                    with torch.no_grad():
                        assert torch.equal(made(X), toy.output(right, X))
    assert len(computed) == 2 if whole else len(computed) <= 8
    own = {piece.component_key for piece in (segment.piece for segment in split_into_segments(under, torch.float32))}
    assert own == {component_key(component, torch.float32), component_key(under, torch.float32)}


def test_what_comes_out_otherwise_than_before_is_an_error(component) -> None:
    times = iter((1.0, 1.0, 1.5, 1.5))

    @contextlib.contextmanager
    def open_overlays(bring: Bring) -> Generator[OpenedOverlays]:
        yield OpenedOverlays({"scale": lambda weight: weight.add_(next(times))})

    under, place = with_overlays(component, "f" * 64, frozenset({"scale"}), open_overlays), memory.host()
    for _ in range(2):
        with place.lease(under, torch.float32):
            pass
        place.drop()
    with pytest.raises(IntegrityError, match="differs from the first time"), place.lease(under, torch.float32):
        pass
    place.drop()
    # The first could have been wrong, so it is not compared with the next.
    with place.lease(under, torch.float32):
        pass
    place.drop()
    assert place.ledger.stored(HOST) == 0


def test_what_is_not_streamed_is_never_kept_on_disk(component, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it was computed in an earlier lease, and dropped since."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: pytest.fail("written"))

    @contextlib.contextmanager
    def open_overlays(bring: Bring) -> Generator[OpenedOverlays]:
        yield OpenedOverlays({"scale": lambda weight: weight.add_(1)})

    under, place = with_overlays(component, "f" * 64, frozenset({"scale"}), open_overlays), memory.host()
    for _ in range(3):
        with place.lease(under, torch.float32):
            pass
        place.drop()


def test_what_was_kept_on_disk_and_spoiled_there_is_computed_again(
    component, residency, state, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, spoiled = Scratch.read, list[int]()

    def spoiling(self: Scratch, index: int, into: torch.Tensor) -> bool:
        there = read(self, index, into)
        if there:
            into[0] += 1
            spoiled.append(index)
        return there

    @contextlib.contextmanager
    def open_overlays(bring: Bring) -> Generator[OpenedOverlays]:
        yield OpenedOverlays({"scale": lambda weight: weight.add_(1)})

    monkeypatch.setattr(Scratch, "read", spoiling)
    under = with_overlays(component, "f" * 64, frozenset({"scale"}), open_overlays)
    with residency.lease(under, torch.float32, Use(forward_passes=4)) as lease:
        for _ in range(4):
            for name in lease.shapes:
                with lease.use_tensors([name]) as found:
                    assert torch.equal(found.pop(), state[name] + (name == "scale"))
    assert spoiled
