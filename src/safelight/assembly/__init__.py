"""The only place that wires parts together.

OpenMP's idle threads sleep here instead of spinning. Beside another busy program, spinning makes an image take ten
times as long (`benchmarks/contention.py`).

torch asks for huge pages for tensors of 2 MiB and more. The kernel provides and clears the memory of a large tensor at
its first use, for most operations anew, and huge pages make that several times as fast (`benchmarks/decoding.py`). Only
Linux has them.

The variables must be set before torch is imported. A value that the user has set stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
