"""Krea 2 needs newer libraries than the oldest that Safelight supports."""

from importlib.util import find_spec
from pathlib import Path

import pytest

SEED = 5

NEEDED = ("diffusers.models.transformers.transformer_krea2", "transformers.models.qwen3_vl")

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder of a Raw, its transformer in shards."""
    from support import krea2

    return krea2.write_folder(tmp_path_factory.mktemp("krea2") / "raw", SEED, distilled=False, shard="200KB")


@pytest.fixture(scope="session")
def turbo(raw: Path) -> Path:
    """The folder of a Turbo with the same weights."""
    from support import krea2

    return krea2.as_turbo(raw, raw.with_name("turbo"))
