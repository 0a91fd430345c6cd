"""``safelight top`` shows the slots of a running server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import serving

SAFELIGHT = (sys.executable, "-P", "-m", "safelight.cli")


def top(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SAFELIGHT, "--root", str(root), "top", *options], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_slots_and_the_queue_are_shown(tmp_path: Path) -> None:
    with serving.serving(tmp_path) as server, server.client() as http:
        serving.ended(http, serving.make(http)["id"])
        http.post("/api/v1/queue/pause")
        serving.make(http)
        printed = top(tmp_path, "--once")
        assert printed.returncode == 0, printed.stderr
        assert "paused · 1 waiting · 1.0 images/min" in printed.stdout
        assert "starter-noto" in printed.stdout
        found = json.loads(top(tmp_path, "--json").stdout)
        assert [slot["resident"] for slot in found["slots"]] == [["starter-noto"]]
        assert len(found["queue"]["waiting"]) == 1


def test_without_a_server_it_says_so(tmp_path: Path) -> None:
    refused = top(tmp_path)
    assert (refused.returncode, "no server runs" in refused.stderr) == (2, True)
    refused = top(tmp_path, "--server", "http://127.0.0.1:9")
    assert (refused.returncode, "does not answer" in refused.stderr) == (2, True)
