"""Audits of ComfyUI, sound and spoiled, by a stand-in that caches as it does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support import comfy as stand_in
from support.comfy import How, comfy
from support.scale import thinned
from typer.testing import CliRunner

from safelight.cli.main import app
from safelight.diagnostics import audited_servers
from safelight.diagnostics.audit import AuditResult, audit
from safelight.diagnostics.audited_servers import ComfyUIClient, ImageRequest
from safelight.errors import SafelightError

ASK = ImageRequest("red apple", 7, 2, 64)
CHANGED = "the same image after other models"


class Unchanged(ComfyUIClient):
    """Asks for the same graph every time, and believes what it gets."""

    FRESH = frozenset()

    def _graph(self, asked: ImageRequest) -> dict[str, Any]:
        graph = super()._graph(asked)
        for node in graph.values():
            node["inputs"].pop("audit", None)
        return graph


class Freeing(ComfyUIClient):
    """Has the server empty its caches before every image."""

    def make(self, asked: ImageRequest) -> bytes:
        self._answer(lambda: self.client.post("/free", json={"unload_models": False, "free_memory": True}))
        # Its worker may take a job that comes at once before it looks at the flags.
        time.sleep(0.02)
        return super().make(asked)


class SamplerOnly(ComfyUIClient):
    """Has the sampler alone run again, as another seed would."""

    FRESH = frozenset({"sampler", "decode", "image"})

    def _graph(self, asked: ImageRequest) -> dict[str, Any]:
        graph = super()._graph(asked)
        graph["sampler"]["inputs"]["audit"] = graph["positive"]["inputs"].pop("audit")
        graph["negative"]["inputs"].pop("audit")
        return graph


def audited(kind: type[ComfyUIClient], how: How) -> tuple[AuditResult, stand_in.Comfy]:
    with comfy(how) as (url, inside):
        server = kind(url, None)
        return audit(server, server.models(), ASK, rounds=2), inside


def wrong(found: AuditResult) -> set[str]:
    return {finding.what for finding in found.findings if not finding.ok}


@pytest.mark.parametrize("cache", ["ram", "classic", "none"])
@pytest.mark.parametrize("third", thinned([True, False]))
def test_a_sound_one_passes_and_every_image_is_made(cache: str, third: bool, tmp_path: Path) -> None:
    with comfy(How(cache=cache, third=third, silent=True)) as (url, inside):
        report = tmp_path / "report.json"
        arguments = ["audit", url, "--api", "comfy", "--out", str(tmp_path / "out"), "--save", str(report)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        again = CliRunner().invoke(app, [*arguments, "--rounds", "1", "--before", str(report)])
        assert again.exit_code == 0, again.output
    # A twice, and rounds of B, A, A with style, A.
    assert inside.ran.count("sampler") == len(inside.files) == (2 + 3 * 4) + (2 + 4)
    assert inside.ran.count("positive") == inside.ran.count("sampler")
    digests = json.loads(report.read_text())["digests"]
    assert set(digests) == {*stand_in.CHECKPOINTS, "A.safetensors with style.safetensors"}
    if cache == "ram":
        # What is audited stays as it was: each was loaded once.
        assert inside.ran.count("model") == 2
        assert inside.ran.count("lora") == 1


@pytest.mark.parametrize("cache", ["ram", "classic"])
@pytest.mark.parametrize(
    ("how", "what"),
    [
        (How(stand_in.last_model), CHANGED),
        (How(stand_in.lora_stays), CHANGED),
        (How(stand_in.noise_after_switches), CHANGED),
        (How(encoder=True), CHANGED),
        (How(stand_in.never_the_same), "the same image twice"),
        (How(stand_in.fails), "image 3"),
    ],
    ids=["last_model", "lora_stays", "noise", "encoder", "never_the_same", "fails"],
)
def test_spoiled_ones_are_found_out(how: How, what: str, cache: str) -> None:
    how.cache = cache
    found, _ = audited(ComfyUIClient, how)
    assert what in wrong(found)
    if how.sample is stand_in.fails:
        assert any("its job failed: KSampler: CUDA error" in finding.evidence for finding in found.findings)


def test_without_care_a_spoiled_one_would_pass() -> None:
    """Why the graph is made to differ, where it is, and why not by /free."""
    found, inside = audited(Unchanged, How(stand_in.noise_after_switches))
    assert not wrong(found)
    assert inside.ran.count("sampler") == 3
    found, _ = audited(Freeing, How(stand_in.lora_stays))
    assert not wrong(found)
    found, _ = audited(SamplerOnly, How(encoder=True))
    assert not wrong(found)


def test_one_that_gives_kept_images_nevertheless_is_said() -> None:
    found, _ = audited(ComfyUIClient, How(stand_in.noise_after_switches, strict=True))
    kept = "not made again: the server used its cache of decode, image, negative, positive, sampler"
    assert any(kept in finding.evidence for finding in found.findings if not finding.ok)
    # Of the versions that leave kept images out of the history.
    found, _ = audited(Unchanged, How(silent=True))
    assert any("ended without an image" in finding.evidence for finding in found.findings if not finding.ok)


def test_refusals_are_said() -> None:
    with comfy() as (url, _):
        server = ComfyUIClient(url, None)
        with pytest.raises(SafelightError, match="refused the graph: CheckpointLoaderSimple: Value not in list: ckpt"):
            server.make(ASK.for_model("C.safetensors", ""))
        with pytest.raises(SafelightError, match="EmptyLatentImage: Value 8 smaller than min of 16"):
            server.make(ImageRequest("red apple", 7, 2, 8, "A.safetensors"))
        with pytest.raises(SafelightError, match="the graph: Cannot execute because node Nothing does not exist"):
            server._enqueue({"x": {"class_type": "Nothing", "inputs": {}}})
        assert server._choices("Nothing", "name") == []


def test_jobs_that_vanish_or_never_end_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with comfy(How(drops=True)) as (url, _), pytest.raises(SafelightError, match="its job is gone"):
        ComfyUIClient(url, None).make(ASK.for_model("A.safetensors", ""))
    monkeypatch.setattr(audited_servers, "WAIT_SECONDS", 0.3)
    with comfy(How(slow=True)) as (url, inside):
        server = ComfyUIClient(url, None)
        with pytest.raises(SafelightError, match="no image after 0 s"):
            server.make(ASK.for_model("A.safetensors", ""))
        # It was interrupted, so that the next is not held up.
        monkeypatch.setattr(audited_servers, "WAIT_SECONDS", 10)
        while inside.running:
            time.sleep(0.01)
        inside.how.slow = False
        assert server.make(ASK.for_model("A.safetensors", ""))
        told = [job["status"]["messages"][-1][0] for job in inside.history.values()]
    assert told == ["execution_interrupted", "execution_success"]
