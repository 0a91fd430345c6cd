"""The only place that wires parts together.

OpenMP's idle threads sleep instead of spinning: beside any other busy program, spinning makes an image take ten times
as long (`benchmarks/contention.py`). It has to be said before torch loads OpenMP; who sets it otherwise is obeyed.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
