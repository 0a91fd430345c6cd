"""Manifests: identity is content, and what is read back is what was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from support import checkpoints

from safelight.catalog.identify import identify
from safelight.errors import CorruptFileError
from safelight.weights import manifest as manifests
from safelight.weights.manifest import Manifest, from_json, hash_components, to_json


@pytest.fixture
def made(tiny: Path) -> Manifest:
    layout = identify(tiny / "xl.safetensors").layout
    assert layout is not None
    return hash_components(layout.components)


def test_json_and_back(made: Manifest) -> None:
    assert from_json(Path("m"), json.loads(json.dumps(to_json(made)))) == made


def test_each_digest_is_that_of_the_bytes(made: Manifest) -> None:
    data = made.files[0].path.read_bytes()
    for component in made.components:
        for tensor in component.tensors:
            part = data[tensor.offset : tensor.offset + tensor.nbytes]
            assert tensor.xxh3 == xxhash.xxh3_128(part).hexdigest()


def test_the_whole_digest_covers_every_component(made: Manifest) -> None:
    changed = (replace(made.components[0], digest="0" * 64), *made.components[1:])
    assert manifests.whole_digest(changed) != made.digest


def test_a_manifest_whose_digest_does_not_follow_from_its_components_is_refused(made: Manifest) -> None:
    data = json.loads(json.dumps(to_json(made)))
    data["components"][0]["digest"] = "0" * 64
    with pytest.raises(CorruptFileError, match="does not match its components"):
        from_json(Path("m"), data)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1)
    layout = identify(path).layout
    assert layout is not None
    fired = []

    def change(_: int) -> None:
        if not fired:
            fired.append(True)
            path.touch()

    with pytest.raises(CorruptFileError, match="changed while it was read"):
        hash_components(layout.components, change)


def test_load_06_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1)
    layout = identify(path).layout
    assert layout is not None
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CorruptFileError, match="cut off"):
        hash_components(layout.components)


def test_hints_see_every_kind_of_change(tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1)
    layout = identify(path).layout
    assert layout is not None
    made = hash_components(layout.components)
    assert made.changed_files() == []
    data = path.read_bytes()
    path.unlink()
    assert made.changed_files() == [path]
    path.write_bytes(data)
    assert made.changed_files() == [path]
