"""What is public, and what stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import safelight


def modules_after(code: str) -> set[str]:
    """The modules that are loaded in a fresh process after ``code``."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_all_is_complete_and_sorted() -> None:
    public = {name for name in vars(safelight) if not name.startswith("_")}
    public -= {"annotations", "Any", "Path", "TYPE_CHECKING"}
    public -= {name for name in public if type(vars(safelight)[name]).__name__ == "module"}
    assert sorted(safelight.__all__) == sorted(public)
    assert safelight.__all__ == sorted(safelight.__all__)


@pytest.mark.parametrize(
    "code",
    [
        "import safelight",
        "from safelight.cli import main",
        "import safelight.assembly.library",
        "import safelight.cli.main as m; m.app(['models', 'list'], standalone_mode=False)",
    ],
)
def test_no_torch_where_nothing_is_computed(code: str) -> None:
    loaded = modules_after(code)
    assert not {"torch", "diffusers", "transformers"} & loaded
    # Importing either takes as long as one of these commands.
    assert not {"numpy", "structlog"} & loaded


def test_every_folder_is_described() -> None:
    home = Path(safelight.__file__).parent
    structure = (home.parents[1] / "docs/structure.md").read_text()
    for folder in home.iterdir():
        if folder.is_dir() and list(folder.glob("*.py")):
            assert f"`{folder.name}/`" in structure, folder.name
