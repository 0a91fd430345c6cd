"""What a busy program beside it costs an image, with OpenMP's idle threads spinning (its default) and sleeping (ours).

``python benchmarks/contention.py``: seconds of denoising, a starter, 20 steps, the median of three, alone and beside a
process that keeps a core busy.

Predicted before the first run: alone, sleeping costs a tenth more, as threads are woken at every operation; beside a
busy process spinning is five times slower, as threads wait for one that is not scheduled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile


def seconds(policy: str, times: int, steps: int) -> float:
    """Of denoising, the median of so many processes."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    taken = []
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "safelight.cli", "generate", "red apple", "-m", "starter-noto", "--json"]
        command += ["--steps", str(steps)]
        for _ in range(times):
            done = subprocess.run([*command, "--out", out], check=True, capture_output=True, text=True, env=environment)
            taken.append(json.loads(done.stdout.splitlines()[0])["seconds"]["denoise"])
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="processes of which the median is taken")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--policies", nargs="+", default=["ACTIVE", "PASSIVE"], help="OpenMP's, a column each")
    asked = parser.parse_args()

    def row() -> str:
        return " | ".join(f"{seconds(policy, asked.times, asked.steps):.2f}" for policy in asked.policies)

    print("| | " + " | ".join(f"{policy} s" for policy in asked.policies) + " |\n|---|" + "---|" * len(asked.policies))
    print(f"| alone | {row()} |", flush=True)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        print(f"| beside a busy process | {row()} |")
    finally:
        busy.kill()


if __name__ == "__main__":
    main()
