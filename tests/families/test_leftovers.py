"""What the libraries' modules hold besides their weights: each buffer and each cached tensor is named, real, counted
in the ledger, and constant. Sizes and rebuilt skeletons leave memory as it was.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TinyFamily, drawn, tiny_families
from support.scale import thinned, times
from torch import nn

import safelight
from safelight.memory.account import BUFFERS, BufferAccount
from safelight.memory.budget import HOST, Ledger
from safelight.models.skeleton import Skeleton, SkeletonCache, SkeletonKey

SEED = 5


def keys(tiny_family: TinyFamily) -> dict[str, SkeletonKey]:
    return {
        role: SkeletonKey(tiny_family.name, role, config, torch.float32, "torch-sdp")
        for role, config in tiny_family.configs().items()
    }


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from tensors_in(vars(value))


def leftovers(module: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return the tensors of a module that are no parameters, by the name of the buffer or attribute."""
    found: dict[str, list[torch.Tensor]] = {}
    for path, child in module.named_modules():
        attributes = {name: value for name, value in vars(child).items() if name not in ("_parameters", "_modules")}
        for name, value in {**attributes.pop("_buffers"), **attributes}.items():
            if some := list(tensors_in(value)):
                found[f"{path}.{name}"] = some
    return found


@pytest.mark.parametrize("name", tiny_families())
def test_every_leftover_is_named_real_counted_and_compared(name: str) -> None:
    tiny_family = tiny_families()[name]
    named: dict[str, set[str]] = {}
    for role, key in keys(tiny_family).items():
        ledger = Ledger({HOST: 1 << 30})
        skeleton = SkeletonCache(account=BufferAccount(ledger, HOST)).take(key)
        found = leftovers(skeleton.module)
        named |= {role: set(found)} if found else {}
        tensors = [tensor for some in found.values() for tensor in some]
        assert not any(tensor.is_meta for tensor in tensors)
        # The copies with which they are compared count, too.
        nbytes = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert (skeleton.nbytes, ledger.stored(HOST)) == (nbytes, nbytes)
        for tensor in tensors:
            before = tensor.clone()
            tensor.view(-1)[0].add_(1)
            assert skeleton.differences() != []
            tensor.copy_(before)
            assert skeleton.differences() == []
    assert named == tiny_family.leftovers


def caches_of(module: nn.Module) -> set[str]:
    """Return the functions with an ``lru_cache`` in the classes of a module and in the files that define them."""
    found: set[str] = set()
    for kind in {base for child in module.modules() for base in type(child).__mro__ if base not in nn.Module.__mro__}:
        for place in (vars(kind), vars(sys.modules[kind.__module__])):
            cached = {name: value for name, value in place.items() if hasattr(value, "cache_info")}
            own = (name for name, value in cached.items() if value.__module__ == kind.__module__)
            found |= {f"{kind.__module__}:{name}" for name in own}
    return found


@pytest.mark.parametrize("name", tiny_families())
def test_no_library_function_of_a_module_has_a_cache(name: str) -> None:
    found = {one for key in keys(tiny_families()[name]).values() for one in caches_of(Skeleton(key).module)}
    assert found == set(tiny_families()[name].cached_functions)


def live_bytes() -> int:
    """Bytes of all tensors of this process that Python knows."""
    gc.collect()
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if type(one) in (torch.Tensor, nn.Parameter) and not one.is_meta
    }
    return sum(storages.values())


@pytest.mark.parametrize("name", thinned(tiny_families()))
def test_sizes_and_rebuilt_skeletons_leave_memory_as_it_was(
    name: str, root: Path, tmp_path: Path, as_for_users: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del as_for_users
    tiny_family = tiny_families()[name]
    tiny_family.make_references_small(monkeypatch)
    model = tiny_family.add_folder(root, tmp_path / "folder", SEED)
    engine = safelight.open_engine(root, verify_transfers="off")
    ledger, skeletons = engine.resources.residency.ledger, engine.resources.skeletons

    def buffers() -> int:
        return sum(entry.nbytes for entry in ledger.entries() if entry.reason == BUFFERS)

    step = tiny_family.family.latents.multiple
    request = tiny_family.ask(model, steps=1)
    right = drawn(engine, request)
    # The check of an image's appearance keeps sums for each VAE, from the second image on.
    drawn(engine, tiny_family.ask(model, steps=1, seed=4))
    drawn(engine, tiny_family.ask(model, steps=1, seed=5))
    before = live_bytes(), buffers()
    assert before[1] > 0
    for number in range(times(3, 50)):
        size = {"width": 64 + step * (number % 8), "height": 64 + step * (number // 8)}
        drawn(engine, tiny_family.ask(model, steps=1, **size))
    assert (live_bytes(), buffers()) == before
    for _ in range(times(2, 20)):
        skeletons.clear()
        assert drawn(engine, request) == right
    # The bytes of a module that died are credited at the next use of a skeleton.
    gc.collect()
    drawn(engine, request)
    assert (live_bytes(), buffers()) == before
    assert skeletons.check() == []
    engine.close()
