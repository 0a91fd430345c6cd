"""FLUX.2 needs newer libraries than the oldest that Safelight supports."""

from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDED = ("diffusers.models.transformers.transformer_flux2", "transformers.models.qwen3")

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]

SEED = 5


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the distilled variant. Tests must not change it."""
    from support import flux2

    return flux2.write_folder(tmp_path_factory.mktemp("flux2") / "distilled", SEED, distilled=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the base variant. Tests must not change it."""
    from support import flux2

    return flux2.write_folder(tmp_path_factory.mktemp("flux2") / "base", SEED, distilled=False)
