"""Large tensors have huge pages in Safelight's processes: clearing small ones takes longer than many operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import safelight.assembly
import torch

tensor = torch.ones(64 << 20, dtype=torch.uint8)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(int(line.split()[1]) >> 10 for line in lines if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    not SUPPORT.exists() or "[never]" in SUPPORT.read_text(), reason="this system has no transparent huge pages"
)
def test_large_tensors_have_huge_pages() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) >= 60, "MB of 64 that have huge pages"
