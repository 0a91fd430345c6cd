"""Anima needs a newer diffusers than the oldest that Safelight supports."""

from importlib.util import find_spec
from pathlib import Path

import pytest

SEED = 5

NEEDED = (
    "diffusers.models.condition_embedders",
    "diffusers.models.condition_embedders.condition_embedder_anima",
    "diffusers.modular_pipelines",
    "diffusers.modular_pipelines.anima",
)

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that diffusers' modular pipeline saves."""
    from support import anima

    return anima.write_folder(tmp_path_factory.mktemp("anima") / "tiny", SEED)
