"""`make release` refuses what cannot be right, and a failure leaves everything as it was."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
sys.path.append(str(HOME / "tools"))

import release  # noqa: E402

COPIED = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    ".gitignore",
    "src/safelight/version.py",
    "starter/pyproject.toml",
    "starter/README.md",
    "starter/safelight_starter/__init__.py",
)
"""What a release reads. The rest of the project would only make each test slower."""

CHANGES = "# Changelog\n\n## Unreleased\n\n- Red apples.\n  # not a heading\n- Pears.\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the project's own files, at version 0.1.0, which nobody has released."""
    root = tmp_path_factory.mktemp("project")
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, root / name)
    version = root / "src/safelight/version.py"
    version.write_text(re.sub('"[0-9][^"]*"$', '"0.1.0"', version.read_text()))
    (root / release.CHANGELOG).write_text(CHANGES)
    git(root, "init", "--quiet", "--initial-branch=main")
    for key, value in {"user.name": "A", "user.email": "a@example.org", "commit.gpgsign": "false"}.items():
        git(root, "config", key, value)
    save(root)
    return root


@pytest.fixture
def clone(project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project, tmp_path / "clone"))


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def save(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "x")


def state(root: Path) -> tuple[str, str, str, str]:
    return git(root, "rev-parse", "HEAD"), git(root, "tag"), git(root, "status", "--porcelain"), git(root, "branch")


def change(root: Path, name: str, text: str) -> None:
    (root / name).write_text(text)
    save(root)


