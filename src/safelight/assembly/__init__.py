"""The only place that wires parts together.

OpenMP's idle threads sleep here instead of spinning. Beside another busy program, spinning makes an image take ten
times as long (`benchmarks/contention.py`).

torch asks for huge pages for tensors of 2 MiB and more. Most operations write to a new tensor, whose memory the kernel
clears page by page. With huge pages there are far fewer of them (`benchmarks/decoding.py`). Only Linux has huge pages.

The variables must be set before torch is imported. A value that the user has set stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
