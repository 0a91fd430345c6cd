"""Audits of our own server, and of servers that spoil images in five ways."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from support.scale import thinned
from support.serving import Server
from typer.testing import CliRunner

import safelight
from safelight.catalog import starters
from safelight.cli.main import app
from safelight.diagnostics.audit import audit
from safelight.diagnostics.audited_servers import APIS, ImageRequest
from safelight.errors import SafelightError

MODELS = ("starter-noto", "starter-twemoji")
ASK = ImageRequest("red apple", 7, 2, 64)


@pytest.mark.parametrize("api", thinned(["a1111", "safelight", "openai"], 0))
def test_our_own_server_passes(server: Server, api: str, tmp_path: Path) -> None:
    # OpenAI's API has no adapters; of others the first two are tried.
    expected = 2 if api == "openai" else 2 + sum(adapter.kind == "lora" for adapter in starters.adapters())
    there = APIS[api](server.url, None)
    names = there.models()
    chosen = [next(name for name in names if name.startswith(model)) for model in MODELS]
    audited = audit(there, chosen, ASK, rounds=2)
    assert all(finding.ok for finding in audited.findings), audited.findings
    assert len(set(audited.digests().values())) == expected
    again = audit(there, chosen, ASK, rounds=1, before=audited.digests())
    found = sum(finding.what == "the same image after a restart" and finding.ok for finding in again.findings)
    assert found == expected
    changed = audit(there, chosen, ASK, rounds=1, before={chosen[0]: "0" * 64})
    assert [finding.what for finding in changed.findings if not finding.ok] == ["the same image after a restart"]
    audited.save(tmp_path)
    assert len(list(tmp_path.glob("first-*.png"))) == found


class Spoiling:
    """Images of two colours, as a model each would give; ``spoil`` changes them by what came before."""

    def __init__(self, spoil: Callable[[Spoiling, str, bytes], bytes]) -> None:
        self.history: list[str] = []
        self.spoil = spoil

    def image(self, model: str, prompt: str) -> bytes:
        self.history.append(model + ("+lora" if "<lora:" in prompt else ""))
        value = 60 if model == "A" else 180
        if "<lora:" in prompt:
            value += 30
        return self.spoil(self, self.history[-1], png(value))


def png(value: int) -> bytes:
    held = io.BytesIO()
    PILImage.radial_gradient("L").point(lambda p: (p + value) % 256).convert("RGB").save(held, "PNG")
    return held.getvalue()


@contextmanager
def spoiling(spoil: Callable[[Spoiling, str, bytes], bytes]) -> Generator[str]:
    """A server that speaks AUTOMATIC1111's API; its address."""
    state = Spoiling(spoil)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            names = {"/sdapi/v1/sd-models": [{"title": "A"}, {"title": "B"}], "/sdapi/v1/loras": [{"name": "style"}]}
            self.answer(names[self.path])

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            image = state.image(asked["override_settings"]["sd_model_checkpoint"], asked["prompt"])
            self.answer({"images": [base64.b64encode(image).decode()] if image else []})

        def answer(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}"
    finally:
        made.shutdown()
        made.server_close()


def switches(state: Spoiling) -> int:
    return sum(one != other for one, other in zip(state.history, state.history[1:], strict=False))


def noise_after_switches(state: Spoiling, _: str, right: bytes) -> bytes:
    """The story: after three switches every image is noise."""
    return right if switches(state) < 3 else png(200)


def lora_stays(state: Spoiling, model: str, right: bytes) -> bytes:
    """The LoRA of an earlier image is still applied (STATE 08)."""
    return png(90) if model == "A" and "A+lora" in state.history else right


def first_after_switch(state: Spoiling, model: str, right: bytes) -> bytes:
    """The first image after a switch is the other model's (STATE 15)."""
    before = state.history[-2] if len(state.history) > 1 else model
    return right if before == model else png(60 if model == "B" else 180)


def never_the_same(state: Spoiling, _: str, right: bytes) -> bytes:
    return png(len(state.history))


def one_model_only(state: Spoiling, _: str, right: bytes) -> bytes:
    """Whatever is asked for, it is the first model's image (STATE 30)."""
    return png(60)


def no_image(state: Spoiling, _: str, right: bytes) -> bytes:
    return b"" if switches(state) > 2 else right


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (noise_after_switches, "the same image after other models"),
        (lora_stays, "the same image after other models"),
        (first_after_switch, "the same image after other models"),
        (never_the_same, "the same image twice"),
        (one_model_only, "each model's own image"),
        (no_image, "image 5"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_servers_that_spoil_images_are_found_out(spoil: Any, what: str, tmp_path: Path) -> None:
    with spoiling(spoil) as url:
        arguments = ["audit", url, "--api", "a1111", "--json", "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, [*arguments, "--save", str(tmp_path / "report.json")])
    assert result.exit_code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    wrong = [finding["what"] for finding in report["findings"] if not finding["ok"]]
    assert what in wrong
    if "other models" in what:
        assert list((tmp_path / "out").glob("differs-*.png"))
    if spoil is lora_stays:
        assert any("after the adapter style" in finding["evidence"] for finding in report["findings"])


def test_a_sound_server_of_others_passes(tmp_path: Path) -> None:
    with spoiling(lambda _, __, right: right) as url:
        result = CliRunner().invoke(app, ["audit", url, "--api", "a1111", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "WRONG" not in result.output


def test_what_is_no_server_is_said() -> None:
    result = CliRunner().invoke(app, ["audit", "http://127.0.0.1:9", "--api", "a1111"])
    assert isinstance(result.exception, SafelightError)
    assert "cannot be reached" in str(result.exception)
    result = CliRunner().invoke(app, ["audit", "http://127.0.0.1:9", "--api", "nobody"])
    assert isinstance(result.exception, safelight.InputError)
