"""The command line as scripts use it: real processes, exit codes, one JSON object per line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image as PILImage
from support.forking import python
from support.measured import MEASURED
from typer.testing import CliRunner

from safelight.catalog.library import Library
from safelight.cli import main
from safelight.errors import InputError, SafelightError, StorageError
from safelight.families.flux.model import Flux

SMALL = ("--steps", "2", "--width", "64", "--height", "64")


def safelight(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return python("-m", "safelight.cli", *map(str, arguments))


@pytest.mark.full
def test_generate_a_b_a_in_two_processes(tiny: Path, tmp_path: Path) -> None:
    arguments = ["generate", "red apple", "-m", tiny / "a.safetensors", "-m", tiny / "b.safetensors"]
    arguments += ["-m", tiny / "a.safetensors", "--seed", 0, "--json", "--out", tmp_path / "out", *SMALL]
    first, second = safelight(*arguments), safelight(*arguments)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert all("was trained at" in line for line in first.stderr.splitlines())
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    again = [json.loads(line) for line in second.stdout.splitlines()]
    digests = [row["pixels_sha256"] for row in rows]
    assert digests[0] == digests[2] != digests[1]
    assert [row["pixels_sha256"] for row in again] == digests
    assert set(rows[0]) == {"path", "model", "model_digest", "seed", "pixels_sha256", "seconds", "memory", "marks"}
    assert set(rows[0]["seconds"]) == {"switch", "encode", "denoise", "decode"}
    assert rows[0]["memory"]["host_peak_bytes"] > 1e8
    with PILImage.open(tmp_path / "out/sheet.png") as sheet:
        assert sheet.width > 700
    assert len({row["path"] for row in [*rows, *again]}) == 6


def test_models(run, tiny: Path) -> None:
    added = run("models", "add", tiny / "a.safetensors", tiny / "b.safetensors", "--json")
    assert added.code == 0
    wanted = {"name", "kind", "base", "prediction_type", "dtype", "digest", "path", "origin", "rule"}
    assert all(wanted <= set(row) for row in added.rows)
    listed = run("models", "list", "--json").rows
    assert [row["name"] for row in listed if row["origin"] == "added"] == ["a", "b"]
    assert "a  " in run("models", "list").out
    assert run("models", "show", "a", "--json").rows[0]["digest"] == added.rows[0]["digest"]
    assert "unet" in run("models", "show", "a").out
    assert run("models", "verify", "a", "b", "--json").rows[1]["intact"] is True
    assert "a: intact" in run("models", "verify", "a").out
    assert run("models", "remove", "a", "--json").rows[0]["removed"] is True
    assert "removed b" in run("models", "remove", "b").out
    assert run("models", "show", "a").code == 2


def test_verify_finds_a_changed_file(run, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((tiny / "a.safetensors").read_bytes())
    run("models", "add", path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    outcome = run("models", "verify", "m", "--json")
    assert outcome.code == 1
    assert outcome.rows[0]["intact"] is False
    assert run("generate", "x", "-m", "m", *SMALL).code == 1


def test_identify(run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"")
    outcome = run("identify", tiny / "v2.safetensors", tmp_path / "bad.safetensors", "--json")
    assert outcome.code == 2
    assert outcome.rows[0]["base"] == "sd2"
    assert "is empty" in outcome.rows[1]["error"]
    assert "because:" in run("identify", tiny / "xl.safetensors").out


def test_remake(run, tiny: Path, tmp_path: Path) -> None:
    made = run("generate", "red apple", "-m", tiny / "a.safetensors", "--json", "--out", tmp_path, *SMALL).rows[0]
    run("models", "add", tiny / "a.safetensors", "--name", "other-name")
    outcome = run("remake", made["path"], "--json", "--out", tmp_path / "again")
    assert outcome.code == 0
    row = outcome.rows[0]
    assert (row["same"], row["same_model"], row["file_untouched"], row["changed"]) == (True, True, True, {})
    assert "pixel for pixel" in run("remake", made["path"]).out
    other = run("remake", made["path"], "-m", tiny / "b.safetensors")
    assert other.code == 1
    assert "not the same" in other.out
    assert "not the same: recorded" in other.out


BAD = {
    "unknown model": (("generate", "x", "-m", "nothing"), "no model named 'nothing'"),
    "unknown sampler": (("generate", "x", "-m", "a", "--sampler", "eular"), "sampler='eular'"),
    "odd size": (("generate", "x", "-m", "a", "--width", "65"), "the nearest is 64"),
    "no such file": (("models", "add", "none.safetensors"), "does not exist"),
    "directory": (("models", "add", "."), "contains no checkpoint"),
    "no model": (("generate", "x"), "set default_model"),
    "out is a picture": (("generate", "x", "-m", "starter-noto", "--out", "x.png"), "must be a folder"),
    "seed": (("generate", "x", "-m", "starter-noto", "--seed", "any"), "or random"),
    "a long prompt": (("generate", "word, " * 2000, "-m", "nothing"), "at most 32"),
    "pixels": (("generate", "x", "-m", "starter-noto", "--width", "16384", "--height", "8192"), "at most 16777216"),
    "two paths, one name": (("models", "add", "a", "b", "--name", "c"), "--name"),
    "no image": (("remake", "none.png"), "does not exist"),
    "not a number": (("generate", "x", "-m", "a", "--steps", "many"), "--steps"),
    "prediction": (("models", "add", "a", "--prediction-type", "x0"), "epsilon or v_prediction"),
    "a shift without a flow": (
        ("generate", "x", "-m", "starter-noto", "--shift", "3"),
        "shift=3.0: has no effect: starter-noto (sd1) is not a rectified flow",
    ),
    "unknown command": (("generat",), "generat"),
}


@pytest.mark.parametrize("label", BAD)
def test_bad_input_is_one_clear_message_and_exit_code_2(
    label: str, run, root: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[label]
    outcome = run(*arguments)
    assert outcome.code == 2
    assert message in outcome.err.replace("\n", " ")
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert {path.name for path in root.iterdir()} == MEASURED


def test_a_bad_setting_names_its_variable(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_THREADS", "many")
    outcome = run("models", "list")
    assert outcome.code == 2
    assert "SAFELIGHT_THREADS" in outcome.err


def test_demo(run, tmp_path: Path) -> None:
    outcome = run("demo", "--out", tmp_path / "demo")
    assert outcome.code == 0
    assert "identical: the first and the last image are the same" in outcome.out
    assert (tmp_path / "demo/sheet.png").exists()


@pytest.mark.full
def test_a_starter_that_old_libraries_cannot_compute_is_left_out(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> object:
        raise InputError("diffusers 0.32.0 has no choice of attention: upgrade diffusers")

    monkeypatch.setattr(Flux, "predict", fails)
    outcome = run("demo", "--out", tmp_path / "demo")
    assert outcome.code == 0
    assert "starter-flux is left out: diffusers 0.32.0 has no choice of attention" in outcome.err
    assert "identical" in outcome.out


def test_help_everywhere_with_examples() -> None:
    runner = CliRunner()
    commands = [[], ["generate"], ["remake"], ["demo"], ["identify"], ["models"]]
    commands += [["models", name] for name in ("add", "list", "show", "verify", "remove")]
    for command in commands:
        shown = runner.invoke(main.app, [*command, "--help"])
        assert shown.exit_code == 0
        assert "Example" in shown.output, command


def test_version() -> None:
    assert safelight("--version").stdout.startswith("safelight 0.")


def test_failures_and_cancelling_have_their_exit_codes(run, monkeypatch: pytest.MonkeyPatch) -> None:
    for raised, code in ((SafelightError("broken"), 1), (KeyboardInterrupt(), 130)):

        def fail(raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr(main, "app", fail)
        assert run().code == code


def test_json_goes_where_it_is_sent_while_a_bar_is_drawn(tmp_path: Path) -> None:
    """Standard error is a terminal and standard output is not, as with ``> file``."""
    leader, follower = os.openpty()
    command = [sys.executable, "-m", "safelight.cli", "generate", "red apple", "-m", "starter-noto", "--count", "2"]
    command += ["--steps", "1", "--seed", "0", "--out", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower) as process:
        os.close(follower)
        seen = bytearray()
        with contextlib.suppress(OSError):
            while piece := os.read(leader, 4096):
                seen += piece
        assert process.stdout is not None
        rows = [json.loads(line) for line in process.stdout.read().splitlines()]
    os.close(leader)
    assert [row["seed"] for row in rows] == [0, 1]
    assert b"making" in seen
    assert b"pixels_sha256" not in seen


def test_names_are_whole_in_a_pipe(run, tiny: Path) -> None:
    name = "a-name-that-is-longer-than-a-terminal-is-wide-" * 2
    assert run("models", "add", tiny / "a.safetensors", "--name", name).code == 0
    assert name in run("models", "list").out


def test_a_full_disk_is_not_the_users_fault(run, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise StorageError(tmp_path, "cannot be written: No space left on device")

    monkeypatch.setattr(Library, "add", full)
    outcome = run("models", "add", tiny / "a.safetensors", tiny / "b.safetensors")
    assert (outcome.code, outcome.err.count("No space left")) == (1, 1)


def test_options_without_effect_are_refused(run) -> None:
    for option, says in (("--strength", "without --image"), ("--mask-blur", "without --mask or --outpaint")):
        outcome = run("generate", "x", "-m", "starter-noto", option, "1")
        assert (outcome.code, says in outcome.err) == (2, True)
    assert "did you mean dpmpp_2m?" in run("generate", "x", "-m", "starter-noto", "--sampler", "dpmpp2m").err


def test_an_interrupt_is_said() -> None:
    command = [sys.executable, "-m", "safelight.cli", "generate", "x", "-m", "starter-noto", "--steps", "900", "--json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # If a script runs the tests in the background, they ignore interrupts, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        until = time.monotonic() + 60
        while psutil.Process(process.pid).memory_info().rss < 250e6:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert said == "safelight: cancelled\n"


def test_an_interrupt_while_a_class_is_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(
        "import os, signal\n"
        # If a script runs the tests in the background, they ignore interrupts, and their children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from safelight.cli import main\n"
        "main.app = lambda: exec('os.kill(os.getpid(), signal.SIGINT)', globals())\n"
        "main.run()\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    ended = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "safelight: cancelled\n")
