"""The files of a machine: fetched in ranges, from a shared folder, within a budget, and again if they are damaged."""

from __future__ import annotations

import io
import secrets
import shutil
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image as PILImage
from support.jobs import resolved

from safelight.catalog import starters
from safelight.catalog.catalog import Catalog
from safelight.cluster.file_server import FileServer
from safelight.cluster.needed import Needed, Packer
from safelight.cluster.node_files import NodeFiles
from safelight.errors import FileError, StorageError
from safelight.request.schema import Request

GB = 1 << 30


@pytest.fixture
def served(tmp_path: Path) -> Generator[tuple[Catalog, FileServer, httpx.Client]]:
    """A server's catalog with a model of its own name, its file server, and a client of it."""
    root = tmp_path / "server"
    root.mkdir()
    path = root / "mine.safetensors"
    shutil.copy(next(model for model in starters.models() if model.name == "starter-noto").path, path)
    catalog = Catalog.under(root)
    catalog.library.add(path, "mine")
    token = secrets.token_urlsafe()
    server = FileServer("127.0.0.1", token)
    client = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {token}"})
    yield catalog, server, client
    client.close()
    server.stop()


def needs(catalog: Catalog, server: FileServer) -> Needed:
    """What a job needs, as if no machine had the starters: their content is the model's, too."""
    job = resolved(catalog.library.root, Request("x", "mine"))
    needed = Packer(catalog).needed_for(job)
    server.allow(file.path for record in needed.records for file in record.files)
    assert [record.digest for record in needed.records] == [catalog.library.get("mine").digest]
    return needed


@pytest.fixture
def node(
    served: tuple[Catalog, FileServer, httpx.Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> NodeFiles:
    monkeypatch.setattr(starters, "cards", list)
    monkeypatch.setattr(starters, "models", list)
    return NodeFiles(tmp_path / "node", served[2], GB, shared=False)


def test_a_record_is_packed_once_until_it_changes(served: tuple[Catalog, FileServer, httpx.Client]) -> None:
    catalog = served[0]
    job, packer = resolved(catalog.library.root, Request("x", "mine")), Packer(catalog)
    [first] = packer.needed_for(job).records
    [again] = packer.needed_for(job).records
    assert again is first
    catalog.library.rename("mine", "ours")
    [renamed] = packer.needed_for(job).records
    assert (first.values["name"], renamed.values["name"]) == ("mine", "ours")


def test_a_file_is_fetched_once_and_again_if_it_changes(
    served: tuple[Catalog, FileServer, httpx.Client], node: NodeFiles
) -> None:
    needed = needs(*served[:2])
    node.ensure(needed)
    [copy] = node._cache.glob("*/*.safetensors")
    before = copy.stat().st_mtime_ns
    node.ensure(needed)
    assert copy.stat().st_mtime_ns == before
    assert not node.is_damaged(needed)
    data = bytearray(copy.read_bytes())
    data[-10:] = bytes(10)
    copy.write_bytes(data)
    assert node.is_damaged(needed)
    node.ensure(needed)
    assert copy.read_bytes() == Path(needed.records[0].files[0].path).read_bytes()
    assert not node.is_damaged(needed)


def test_an_interrupted_transfer_goes_on_where_it_stopped(
    served: tuple[Catalog, FileServer, httpx.Client], node: NodeFiles
) -> None:
    needed = needs(*served[:2])
    [record] = needed.records
    place = node._place(record)
    place.mkdir(parents=True)
    whole = Path(record.files[0].path).read_bytes()
    (place / "0-mine.safetensors.part").write_bytes(whole[:1000])
    asked: list[str] = []
    node._client.event_hooks = {"request": [lambda request: asked.append(request.headers["range"])]}
    node.ensure(needed)
    assert asked == ["bytes=1000-"]
    assert (place / "0-mine.safetensors").read_bytes() == whole


def test_a_shared_folder_is_used_in_place(
    served: tuple[Catalog, FileServer, httpx.Client], node: NodeFiles, tmp_path: Path
) -> None:
    needed = needs(*served[:2])
    shared = NodeFiles(tmp_path / "other", served[2], GB, shared=True)
    shared.ensure(needed)
    assert not list(shared._cache.glob("*/*"))
    # What was damaged once is not taken from there again.
    shared.distrust(needed)
    shared.ensure(needed)
    assert list(shared._cache.glob("*/*.safetensors"))
    del node


def test_without_room_it_says_so_and_old_copies_go_first(
    served: tuple[Catalog, FileServer, httpx.Client], node: NodeFiles, tmp_path: Path
) -> None:
    needed = needs(*served[:2])
    size = needed.records[0].files[0].size
    small = NodeFiles(tmp_path / "small", served[2], size - 1, shared=False)
    with pytest.raises(StorageError, match="cluster_cache_gb"):
        small.ensure(needed)
    roomy = NodeFiles(tmp_path / "roomy", served[2], size + 5, shared=False)
    old = roomy._cache / "old"
    old.mkdir(parents=True)
    (old / "model").write_bytes(bytes(100))
    roomy.ensure(needed)
    assert not old.exists()
    del node


def test_only_allowed_files_and_only_with_the_token(
    served: tuple[Catalog, FileServer, httpx.Client], node: NodeFiles, tmp_path: Path
) -> None:
    catalog, server, client = served
    needed = needs(catalog, server)
    path = needed.records[0].files[0].path
    assert httpx.get(f"{server.url}/file", params={"path": path}).status_code == 401
    (tmp_path / "secret").write_text("x")
    assert client.get("/file", params={"path": str(tmp_path / "secret")}).status_code == 404
    other = replace(needed.records[0].files[0], path=str(tmp_path / "secret"))
    wrong = replace(needed, records=(replace(needed.records[0], files=(other,)),))
    with pytest.raises(FileError, match="cannot be fetched"):
        node.ensure(wrong)


def test_input_images_come_with_the_job(served: tuple[Catalog, FileServer, httpx.Client], node: NodeFiles) -> None:
    catalog, *_ = served
    out = io.BytesIO()
    PILImage.new("RGB", (8, 8), "red").save(out, "PNG")
    digest = catalog.inputs.store("image", out.getvalue())
    node.ensure(Needed((), {digest: catalog.inputs.read(digest)}))
    assert node.catalog.inputs.stored_digest(digest) == digest


def test_a_slot_that_has_its_files_does_not_wait_for_another_that_fetches(
    served: tuple[Catalog, FileServer, httpx.Client], node: NodeFiles
) -> None:
    needed = needs(*served[:2])
    node.ensure(needed)
    other = NodeFiles(node._root, served[2], GB, shared=False)
    with ThreadPoolExecutor(1) as slot, node._lock:
        slot.submit(other.ensure, needed).result(30)


def test_two_slots_of_a_machine_fetch_a_file_once(
    served: tuple[Catalog, FileServer, httpx.Client], node: NodeFiles
) -> None:
    """They share the cache. Without the lock, both append to the same unfinished file."""
    needed = needs(*served[:2])
    asked: list[str] = []

    def slow(request: httpx.Request) -> None:
        asked.append(request.headers["range"])
        time.sleep(0.3)

    served[2].event_hooks = {"request": [slow]}
    other = NodeFiles(node._root, served[2], GB, shared=False)
    with ThreadPoolExecutor(2) as slots:
        for done in [slots.submit(files.ensure, needed) for files in (node, other)]:
            done.result(30)
    assert asked == ["bytes=0-"]
    assert not node.is_damaged(needed)
