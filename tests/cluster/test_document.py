"""docs/cluster.md, word by word, on machines that are namespaces of this one."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from support import namespaces
from support.changed_starter import write_changed_starter
from support.namespaces import Machine, Network

pytestmark = pytest.mark.full

Json = dict[str, Any]

CALL = """
import sys, httpx
method, url, body = sys.argv[1:]
answer = httpx.request(method, url, content=body or None, headers={"content-type": "application/json"}, timeout=60)
assert answer.is_success, answer.text
print(answer.text)
"""


@pytest.fixture
def network(tmp_path: Path) -> Generator[Network]:
    if (why := namespaces.missing()) is not None:
        pytest.skip(why)
    made = Network(tmp_path)
    yield made
    made.close()


def commands() -> dict[str, list[str]]:
    """Return the commands of "Two machines in five commands" by the machine that its comment names."""
    text = Path("docs/cluster.md").read_text("utf-8")
    block = text.partition("## Two machines in five commands")[2].partition("```sh\n")[2].partition("```")[0]
    found = dict[str, list[str]]()
    for part in block.strip().split("\n\n"):
        comment, *lines = part.splitlines()
        place = re.match(r"# on (the first machine|the second machine|each machine)", comment)
        assert place is not None, comment
        found.setdefault(place[1], []).extend(lines)
    return found


def waits(what: Callable[[], Any], seconds: float = 150.0) -> Any:
    """Wait until it returns something true, and return that."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.5)
    return found


class Server:
    """The server on a machine, as ``safelight serve`` starts it there."""

    def __init__(self, machine: Machine, command: str) -> None:
        self.machine, self.log = machine, machine.home / "server.log"
        self.process = machine.start(f"{command} > {self.log} 2>&1")
        found = waits(lambda: self.log.exists() and re.search(r"http://\S+", self.log.read_text()))
        self.url = found[0].rstrip("/")

    def ask(self, path: str, body: Json | None = None) -> Any:
        """Send a request from its own machine, because it only answers there."""
        call = self.machine.home / "call.py"
        call.write_text(CALL)
        text = "" if body is None else json.dumps(body)
        method = "GET" if body is None else "POST"
        done = self.machine.run(f"{sys.executable} {call} {method} {self.url}{path} '{text}'")
        assert done.returncode == 0, done.stdout
        return json.loads(done.stdout)

    def slots(self) -> list[Json]:
        """Return the slots that take jobs."""
        return [one for one in self.ask("/api/v1/slots") if not one["problem"]]

    def image(self, job: str) -> Json:
        """Wait until a job is done, and return its image."""
        until = time.monotonic() + 150
        while (done := self.ask(f"/api/v1/jobs/{job}"))["ended"] is None:
            assert time.monotonic() < until, (done, self.ask("/api/v1/slots"), self.log.read_text())
            time.sleep(0.5)
        assert done["state"] == "done", done
        [image] = self.ask(f"/api/v1/jobs/{job}/images")
        return image


def test_two_machines_in_five_commands(network: Network, tmp_path: Path) -> None:
    file = tmp_path / "models/own.safetensors"
    write_changed_starter(file)
    document = commands()
    (head, serve, top), [join], [stop] = (document[f"{one} machine"] for one in ("the first", "the second", "each"))
    first = network.add("first", "192.0.2.1")
    second = network.add("second", "192.0.2.2", hidden=(file.parent,))
    added = first.run(f"safelight models add {file} --name own")
    assert added.returncode == 0, added.stdout
    for machine, command in ((first, head), (second, join)):
        done = machine.run(command)
        assert done.returncode == 0, done.stdout
    server = Server(first, serve)
    waits(lambda: len(server.slots()) == 3)
    seen = first.run(f"timeout --signal INT 8 {top}")
    assert all(f"cluster:{number}" in seen.stdout for number in range(3)), seen.stdout

    ask = {"prompt": "red apple", "model": "own", "seed": 3, "steps": 20, "width": 128, "height": 128}
    jobs = [server.ask("/api/v1/generate", ask)["id"] for _ in range(9)]
    made = [server.image(job) for job in jobs]
    assert len({one["pixels_sha256"] for one in made}) == 1
    assert {one["metadata"]["made"]["machine"].partition(":")[0] for one in made} == {"first", "second"}
    # The second machine does not see the file: it has fetched a copy.
    [copy] = second.home.glob("**/cache/*/*own.safetensors")
    assert copy.read_bytes() == file.read_bytes()

    # "A machine that joins later is used at once."
    third = network.add("third", "192.0.2.3", hidden=(file.parent,))
    assert third.run(join).returncode == 0
    waits(lambda: len(server.slots()) == 5)
    # "After `cluster_lease_seconds` of silence, the job is given back."
    jobs = [server.ask("/api/v1/generate", {**ask, "steps": 60})["id"] for _ in range(7)]
    waits(lambda: len(server.ask("/api/v1/queue")["running"]) == 5)
    third.cut()
    again = [server.image(job) for job in jobs]
    assert len({one["pixels_sha256"] for one in again}) == 1
    assert sum(server.ask(f"/api/v1/jobs/{job}")["attempts"] for job in jobs) == len(jobs) + 2

    for machine in (second, first):
        done = machine.run(stop)
        assert done.returncode == 0, done.stdout
    assert server.process.wait(120) == 1
