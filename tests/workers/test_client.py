"""The engine of this process and that of a running server give the same pixels and errors."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image as PILImage
from support.serving import Server, ended, serving

import safelight
from safelight.errors import IntegrityError, answer_to
from safelight.request.schema import Request
from safelight.workers import running_server
from safelight.workers.client import ServerEngine

KEY = "a long secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with serving(tmp_path_factory.mktemp("server"), key=KEY) as made:
        made.ready()
        yield made


def test_the_same_pixels_and_progress(server: Server) -> None:
    request = Request("red apple", "starter-noto", seed=3, steps=5, count=2)
    seen: list[safelight.Progress] = []
    there = list(ServerEngine(server.url, KEY).generate(request, seen.append))
    here = list(safelight.open_engine().generate(request))
    assert [image.pixels for image in there] == [image.pixels for image in here]
    assert [image.metadata for image in there] == [image.metadata for image in here]
    assert there[0].seconds.denoise > 0
    assert {progress.stage for progress in seen} >= {"encode", "denoise", "decode"}


def test_errors_mean_the_same(server: Server) -> None:
    engine = ServerEngine(server.url, KEY)
    with pytest.raises(safelight.ModelNotFoundError, match="starter-noto"):
        next(engine.generate(Request("x", "starter-nto")))
    with pytest.raises(safelight.InputError, match="max_steps"):
        next(engine.generate(Request("x", "starter-noto", steps=500)))
    with pytest.raises(safelight.InputError, match="needs its API key"):
        next(ServerEngine(server.url).generate(Request("x", "starter-noto")))
    with pytest.raises(safelight.InputError, match="cannot be reached"):
        next(ServerEngine("http://127.0.0.1:9").generate(Request("x", "starter-noto")))


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [(422, "bad_file", 2), (401, "unauthorized", 2), (429, "queue_full", 1), (507, "storage", 1)],
)
def test_a_command_ends_with_the_code_of_the_servers_error(status: int, kind: str, code: int) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json={"error": kind, "message": "because"})

    engine = ServerEngine("http://127.0.0.1:9")
    engine._client = httpx.Client(base_url="http://127.0.0.1:9", transport=httpx.MockTransport(answer))
    with pytest.raises(safelight.SafelightError, match="because") as raised:
        next(engine.generate(Request("x", "starter-noto")))
    assert answer_to(raised.type).exit_code == code


def test_who_stops_stops_the_job(server: Server) -> None:
    def stop(progress: safelight.Progress) -> None:
        if progress.step > 1:
            raise safelight.Cancelled

    engine = ServerEngine(server.url, KEY)
    with pytest.raises(safelight.Cancelled):
        next(engine.generate(Request("red apple", "starter-noto", steps=150), stop))
    with server.client() as client:
        while client.get("/api/v1/jobs").json()[0]["ended"] is None:
            pass
        assert client.get("/api/v1/jobs").json()[0]["state"] == "cancelled"


def test_images_that_were_finished_before_anybody_listened_come_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, events = ServerEngine(server.url, KEY), ServerEngine._events

    def late(self: ServerEngine, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with server.client() as client:
            ended(client, job)
        return events(self, job)

    monkeypatch.setattr(ServerEngine, "_events", late)
    images = list(engine.generate(Request("red apple", "starter-noto", seed=3, steps=1, count=3)))
    assert [image.seed for image in images] == [3, 4, 5]


def test_a_server_that_goes_away_is_said(tmp_path: Path) -> None:
    with serving(tmp_path) as made:

        def kill(progress: safelight.Progress) -> None:
            if progress.step == 2:
                made.process.kill()
                made.process.wait()

        assert running_server.find(tmp_path) == made.url
        with pytest.raises(safelight.InputError, match="cannot be reached"):
            list(ServerEngine(made.url).generate(Request("red apple", "starter-noto", steps=150), kill))
        assert running_server.find(tmp_path) is None


@pytest.mark.full
def test_the_command_line(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safelight.cli import main

    arguments = ["generate", "red apple", "-m", "starter-noto", "--steps", "2", "--seed", "0", "--out", str(tmp_path)]
    main.app([*arguments, "--server", server.url, "--api-key", KEY], standalone_mode=False)
    assert (tmp_path / "starter-noto-0.png").exists()
    assert "starter-noto-0.png" in capsys.readouterr().out
    main.app([*arguments, "--server", "auto", "--root", str(server.root), "--api-key", KEY], standalone_mode=False)
    assert f"using {server.url}" in capsys.readouterr().err
    main.app([*arguments, "--server", "auto", "--root", str(tmp_path / "other")], standalone_mode=False)
    assert "no server runs; this process makes the images" in capsys.readouterr().err
    assert len({PILImage.open(path).tobytes() for path in tmp_path.glob("starter-noto-0*.png")}) == 1


def test_pixels_that_arrive_otherwise_are_not_taken(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that reduces pictures, or a broken disk cache, changes the pixels; the client compares their hash."""
    engine = ServerEngine(server.url, KEY)
    get = engine._client.get

    def spoiled(url: str, **more: Any) -> Any:
        answer = get(url, **more)
        if url.endswith("/file"):
            with PILImage.open(io.BytesIO(answer.content)) as picture:
                changed = picture.convert("RGB")
            changed.putpixel((3, 3), (1, 2, 3))
            held = io.BytesIO()
            changed.save(held, "PNG")
            answer._content = held.getvalue()
        return answer

    monkeypatch.setattr(engine._client, "get", spoiled)
    with pytest.raises(IntegrityError, match="received pixels"):
        list(engine.generate(Request("red apple", "starter-noto", steps=1)))
