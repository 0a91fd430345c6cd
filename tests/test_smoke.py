"""Every tool and benchmark still runs: the smallest thing that each can be asked for, in seconds.

What needs checkpoints of full size or other programs' environments is imported, and its command line read.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from support.forking import python
from support.scale import thinned

from safelight.devices.simulated import simulated

HOME = Path(__file__).parents[1]
# Last: `trust` and others among the benchmarks have the names of folders of tests.
sys.path.append(str(HOME / "tools"))

import gpu  # noqa: E402
import proof  # noqa: E402

FOLDERS = {"tools": "", "benchmarks": "", "starter/recipe": "recipe."}
"""Of programs, and what their names begin with."""

IMPORTING = """
import importlib, sys
for name in sys.argv[2:]:
    print(name, bool(importlib.import_module(name).__doc__), flush=True)
"""


def run(*command: str, **environment: str) -> str:
    done = python(*command, cwd=HOME, environment={**os.environ, "PYTHONPATH": str(HOME / "tests")} | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("lane", thinned(proof.LANES))
def test_lanes_of_the_proof(lane: str, tmp_path: Path) -> None:
    got = json.loads(run("tools/proof.py", "--lane", lane, "--switches", "3").splitlines()[-1])
    assert (got["switches"], got["wrong"]) == (3, 0)


@pytest.mark.full
def test_a_section_of_the_proof_keeps_the_others(tmp_path: Path) -> None:
    page = tmp_path / "proof.md"
    shutil.copy(HOME / "docs/proof.md", page)
    before = proof.read_sections(page)
    assert list(before) == list(proof.SECTIONS)
    proof.write_page(page, before | {"lanes": "new"})
    assert proof.read_sections(page) == before | {"lanes": "new"}
    proof.write_page(page, {"lanes": "new"})
    assert "Not run: tests." in page.read_text()


@pytest.mark.full
def test_processes_of_the_proof() -> None:
    assert proof.equal_in_two_processes("--steps", "1")


@pytest.mark.parametrize("folder", FOLDERS)
def test_programs_import(folder: str) -> None:
    """What each defines and imports is there; none does anything by being imported."""
    paths = sorted((HOME / folder).rglob("*.py"))
    stems = [".".join(path.relative_to(HOME / folder).with_suffix("").parts) for path in paths]
    names = [FOLDERS[folder] + stem for stem in stems if not stem.endswith("__init__")]
    where = HOME / folder if not FOLDERS[folder] else (HOME / folder).parent
    search = os.pathsep.join((str(where), str(HOME / "tests")))
    printed = run("-c", IMPORTING, folder, *names, PYTHONPATH=search)
    assert [line for line in printed.splitlines() if line.endswith(" True")] == [f"{name} True" for name in names]


@pytest.mark.full
def test_the_report_of_a_gpu(tmp_path: Path) -> None:
    places = ("--folder", str(tmp_path), "--out", str(tmp_path / "out"))
    sections = [f"--section={name}" for name in gpu.ALL]
    printed = run("tools/gpu.py", "--device", "simulated", *places, *sections)
    assert "0 findings are wrong" in printed
    report = json.loads((tmp_path / "out/simulated.json").read_text())
    assert {finding["section"] for finding in report["findings"]} == set(gpu.ALL)
    assert {finding["ok"] for finding in report["findings"]} == {True, None}
    assert (tmp_path / "out/simulated.md").read_text().count("| right |") > 20


@pytest.mark.parametrize("section", thinned(["memory", "machine", "switches", "times", "large"]))
def test_sections_of_the_report_of_a_gpu(
    section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated() as device:
        gpu.run_section(section, gpu.Machine(device, tmp_path, small=True))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(gpu.EVENT)]
    found = [gpu.Finding(**json.loads(line.removeprefix(gpu.EVENT))) for line in lines]
    assert found
    assert all(one.ok is not False and one.section == section for one in found), found
    assert all(one.what in gpu.page("simulated", "make gpu", found, 1.0) for one in found)


def test_a_section_that_dies_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is killed, or never ends; the next section is run."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "if sys.argv[-1] == 'dies': os.kill(os.getpid(), 11)\n"
        "if sys.argv[-1] == 'hangs': time.sleep(60)\n"
        'print(\'finding {"what": "a", "ok": true, "evidence": "", "section": "sound"}\')\n'
    )
    monkeypatch.setattr(gpu, "SECTION_SECONDS", 1.0)
    found = list(gpu.supervise([sys.executable, str(program)], ["dies", "hangs", "sound"]))
    assert [(one.section, one.ok) for one in found] == [("dies", False), ("hangs", False), ("sound", True)]
    assert (found[0].evidence, found[1].evidence) == ("its process ended with -11", "stopped after 1 s")


def test_ordering() -> None:
    printed = run("benchmarks/ordering.py", "--jobs", "300", "--slots", "2")
    assert printed.count("| bursts |") == printed.count("| steady |") == 6


def test_trust(tmp_path: Path) -> None:
    assert "| starter |" in run("benchmarks/trust.py", "--images", "1")


def test_contention() -> None:
    assert "beside a busy process" in run(
        "benchmarks/contention.py", "--times", "1", "--steps", "1", "--policies", "PASSIVE"
    )


@pytest.mark.full
def test_decoding() -> None:
    assert "| rows, huge pages |" in run("benchmarks/decoding.py", "--times", "1", "--side", "64")


@pytest.mark.full
def test_beside() -> None:
    printed = run("benchmarks/beside.py", "--times", "1", "--calls", "1")
    assert "beside a prefetch" in printed
    assert "| from SIGTERM to the end of the server, s |" in printed


@pytest.mark.full
def test_startup() -> None:
    assert "to the end of the first step" in run("benchmarks/startup.py", "--runs", "0")


def test_index() -> None:
    assert "| models list |" in run("benchmarks/library.py", "--models", "5", "--adapters", "5")


@pytest.mark.full
def test_page() -> None:
    assert "| first paint |" in run("benchmarks/page.py", "--images", "60", "--times", "1")
    assert "| heap of the scripts |" in run("benchmarks/page_soak.py", "--minutes", "0.1", "--jobs", "2")
    assert run("tools/check_page.py") == ""


def test_gallery() -> None:
    assert "| a page |" in run("benchmarks/gallery.py", "--images", "300")


def test_importing() -> None:
    assert "| 30 |" in run("benchmarks/importing.py", "--files", "30")


@pytest.mark.full
def test_crowd() -> None:
    printed = run("benchmarks/serving.py", "--slots", "2", "--cluster", "--requests", "100")
    assert "| 2 simulated slots: 100 clients, 100 requests: all done, images | 100 |" in printed
    assert "| one slot by Ray: 100 clients, 100 requests: all done, images | 100 |" in printed


@pytest.mark.full
def test_a_worker_that_only_repeats() -> None:
    assert "one client, 20 jobs" in run("benchmarks/serving.py", "--replayed", "--requests", "20")


@pytest.mark.full
def test_families() -> None:
    assert "| diffusers s |" in run("benchmarks/families.py", "--part", "call", "--tiny", "--pairs", "2")
    assert run("benchmarks/families.py", "--part", "switch", "--tiny").count("| flux2-klein-4b |") == 3
    # Equal pixels under both limits: the program ends with an error otherwise.
    assert "| 10.000 |" in run("benchmarks/families.py", "--part", "real", "--tiny")
    rows = {"decode": "| Q4_K |", "flux": "| 5.000 |", "step": "| bf16 |", "lora": "| none |", "sdxl": "| small |"}
    for part, row in rows.items():
        assert row in run("benchmarks/forms.py", "--part", part, "--tiny")
    assert "| Safelight, one fits |" in run("benchmarks/peer_families.py", "--tiny", "--switches", "2")


@pytest.mark.full
@pytest.mark.parametrize("suspect", ["state", "loading", "attention", "memory"])
def test_the_story(suspect: str, tmp_path: Path) -> None:
    assert "0 problems" in run("tools/story.py", str(tmp_path / "story.md"), "--suspect", suspect)
    assert (tmp_path / f"story-{suspect}.png").exists()


def test_the_soak_of_random_sequences() -> None:
    assert "sequences" in run("tools/soak.py", "1", "--sequences", "2")


def test_versions(tmp_path: Path) -> None:
    """The earlier version's files are there, and what benchmarks print is read."""
    sys.path.insert(0, str(HOME / "benchmarks"))
    try:
        import versions
    finally:
        sys.path.remove(str(HOME / "benchmarks"))
    before = versions.checkout("HEAD", tmp_path)
    assert before.run(("-c", "import json, safelight; print(json.dumps({'right': 1.0, 'seconds': [1, 2, 9]}))")) == {
        "right": 1.0,
        "median s": 2.0,
    }
    assert (tmp_path / "benchmarks/library.py").exists()
    assert versions.values("| what | | |\n|---|---|---|\n| starter | median s, warm | 0.50 |\n| share | 4.3% |\n") == {
        "median s, warm": 0.5,
        "share": 4.3,
    }
