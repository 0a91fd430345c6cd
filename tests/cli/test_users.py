"""``safelight users``: people are added, listed, changed and removed on the server's machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support import serving
from support.people import PASSWORD

from safelight.queue.database import Database


def users(root: Path, *words: str, password: str = "") -> tuple[int, str]:
    command = [sys.executable, "-m", "safelight.cli", "users", *words, "--root", str(root)]
    done = subprocess.run(command, input=f"{password}\n", capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_people_are_added_changed_and_removed(tmp_path: Path) -> None:
    code, said = users(tmp_path, "list")
    assert (code, "has no log-in" in said) == (0, True)
    code, said = users(tmp_path, "add", "bob", "--password-stdin", password=PASSWORD)
    assert (code, "the first person must be an administrator" in said) == (2, True)
    code, said = users(tmp_path, "add", "ann", "--role", "admin", "--password-stdin", password="short")
    assert (code, "from 10 to 1000 characters" in said) == (2, True)
    code, said = users(tmp_path, "add", "ann", "--role", "admin", "--password-stdin", password=PASSWORD)
    assert (code, "everybody who uses the server must log in" in said) == (0, True)
    for name, role in (("/etc", "member"), ("", "member"), ("Ann", "guest"), ("bob", "boss")):
        code, said = users(tmp_path, "add", name, "--role", role, "--password-stdin", password=PASSWORD)
        assert code == 2, said
    assert users(tmp_path, "add", "bob", "--weight", "2", "--password-stdin", password=PASSWORD)[0] == 0
    _, said = users(tmp_path, "list", "--json")
    assert [json.loads(line)["weight"] for line in said.splitlines()] == [1.0, 2.0]
    code, said = users(tmp_path, "reset", "bob", "--role", "guest", "--weight", "1")
    assert (code, said.strip()) == (0, "bob: role guest, weight 1 changed")
    code, said = users(tmp_path, "reset", "ann", "--role", "guest")
    assert (code, "only administrator" in said) == (2, True)
    assert users(tmp_path, "reset", "nobody")[0] == 2
    code, said = users(tmp_path, "remove", "ann")
    assert (code, "only administrator" in said) == (2, True)
    code, said = users(tmp_path, "remove", "bob", "--heir", "nobody")
    assert (code, "no person 'nobody'" in said) == (2, True)
    assert users(tmp_path, "remove", "bob", "--heir", "ann")[0] == 0
    code, said = users(tmp_path, "remove", "ann")
    assert (code, "has no log-in now" in said) == (0, True)
    database = Database(tmp_path)
    try:
        said_actions = [(one.action, one.subject) for one in database.audit.entries()]
    finally:
        database.close()
    assert said_actions[0] == ("users remove", "ann")
    assert ("users reset", "bob") in said_actions


def test_a_running_server_notices_a_new_password(tmp_path: Path) -> None:
    with serving.serving(tmp_path) as server:
        users(tmp_path, "add", "ann", "--role", "admin", "--password-stdin", password=PASSWORD)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert http.post("/api/v1/login", json={"name": "ann", "password": PASSWORD}).status_code == 200
            assert http.get("/api/v1/images").status_code == 200
            assert users(tmp_path, "reset", "ann", "--password-stdin", password="quite another one")[0] == 0
            assert http.get("/api/v1/images").status_code == 401, "its sessions have ended"
            assert http.post("/api/v1/login", json={"name": "ann", "password": PASSWORD}).status_code == 401
            answer = http.post("/api/v1/login", json={"name": "ann", "password": "quite another one"})
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": "a long secret"}, "remove the setting api_key"),
        ({"host": "0.0.0.0"}, "http://0.0.0.0"),
    ],
)
def test_a_server_with_people_has_no_other_key_and_may_be_reached(
    options: dict[str, str], said: str, tmp_path: Path
) -> None:
    users(tmp_path, "add", "ann", "--role", "admin", "--password-stdin", password=PASSWORD)
    command = [sys.executable, "-m", "safelight.cli", "serve", "--root", str(tmp_path), "--port", "0"]
    command += ["--api-key", options["key"]] if "key" in options else ["--host", options["host"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            assert any(said in line for line in lines)
        finally:
            process.terminate()
