"""Every tensor that is used changes the pixels when it is perturbed. Those that do not are named in the table.

`make test` tries one tensor of each component, `make test-all` tries all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.families import TinyFamily, drawn, tiny_families
from support.scale import ALL, thinned

import safelight
from safelight.memory.lease import ResidentSegment
from safelight.workers.local_engine import LocalEngine

SEED = 5
FACTOR = 1.5


def residents(engine: LocalEngine, tiny_family: TinyFamily) -> Iterator[tuple[str, str, ResidentSegment]]:
    """Yield the role, the name and the segment of each tensor in memory."""
    for piece, resident in engine.resources.residency.table.residents.items():
        roles = sorted(tiny_family.roles, reverse=True)
        role = next(role for role in roles if piece.component_key.startswith(role))
        for name in resident.buffer.tensors:
            yield role, name, resident


@pytest.mark.parametrize("name", thinned(tiny_families(), 2))
def test_every_tensor_changes_the_pixels(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_family = tiny_families()[name]
    tiny_family.make_references_small(monkeypatch)
    model = tiny_family.add_folder(root, tmp_path / "folder", SEED)
    colours = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(2))
    Image.fromarray((colours * 255).byte().numpy()).resize((64, 64)).save(tmp_path / "picture.png")
    request = tiny_family.ask(model, image=str(tmp_path / "picture.png"), strength=0.5)
    engine = safelight.open_engine(root, verify_transfers="off")
    right = drawn(engine, request)
    source = engine.resources.residency.source
    found = list(residents(engine, tiny_family))
    assert {role for role, _, _ in found} == set(tiny_family.roles)
    chance = random.Random(SEED)
    each = [[one for one in found if one[0] == role] for role in tiny_family.roles]
    chosen = found if ALL else [chance.choice(some) for some in each]
    silent: list[str] = []
    for role, tensor_name, resident in chosen:
        tensor = resident.buffer.tensors[tensor_name]
        before = tensor.clone()
        tensor.mul_(FACTOR).add_(0.1)
        resident.checksums = source.compute_checksums(resident.buffer)
        if drawn(engine, request) == right:
            silent.append(f"{role}.{tensor_name}")
        tensor.copy_(before)
        resident.checksums = source.compute_checksums(resident.buffer)
    assert drawn(engine, request) == right
    known = [one for one in silent if any(re.fullmatch(pattern, one) for pattern in tiny_family.without_effect)]
    assert silent == known
