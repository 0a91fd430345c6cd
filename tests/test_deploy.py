"""The files that start the server as a service: they are right, and their commands serve and stop."""

from __future__ import annotations

import configparser
import os
import plistlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from support import forking
from support.measured import give

from safelight.workers.running_server import find

HOME = Path(__file__).parents[1]
UNIT, AGENT = HOME / "deploy/safelight.service", HOME / "deploy/safelight.plist"


def command_of_unit() -> list[str]:
    read = configparser.ConfigParser(interpolation=None, strict=False)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read(UNIT)
    return shlex.split(read["Service"]["ExecStart"].replace("%h", "$HOME"))


def command_of_agent() -> list[str]:
    return plistlib.loads(AGENT.read_bytes())["ProgramArguments"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("%h/.local/bin/safelight", "/bin/true")
    (tmp_path / "safelight.service").write_text(text)
    command = ["systemd-analyze", "verify", "--user", str(tmp_path / "safelight.service")]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    complaints = [line for line in done.stderr.splitlines() if "safelight.service" in line]
    assert complaints == [], done.stderr


def test_the_agent_starts_again_only_after_a_failure() -> None:
    read = plistlib.loads(AGENT.read_bytes())
    assert (read["Label"], read["RunAtLoad"], read["KeepAlive"]) == ("safelight", True, {"SuccessfulExit": False})


def worker_of(url: str) -> str:
    """The state of the server's worker; "" before the server accepts connections."""
    try:
        return httpx.get(f"{url}/api/v1/health").json()["worker"]
    except httpx.HTTPError:
        return ""


@pytest.mark.full
def test_a_server_that_is_stopped_while_it_starts_ends(root: Path) -> None:
    """A signal before uvicorn has its handlers was lost, and the server went on."""
    (root / "safelight.yaml").write_text("port: 0\n")
    command = [sys.executable, "-m", "safelight.cli", "serve", "--root", str(root)]
    process = forking.REAL(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while find(root) is None:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.full
@pytest.mark.parametrize("command", [command_of_unit, command_of_agent])
def test_their_commands_serve_and_stop(command, tmp_path: Path) -> None:
    """As both programs stop a service: with SIGTERM to its process, which then ends without an error."""
    home, root = tmp_path / "home", tmp_path / "data"
    (home / ".local/bin").mkdir(parents=True)
    root.mkdir()
    give(root)
    (root / "safelight.yaml").write_text("port: 0\n")
    program = home / ".local/bin/safelight"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m safelight.cli "$@"\n')
    program.chmod(0o755)
    words = [word.replace("$HOME", str(home)) for word in command()]
    env = {**os.environ, "HOME": str(home), "SAFELIGHT_ROOT": str(root)}
    process = forking.REAL(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while (url := find(root)) is None:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        while worker_of(url) != "ready":
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
