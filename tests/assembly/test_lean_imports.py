"""A process of Safelight's own does not load what it does not use, and what was postponed works when it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
loaded = [name for name in (*inner, "sqlalchemy") if name in sys.modules]
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
