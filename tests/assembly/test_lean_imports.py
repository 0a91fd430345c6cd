"""A process of Safelight's own does not load what it does not use, and what was postponed works when it is used."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
from safelight.assembly.importing import import_engine
from safelight.assembly.lean_imports import COMPILER, STATISTICS, _Postponed
import_engine()
import torch
with torch.device("meta"):
    torch.nn.Linear(2, 2)
postponed = [name for name in (COMPILER, STATISTICS) if type(sys.modules[name]) is _Postponed]
loaded = [name for name in ("torch._dynamo.eval_frame", "scipy.stats._stats_py", "sqlalchemy") if name in sys.modules]
import scipy.stats
median = scipy.stats.beta.ppf(0.5, 2, 2)
compiled = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
print(json.dumps([postponed, loaded, float(median), float(compiled), type(sys.modules[COMPILER]).__name__]))
"""


def test_what_is_postponed_works_when_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    postponed, loaded, median, compiled, kind = json.loads(done.stdout.splitlines()[-1])
    assert postponed == ["torch._dynamo", "scipy.stats"]
    assert loaded == []
    assert (round(median, 6), compiled, kind) == (0.5, 2.0, "module")
