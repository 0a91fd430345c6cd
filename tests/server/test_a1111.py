"""Which model a title means."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safelight.errors import ModelNotFoundError
from safelight.library.library import Library
from safelight.server.apis.a1111 import by_title
from safelight.server.problems import RefusedError


def test_state_19_a_name_is_never_another_models_file_name(tiny: Path, tmp_path: Path) -> None:
    library = Library(tmp_path)
    other = library.add(tiny / "b.safetensors", "a")
    model = library.add(tiny / "a.safetensors", "x")
    control: Any = SimpleNamespace(library=library)
    assert by_title(control, "a").digest == other.digest
    assert by_title(control, f"a [{other.digest[:10]}]").digest == other.digest
    assert by_title(control, "b").digest == other.digest
    assert by_title(control, model.digest[:10]).name == "x"
    with pytest.raises(RefusedError, match="not 0123456789"):
        by_title(control, "a [0123456789]")
    library.add(tiny / "b.safetensors", "again")
    with pytest.raises(RefusedError, match="a, again"):
        by_title(control, "b.safetensors")
    with pytest.raises(ModelNotFoundError):
        by_title(control, "nobody")
