"""A server that stores its jobs and images in PostgreSQL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from support import postgres, serving
from support.serving import ASK, ended

pytestmark = postgres.needs_postgres


@pytest.fixture
def cluster() -> Generator[postgres.Cluster]:
    made = postgres.Cluster()
    yield made
    made.close()


@pytest.mark.full
def test_a_server_and_its_database_are_killed_and_every_job_ends_once(
    cluster: postgres.Cluster, tmp_path: Path
) -> None:
    (tmp_path / "safelight.yaml").write_text(f"database_url: {cluster.new()}\n")
    server = serving.start(tmp_path)
    with server.client() as http:
        first = http.post("/api/v1/generate", json=ASK).json()["id"]
        assert ended(http, first)["state"] == "done"
        [right] = http.get(f"/api/v1/jobs/{first}/images").json()
        jobs = [http.post("/api/v1/generate", json={**ASK, "steps": 30}).json()["id"] for _ in range(4)]
        # The database goes away while a job runs: what the worker made waits, and requests are refused by name.
        while http.get("/api/v1/queue").json()["running"] == []:
            time.sleep(0.02)
        cluster.stop()
        answer = http.get("/api/v1/jobs")
        assert (answer.status_code, answer.json()["error"]) == (507, "storage")
        assert "PostgreSQL at 127.0.0.1" in answer.json()["message"]
        time.sleep(1.5)
        cluster.start()
        assert ended(http, jobs[0], 60)["state"] == "done"
        while http.get("/api/v1/queue").json()["running"] == []:
            time.sleep(0.02)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    with serving.serving(tmp_path) as again, again.client() as http:
        for job in jobs:
            assert ended(http, job, 60)["state"] == "done"
            [image] = http.get(f"/api/v1/jobs/{job}/images").json()
            assert http.get(image["url"]).status_code == 200
        assert http.post("/api/v1/generate", json=ASK).status_code == 202
        assert http.get(f"/api/v1/images/{right['id']}").json()["pixels_sha256"] == right["pixels_sha256"]
        assert not (tmp_path / "safelight.db").exists()


def test_two_servers_do_not_share_a_database(cluster: postgres.Cluster, tmp_path: Path) -> None:
    environment = {**os.environ, "SAFELIGHT_DATABASE_URL": cluster.new()}
    command = [sys.executable, "-m", "safelight.cli", "serve", "--port", "0", "--root"]
    with subprocess.Popen([*command, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True, env=environment) as first:
        try:
            assert first.stdout is not None
            assert "Safelight is at" in first.stdout.readline()
            second = subprocess.run(
                [*command, str(tmp_path / "b")],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
                timeout=120,
            )
            assert second.returncode == 2
            assert "another Safelight server uses PostgreSQL at" in second.stderr
            assert environment["SAFELIGHT_DATABASE_URL"] not in second.stderr
        finally:
            first.terminate()
