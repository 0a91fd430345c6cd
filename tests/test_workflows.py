"""The workflows are valid, and call targets that the Makefile has. GitHub has not run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

HOME = Path(__file__).parents[1]
WORKFLOWS = sorted((HOME / ".github/workflows").glob("*.yml"))
USES = re.compile(r"[\w-]+/[\w-]+@v\d+")


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_valid(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    # YAML 1.1 reads the key `on` as the boolean.
    assert workflow.keys() == {"name", True, "permissions", "concurrency", "jobs"}
    for job in workflow["jobs"].values():
        assert job.keys() <= {"strategy", "runs-on", "timeout-minutes", "steps"}
        axes = job.get("strategy", {}).get("matrix", {})
        for expression in re.findall(r"\$\{\{ matrix\.(\w+) \}\}", str(job)):
            assert expression in axes
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        assert "uses" not in step or USES.fullmatch(step["uses"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_its_commands_are_targets_of_the_makefile(path: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (HOME / "Makefile").read_text(), re.MULTILINE)
    commands = [step["run"] for step in steps(yaml.safe_load(path.read_text())) if "run" in step]
    assert commands
    for command in commands:
        program, target, *_ = command.split()
        assert program == "make"
        assert target in targets


def test_the_python_versions_are_those_of_the_package() -> None:
    declared = re.findall(r'"Programming Language :: Python :: ([\d.]+)"', (HOME / "pyproject.toml").read_text())
    tests = yaml.safe_load((HOME / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]
    assert tests["strategy"]["matrix"]["python"] == declared
