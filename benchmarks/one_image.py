"""Makes one image in a process that has imported what Safelight's own processes import, and prints its figures.

``benchmarks/forms.py --part flux`` runs it: ``python benchmarks/one_image.py ROOT MODEL LIMIT SIDE``. ``LIMIT`` is
``max_cache_ram_gb``. The image has SIDE×SIDE pixels and two steps in bf16.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from memory import Peak

from safelight.assembly.importing import open_engine
from safelight.request.schema import Request
from safelight.settings_sources import load_settings

STEPS = 2


def main() -> None:
    root, model, limit, side = sys.argv[1:]
    size = int(side)
    settings = load_settings(Path(root), attention_type="torch-sdp", precision="bf16", max_cache_ram_gb=float(limit))
    made = open_engine(settings)
    start = time.perf_counter()
    with Peak() as peak:
        request = Request("a cat", model, steps=STEPS, width=size, height=size, precision="bf16")
        drawn = next(made.generate(request))
    resident = made.memory()["places"]["host"]["resident"]
    figures = {
        "limit GB": float(limit),
        "seconds": time.perf_counter() - start,
        "a step": drawn.seconds.denoise / STEPS,
        "peak GB": peak.most / 2**30,
        "quantised in memory": sum("quantised" in one["component"] for one in resident),
        "pixels": drawn.pixels_sha256,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
