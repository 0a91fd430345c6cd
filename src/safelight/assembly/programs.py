"""The commands of the processes that compute for others. With -P, Python imports no modules from the current folder."""

from __future__ import annotations

import sys

WORKER = (sys.executable, "-P", "-m", "safelight.assembly.worker_main")
ZYGOTE = (sys.executable, "-P", "-m", "safelight.assembly.zygote")
