"""Reading beside computing: nobody waits for bytes that are not its own."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import memory
from support.scale import thinned, times

from safelight.devices import transfer
from safelight.devices.simulated import simulated
from safelight.devices.transfer import Transfers
from safelight.errors import IntegrityError, OutOfMemoryError
from safelight.memory.budget import HOST
from safelight.memory.lease import ONCE, Use
from safelight.memory.prefetch import prefetch_component
from safelight.memory.residency import Residency
from safelight.memory.segments import split_into_segments
from safelight.weights.manifest import ComponentManifest, Manifest

F32 = torch.float32


@pytest.fixture(scope="module")
def two(tiny: Path) -> tuple[Manifest, Manifest]:
    return memory.manifest(tiny / "a.safetensors"), memory.manifest(tiny / "b.safetensors")


def whole(component: ComponentManifest) -> int:
    return sum(segment.nbytes for segment in split_into_segments(component, F32))


class Disk:
    """Reads at ``rate`` bytes a second, and stops where it is told to. ``reads``: how many tensors were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rate = 4e6
        self.reads = 0
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.fail: set[str] = set()
        self._fill = transfer._fill
        monkeypatch.setattr(transfer, "_fill", self._slowly)

    def _slowly(self, read: transfer.Read, descriptor: int, view: memoryview, offset: int) -> None:
        self.reads += 1
        self.begun.set()
        time.sleep(view.nbytes / self.rate)
        assert self.go_on.wait(30)
        if read.name in self.fail:
            self.fail.discard(read.name)
            raise OSError("the disk is gone")
        self._fill(read, descriptor, view, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """``work`` in a thread of its own; within the context it goes on. What it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whatever it was, the test looks at it
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield raised
    thread.join(30)
    assert not thread.is_alive()


def exact(residency: Residency) -> bool:
    """The ledger equals the slabs that live, and nothing is held or on its way."""
    pool = residency.pool
    there = pool.used_bytes + pool.cached_bytes + pool.lingering_bytes
    quiet = not residency.table.pending and not any(usage.leases for usage in residency.usage_by_component())
    return residency.ledger.stored(residency.place) == there and quiet


def sound(residency: Residency, component: ComponentManifest) -> bool:
    """Whether all of it is resident, and as it was produced."""
    with residency.lease(component, F32) as lease:
        return lease.ring is None and lease.verify() == []


def held(residency: Residency, component: ComponentManifest, use: Use = ONCE) -> None:
    with residency.lease(component, F32, use):
        pass


def test_steps_and_questions_do_not_wait_for_what_is_read_ahead(two: tuple[Manifest, Manifest], disk: Disk) -> None:
    residency, running, coming = memory.host(), two[0].component("unet"), two[1].component("unet")
    disk.rate = 1e12
    with residency.lease(running, F32) as lease:
        disk.rate, disk.reads = whole(coming) / 1.5, 0
        waits = list[float]()
        with beside(lambda: prefetch_component(residency, coming, F32)):
            while disk.reads == 0 or residency.table.pending:
                start = time.perf_counter()
                lease.adjust()
                residency.usage_by_component()
                residency.plan_lease(coming, F32)
                waits.append(time.perf_counter() - start)
                time.sleep(0.01)
        assert len(waits) > 50
        # A lock that is held while a file is read makes most of them wait; a busy machine, a few.
        assert sorted(waits)[int(len(waits) * 0.95)] < 0.1
        assert lease.ring is None
    assert sound(residency, coming)
    assert exact(residency)


@pytest.mark.parametrize("by", ["fill", "lease"])
def test_other_leases_begin_and_end_meanwhile(two: tuple[Manifest, Manifest], disk: Disk, by: str) -> None:
    residency, other, coming = memory.host(), two[0].component("vae"), two[1].component("unet")
    disk.rate = 1e12
    held(residency, other)
    disk.begun.clear()
    disk.go_on.clear()
    work = (lambda: prefetch_component(residency, coming, F32)) if by == "fill" else (lambda: held(residency, coming))
    with beside(work) as raised:
        assert disk.begun.wait(10)
        with residency.lease(other, F32, Use(working_bytes=1000)) as lease:
            assert lease.verify() == []
            assert residency.check() == []
        residency.shrink_to_budget()
        residency.drop(other.digest)
        assert not disk.go_on.is_set()
        disk.go_on.set()
    assert raised == []
    assert sound(residency, coming)
    assert exact(residency)


def test_what_another_reads_is_waited_for_and_read_once(two: tuple[Manifest, Manifest], disk: Disk) -> None:
    residency, component = memory.host(), two[0].component("unet")
    disk.rate = 1e12
    disk.go_on.clear()
    leases: list[frozenset[int]] = []

    def hold() -> None:
        with residency.lease(component, F32) as lease:
            leases.append(frozenset(h.buffer.slab.base.data_ptr() for h in lease.residents.values()))

    with beside(hold), beside(hold), beside(lambda: prefetch_component(residency, component, F32)):
        assert disk.begun.wait(10)
        time.sleep(0.1)
        disk.go_on.set()
    assert len(set(leases)) == 1
    assert disk.reads <= len(component.tensors) + sum(
        t.nbytes // (transfer.CHUNK_ELEMENTS * 4) for t in component.tensors
    )
    assert exact(residency)


@pytest.mark.parametrize("by", ["fill", "lease"])
def test_when_the_reader_fails_who_waits_reads_itself(two: tuple[Manifest, Manifest], disk: Disk, by: str) -> None:
    residency, component = memory.host(), two[0].component("unet")
    disk.rate = 1e12
    disk.fail = {component.tensors[len(component.tensors) // 2].name}
    disk.go_on.clear()
    work = (
        (lambda: prefetch_component(residency, component, F32))
        if by == "fill"
        else (lambda: held(residency, component))
    )
    with beside(work) as first:
        assert disk.begun.wait(10)
        with beside(lambda: held(residency, component)) as second:
            time.sleep(0.1)
            disk.go_on.set()
    assert [str(error) for error in first] == ["the disk is gone"]
    assert second == []
    first.clear()
    assert sound(residency, component)
    assert exact(residency)


def test_what_is_dropped_while_it_is_read_goes_with_its_last_lease(two: tuple[Manifest, Manifest], disk: Disk) -> None:
    residency, component = memory.host(), two[0].component("unet")
    disk.rate = 1e12
    disk.go_on.clear()
    with beside(lambda: held(residency, component)) as raised:
        assert disk.begun.wait(10)
        residency.drop(component.digest)
        disk.go_on.set()
    assert raised == []
    assert residency.resident_bytes == 0
    assert exact(residency)
    held(residency, component)
    assert residency.resident_bytes == whole(component)


def test_who_needs_the_room_gets_it(two: tuple[Manifest, Manifest], disk: Disk) -> None:
    """What is read as a prefetch never makes another lease fail or stream: it ends, and goes."""
    wanted, favour = two[0].component("unet"), two[1].component("unet")
    residency = memory.host(whole(wanted) * 3 // 2, partial=False)
    disk.rate = whole(favour) / 1.0
    with beside(lambda: prefetch_component(residency, favour, F32)) as raised:
        assert disk.begun.wait(10)
        with residency.lease(wanted, F32) as lease:
            assert lease.ring is None
            assert lease.verify() == []
    assert raised == []
    assert residency.ledger.peak(HOST) <= residency.ledger.budget(HOST)
    assert exact(residency)


def test_the_budget_shrinks_while_another_is_read(two: tuple[Manifest, Manifest], disk: Disk) -> None:
    """What runs stays resident; what is read for later is dropped when it is there."""
    running, coming = two[0].component("unet"), two[1].component("unet")
    residency = memory.host()
    disk.rate = 1e12
    with residency.lease(running, F32) as lease:
        disk.rate = whole(coming) / 0.5
        disk.begun.clear()
        with beside(lambda: prefetch_component(residency, coming, F32)):
            assert disk.begun.wait(10)
            residency.ledger.set_budget(HOST, whole(running) + 1000)
            lease.adjust()
            assert lease.ring is None
            assert lease.resident_bytes == whole(running)
        lease.adjust()
        assert residency.ledger.stored(HOST) <= whole(running) + 1000
    assert exact(residency)


def test_an_image_gets_its_room_on_the_host_beside_a_prefetch(
    two: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one UNet on the host: what is prefetched is held there while it is copied, and no longer."""
    wanted, favour = (manifest.component("unet") for manifest in two)
    begun = threading.Event()
    push = Transfers.push

    def slowly(self: Transfers, *given: Any) -> Any:
        arrived = push(self, *given)
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            time.sleep(0.02)
        return arrived

    monkeypatch.setattr(Transfers, "push", slowly)
    with simulated(nbytes=1 << 30) as device:
        there = memory.on(device, 1 << 30, whole(wanted))
        with beside(lambda: prefetch_component(there, favour, F32)) as raised:
            assert begun.wait(30)
            held(there, wanted)
        assert not raised
        assert sound(there, wanted)


def test_who_waits_may_give_up(two: tuple[Manifest, Manifest], disk: Disk) -> None:
    residency, component = memory.host(), two[0].component("unet")
    disk.rate = 1e12
    disk.go_on.clear()
    with beside(lambda: held(residency, component)) as raised:
        assert disk.begun.wait(10)

        def interrupted(*_: object) -> bool:
            raise KeyboardInterrupt

        for coming in residency.table.pending.values():
            coming.finished.wait = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            held(residency, component, Use(working_bytes=1000))
        disk.go_on.set()
    assert raised == []
    assert residency.ledger.reserved(HOST) == 0
    assert exact(residency)


def test_wrong_bytes_fail_for_everybody_who_waited(two: tuple[Manifest, Manifest], tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(two[0].components[0].tensors[0].path.read_bytes())
    component = memory.manifest(path).component("unet")
    data = bytearray(path.read_bytes())
    data[component.tensors[len(component.tensors) // 2].offset] ^= 1
    path.write_bytes(data)
    residency = memory.host()
    disk.rate = 1e12
    disk.go_on.clear()
    with beside(lambda: held(residency, component)) as first, beside(lambda: held(residency, component)) as second:
        assert disk.begun.wait(10)
        time.sleep(0.1)
        disk.go_on.set()
    assert [type(error) for error in (*first, *second)] == [IntegrityError, IntegrityError]
    first.clear()
    second.clear()
    assert residency.resident_bytes == 0
    assert exact(residency)


@pytest.mark.parametrize("streamed", thinned([True, False]))
def test_the_device_goes_on_while_its_host_reads(two: tuple[Manifest, Manifest], disk: Disk, streamed: bool) -> None:
    """Also what is streamed there: its copies are made while the host reads another component."""
    running, coming = two[0].component("unet"), two[1].component("unet")
    disk.rate = 1e12
    with simulated(nbytes=1 << 30) as device:
        there = memory.on(device, whole(running) // 2 if streamed else memory.PLENTY)
        host = memory.tiers(there)[1]
        with there.lease(running, F32, Use(forward_passes=99)) as lease:
            assert (lease.ring is not None) == streamed

            def step() -> float:
                start = time.perf_counter()
                lease.adjust()
                for name in list(lease.shapes)[::4]:
                    with lease.use_tensors([name]) as found:
                        found.clear()
                there.usage_by_component()
                return time.perf_counter() - start

            alone = max(step() for _ in range(5))
            disk.rate = whole(coming) / times(1, 2)  # seconds
            disk.begun.clear()
            taken: list[float] = []
            work = (lambda: held(host, coming)) if streamed else (lambda: prefetch_component(there, coming, F32))
            with beside(work) as raised:
                assert disk.begun.wait(10)
                while host.table.pending:
                    taken.append(step())
            assert raised == []
            assert len(taken) > 3
            assert max(taken) < alone * 2 + 0.2
    assert streamed or sound(there, coming)


@pytest.mark.full
def test_many_threads_at_once(two: tuple[Manifest, Manifest]) -> None:
    """Loads, favours, drops, budgets and steps at random: nothing is wrong, lost or held in the end. That three need
    more than there is may well be."""

    components = [manifest.component(role) for manifest in two for role in ("unet", "vae", "text_encoder")]
    room = sum(map(whole, components[:3]))
    residency = memory.host(room)
    ends = time.monotonic() + times(2, 4)

    def used(component: ComponentManifest, chance: random.Random) -> None:
        use = Use(forward_passes=2, working_bytes=chance.choice((0, 9999)))
        with contextlib.suppress(OutOfMemoryError), residency.lease(component, F32, use) as lease:
            lease.adjust()
            for name in list(lease.shapes)[:: chance.randint(1, 60)]:
                with lease.use_tensors([name]) as found:
                    assert torch.isfinite(found[0]).all()
                    found.clear()
            assert lease.verify() == []

    def busy(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < ends:
            component = chance.choice(components)
            match chance.randrange(6):
                case 0 | 1 | 2:
                    used(component, chance)
                case 3:
                    prefetch_component(residency, component, F32)
                case 4:
                    residency.drop(chance.choice((None, component.digest)))
                case _:
                    residency.ledger.set_budget(HOST, room * chance.randint(8, 12) // 10)
                    residency.shrink_to_budget()

    with beside(lambda: busy(1)) as a, beside(lambda: busy(2)) as b, beside(lambda: busy(3)) as c:
        pass
    assert [*a, *b, *c] == []
    residency.drop()
    assert residency.ledger.stored(HOST) == residency.ledger.reserved(HOST) == 0
    assert exact(residency)
