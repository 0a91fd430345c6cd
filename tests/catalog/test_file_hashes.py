"""The hashes by which other programs name a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safelight.catalog.file_hashes import FileHashes
from safelight.catalog.library import Library


def test_hashes_of_files(tiny: Path, root: Path, tmp_path: Path) -> None:
    """They are computed once for a file with a size and time."""
    path = tmp_path / "a.safetensors"
    data = (tiny / "a.safetensors").read_bytes()
    path.write_bytes(data)
    hashes = FileHashes(root)
    assert hashes.known(path) is None
    found = hashes.of(path)
    header = 8 + int.from_bytes(data[:8], "little")
    assert found is not None
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.autov3 == hashlib.sha256(data[header:]).hexdigest()
    assert found.autov1 == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert FileHashes(root).known(path) == found
    for digits, same in ((found.sha256[:10], True), (found.autov3[:12].upper(), True), (found.autov1, True)):
        assert found.match(digits) == same
    assert not found.match(found.sha256[:6])
    assert not found.match("0123456789")
    Library(root).add(path, "mine")
    cards = Library(root).cards()
    assert [getattr(hashes.find(digits, cards), "name", "") for digits in (found.sha256[:10], "f" * 10)] == ["mine", ""]
    path.write_bytes(data + b" ")
    assert hashes.known(path) is None