REFUSALS = {
    "dirty": ("0.2.0", lambda root: (root / "new.txt").write_text("x"), "the tree is dirty"),
    "branch": ("0.2.0", lambda root: git(root, "switch", "-qc", "other"), "the branch is other, not main"),
    "detached": ("0.2.0", lambda root: git(root, "switch", "-q", "--detach"), "the branch is none (a detached HEAD)"),
    "lower": ("0.0.9", lambda root: None, "0.0.9 is not higher: src/safelight/version.py has 0.1.0"),
    "released": (
        "0.3.0",
        lambda root: change(root, "CHANGELOG.md", f"{CHANGES}\n## 0.3.0, 2026-01-01\n\n- x\n"),
        "0.3.0 is not higher: 0.3.0 is released",
    ),
    "below a tag": ("0.2.0", lambda root: git(root, "tag", "v0.10.0"), "0.2.0 is not higher: 0.10.0 is released"),
    "not a version": ("0.2.x", lambda root: None, "'0.2.x' is not a version (PEP 440), such as 0.2.0"),
    "not normal": ("0.2.0-rc1", lambda root: None, "'0.2.0-rc1' is not a version as PEP 440 writes it: use 0.2.0rc1"),
    "local": ("0.2.0+mine", lambda root: None, "'0.2.0+mine' is not a version as PEP 440 writes it: use 0.2.0"),
    "no section": (
        "0.2.0",
        lambda root: change(root, "CHANGELOG.md", "# Changelog\n\n## 0.0.1, x\n\n- x\n"),
        "CHANGELOG.md has no section `## Unreleased`",
    ),
    "empty section": (
        "0.2.0",
        lambda root: change(root, "CHANGELOG.md", "# Changelog\n\n## Unreleased\n\n## 0.0.1, x\n\n- x\n"),
        "the section `## Unreleased` of CHANGELOG.md is empty",
    ),
    "tag": ("0.2.0", lambda root: git(root, "tag", "v0.2.0"), "the tag v0.2.0 exists"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_release_that_cannot_be_right_is_refused(clone: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    version, spoil, says = REFUSALS[case]
    spoil(clone)
    before = state(clone)
    assert release.main([version, "--no-checks"], clone) == 2
    assert f"refused: {says}" in capsys.readouterr().err
    assert state(clone) == before
    assert not (clone / "dist").exists()


def test_every_reason_is_named_at_once(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(clone, "switch", "-qc", "other")
    (clone / release.CHANGELOG).write_text("# Changelog\n")
    assert release.main(["0.0.1"], clone) == 2
    assert capsys.readouterr().err.count("refused: ") == 4


def test_a_release_commits_tags_and_builds(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["0.2.0rc1", "--no-checks"], clone) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "THE TESTS ARE NOT RUN" in said.err
    assert "git push origin main v0.2.0rc1" in said.out
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "log", "-1", "--format=%s") == "Safelight 0.2.0rc1"
    assert git(clone, "diff", "--name-only", "HEAD~").splitlines() == sorted(release.changed_files())
    assert git(clone, "cat-file", "-t", "v0.2.0rc1") == "tag"
    tag = git(clone, "tag", "-l", "--format=%(contents)", "v0.2.0rc1")
    assert tag.startswith("Safelight 0.2.0rc1\n\n- Red apples.\n  # not a heading\n- Pears.")
    assert "The checks were not run" in tag
    changelog = (clone / release.CHANGELOG).read_text()
    assert re.search(r"\n## Unreleased\n\n## 0\.2\.0rc1, \d{4}-\d\d-\d\d\n\n- Red apples\.\n", changelog)
    names = {path.name for path in (clone / "dist").iterdir()}
    wheels = {f"{name}-0.2.0rc1-py3-none-any.whl" for name in ("safelight", "safelight_starter")}
    assert names == {*wheels, "NOTES-0.2.0rc1.md"}
    notes = (clone / "dist/NOTES-0.2.0rc1.md").read_text()
    assert all(f"| `{wheel}` |" in notes for wheel in wheels)
    assert "- Pears." in notes
    with zipfile.ZipFile(clone / "dist/safelight-0.2.0rc1-py3-none-any.whl") as wheel:
        metadata = wheel.read("safelight-0.2.0rc1.dist-info/METADATA").decode()
        assert b'VERSION = "0.2.0rc1"' in wheel.read("safelight/version.py")
    assert re.search(r"Requires-Dist: safelight-starter==0\.2\.0rc1; extra == .starter.", metadata)
    # The next release needs its own changes.
    assert release.main(["0.2.0"], clone) == 2
    assert capsys.readouterr().err.startswith("refused: the section `## Unreleased` of CHANGELOG.md is empty")


def test_the_version_that_is_written_can_be_the_first_release(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(clone)
    assert release.main(["0.1.0", "--dry-run"], clone) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("would ") for line in lines)
    assert lines[0] == "would run `make test`"
    assert state(clone) == before


@pytest.mark.parametrize("fails", ["write_changelog", "build", "commit", "add_tag", "write_dist"])
def test_a_failure_leaves_everything_as_it_was(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    real, before = getattr(release, fails), state(clone)
    monkeypatch.setattr(release, "build", lambda *_: None)

    def broken(*arguments: object) -> None:
        real(*arguments) if fails != "build" else None
        raise release.StepError("no")

    monkeypatch.setattr(release, fails, broken)
    assert release.main(["0.2.0", "--no-checks"], clone) == 1
    assert "failed, and nothing was changed: no" in capsys.readouterr().err
    assert state(clone) == before


def test_an_interrupt_and_a_wheel_that_cannot_be_built_leave_everything_as_it_was(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    git(clone, "rm", "-q", "README.md")
    save(clone)
    before = state(clone)
    assert release.main(["0.2.0", "--no-checks"], clone) == 1
    assert "the wheel of '.' was not built" in capsys.readouterr().err
    assert state(clone) == before

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(release, "build", lambda *_: None)
    monkeypatch.setattr(release, "add_tag", interrupted)
    with pytest.raises(KeyboardInterrupt):
        release.main(["0.2.0", "--no-checks"], clone)
    assert state(clone) == before


@pytest.mark.parametrize(("code", "says"), [("exit 1", "`sh -c exit 1` failed"), ("echo x > new", "no longer clean")])
def test_checks_that_fail_or_change_a_file_stop_the_release(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str, says: str
) -> None:
    monkeypatch.setattr(release, "CHECKS", ("sh", "-c", code))
    head = git(clone, "rev-parse", "HEAD")
    assert release.main(["0.2.0"], clone) == 1
    assert says in capsys.readouterr().err
    assert git(clone, "rev-parse", "HEAD") == head
    assert git(clone, "diff", "--name-only") == ""


def test_safelight_and_its_starters_have_one_version() -> None:
    found = {name: re.findall(line, (HOME / name).read_text()) for name, (line, _) in release.VERSION_PLACES.items()}
    written = [re.findall(r'[\d.]+\w*(?=")', lines[0]) for lines in found.values()]
    assert all(len(lines) == 1 for lines in found.values())
    assert written[0] == written[1] == written[2]
