"""A program that uses Safelight as a library stays as it was, and imports nothing of the server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import gc, json, logging, os, random, sys, threading, warnings
import numpy as np, torch
import diffusers, transformers
logging.getLogger("diffusers").setLevel(logging.INFO)

def state():
    levels = {n: logging.getLogger(n).level for n in (None, "diffusers", "transformers", "torch")}
    draws = [random.getstate()[1][:3], np.random.get_state()[1][:3].tolist(), torch.get_rng_state()[:40].tolist()]
    return json.dumps([dict(os.environ), {str(k): v for k, v in levels.items()}, draws, gc.get_freeze_count(),
                       gc.isenabled(), torch.get_num_threads(), torch.get_default_dtype().is_floating_point,
                       torch.is_grad_enabled()], sort_keys=True)

before = state()
import safelight
engine = safelight.open_engine()
image = next(engine.generate(safelight.Request("{red|green} apple", "starter-noto", steps=1)))
engine.close()
after = state()
one, other = json.loads(before), json.loads(after)
packages = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"changed": [[a, b] for a, b in zip(one, other) if a != b], "packages": packages}))
"""

SERVERS_ONLY = {"alembic", "fastapi", "prometheus_client", "sqlalchemy", "starlette", "uvicorn"}
"""Packages that an image does not need: importing them would take a second."""


@pytest.mark.full
def test_a_host_is_left_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["changed"] == []
    assert "diffusers" in found["packages"]
    assert not SERVERS_ONLY & set(found["packages"])
