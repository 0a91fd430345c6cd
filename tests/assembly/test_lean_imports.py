"""A process of Safelight's own does not load what it does not use, and what was postponed works when it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from support.families import tiny_families

import safelight
from safelight.request.schema import Request

PROGRAM = """
import json, sys
from safelight.assembly.importing import import_engine
from safelight.assembly.lean_imports import COMPILER, INTEGRATION, OPTIMIZATION, STATISTICS, _Postponed
import_engine()
import torch
with torch.device("meta"):
    torch.nn.Linear(2, 2)
names = (COMPILER, STATISTICS, INTEGRATION, OPTIMIZATION)
postponed = [name for name in names if type(sys.modules[name]) is _Postponed]
inner = ("torch._dynamo.eval_frame", "scipy.stats._stats_py", "scipy.integrate._quadpack_py", "scipy.optimize._lsap")
unused = (*inner, "sqlalchemy", "torch.distributed.tensor", "sympy", "peft", "accelerate")
loaded = [name for name in unused if name in sys.modules]
assert torch.distributed.is_available()
# transformers has imported this function by its name.
from transformers.loss.loss_for_object_detection import linear_sum_assignment
rows, columns = linear_sum_assignment([[4, 1], [2, 3]])
from diffusers.schedulers.scheduling_lms_discrete import integrate
area, _ = integrate.quad(lambda x: x, 0, 1)
import scipy.stats
median = scipy.stats.beta.ppf(0.5, 2, 2)
compiled = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
more = [int(n) for n in columns], area
kind = type(sys.modules[COMPILER]).__name__
print(json.dumps([postponed, loaded, float(median), float(compiled), kind, *more]))
"""


@pytest.mark.full
def test_what_is_postponed_works_when_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    postponed, loaded, median, compiled, kind, columns, area = json.loads(done.stdout.splitlines()[-1])
    assert postponed == ["torch._dynamo", "scipy.stats", "scipy.integrate", "scipy.optimize"]
    assert loaded == []
    assert (round(median, 6), compiled, kind) == (0.5, 2.0, "module")
    assert (columns, area) == ([1, 0], 0.5)


DRAW = """
import json, sys
from pathlib import Path
from safelight.assembly.importing import open_engine
from safelight.request.stored import read_request
from safelight.settings_sources import load_settings

engine = open_engine(load_settings(Path(sys.argv[1])))
print(json.dumps([next(engine.generate(read_request(one))).pixels_sha256 for one in json.loads(sys.argv[2])]))
assert "torch.distributed.tensor" not in sys.modules
"""


@pytest.mark.full
def test_every_family_draws_the_same_in_a_process_with_lean_imports(root: Path, tmp_path: Path) -> None:
    requests: list[Request] = []
    for name, family in tiny_families().items():
        if not family.references:
            requests.append(family.ask(family.add_folder(root, tmp_path / name, 5)))
    engine = safelight.open_engine(root)
    right = [next(engine.generate(request)).pixels_sha256 for request in requests]
    engine.close()
    asked = json.dumps([asdict(request) for request in requests])
    command = [sys.executable, "-W", "ignore", "-c", DRAW, str(root), asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == right
    assert len(right) > 6
