"""The only place that wires parts together.

OpenMP's idle threads sleep here instead of spinning. Beside another busy program, spinning makes an image take ten
times as long (`benchmarks/contention.py`). The variable must be set before torch loads OpenMP. A value that the user
has set stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
