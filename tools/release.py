"""Release Safelight and its starters: ``make release VERSION=0.2.0``, or ``python tools/release.py 0.2.0``.

It refuses a release that cannot be right, and names every reason (exit code 2). A step that fails leaves the tree, the
branch and the tags as they were (exit code 1). It pushes nothing. ``--dry-run`` prints the steps and does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from packaging.version import InvalidVersion, Version

HOME = Path(__file__).parents[1]
BRANCH = "main"
CHANGELOG = "CHANGELOG.md"
UNRELEASED = "## Unreleased"
CHECKS = ("make", "test")

VERSION_PLACES = {
    "src/safelight/version.py": (r'(?m)^VERSION = "[^"]+"$', 'VERSION = "{}"'),
    "starter/pyproject.toml": (r'(?m)^version = "[^"]+"$', 'version = "{}"'),
    "pyproject.toml": (r'(?m)^starter = \["safelight-starter[^"]*"\]$', 'starter = ["safelight-starter=={}"]'),
}
"""Where a version is written: the file, the line (exactly one matches), and what the line becomes."""

DISTRIBUTIONS = (".", "starter")
"""The folders of which a wheel is built."""


class RefusedError(Exception):
    """The release cannot be right. Nothing was changed. ``reasons``: one sentence each."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = reasons


class StepError(Exception):
    """A step failed, and everything is as it was."""


@dataclass(frozen=True)
class Release:
    """A release. ``text``: the version's section of the changelog. ``checked``: whether the checks run before it."""

    root: Path
    version: str
    date: str
    text: str
    checked: bool

    @property
    def tag(self) -> str:
        return tag_of(self.version)

    @property
    def notes(self) -> str:
        unchecked = "" if self.checked else "\n\n**The checks were not run for this release (`--no-checks`).**"
        return f"{self.text}{unchecked}\n"


def tag_of(version: str) -> str:
    """Return the name of a version's tag."""
    return f"v{version}"


def git(root: Path, *words: str, given: str | None = None) -> str:
    """Run git and return what it prints. ``given``: its standard input. Raises StepError when git fails."""
    done = subprocess.run(["git", *words], cwd=root, input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StepError(f"git {' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def sections(changelog: str) -> dict[str, str]:
    """Return the sections of a changelog: each heading's line, and the text below it."""
    parts = re.split(r"(?m)^(## .*)$", changelog)
    return {heading.strip(): text.strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def released_versions(root: Path, headings: Iterator[str]) -> Iterator[Version]:
    """Yield each version that has a tag, or a section in the changelog."""
    names = [tag.removeprefix("v") for tag in git(root, "tag", "--list", "v*").splitlines()]
    names += [heading.removeprefix("## ").partition(",")[0] for heading in headings]
    for name in names:
        with contextlib.suppress(InvalidVersion):
            yield Version(name)


def prepare(root: Path, version: str, checked: bool) -> Release:
    """Return the release. Raises RefusedError with every reason against it."""
    reasons: list[str] = []
    if git(root, "status", "--porcelain"):
        reasons.append("the tree is dirty: commit or remove what `git status` lists")
    if (branch := git(root, "branch", "--show-current")) != BRANCH:
        reasons.append(f"the branch is {branch or 'none (a detached HEAD)'}, not {BRANCH}")
    found = sections((root / CHANGELOG).read_text())
    text = found.get(UNRELEASED)
    if text is None:
        reasons.append(f"{CHANGELOG} has no section `{UNRELEASED}`")
    elif not text:
        reasons.append(f"the section `{UNRELEASED}` of {CHANGELOG} is empty: say what changed")
    reasons += version_reasons(root, version, found)
    if reasons:
        raise RefusedError(reasons)
    return Release(root, version, f"{datetime.now(UTC):%Y-%m-%d}", text or "", checked)


def version_reasons(root: Path, version: str, found: dict[str, str]) -> Iterator[str]:
    """Yield each reason against a version. ``found``: the sections of the changelog."""
    try:
        asked = Version(version)
    except InvalidVersion:
        yield f"{version!r} is not a version (PEP 440), such as 0.2.0 or 0.2.0rc1"
        return
    if str(asked) != version or asked.local:
        yield f"{version!r} is not a version as PEP 440 writes it: use {asked.public}"
        return
    if git(root, "tag", "--list", tag_of(version)):
        yield f"the tag {tag_of(version)} exists"
    written = re.search(r'VERSION = "([^"]+)"', (root / "src/safelight/version.py").read_text())
    if written is None:
        yield "src/safelight/version.py has no VERSION"
    elif asked < Version(written[1]):
        yield f"{version} is not higher: src/safelight/version.py has {written[1]}"
    last = max(released_versions(root, iter(found)), default=None)
    if last is not None and asked <= last:
        yield f"{version} is not higher: {last} is released"


def run_checks(release: Release) -> None:
    """Run the checks. Raises StepError when one fails, or when they changed a file."""
    if subprocess.run(CHECKS, cwd=release.root, check=False).returncode != 0:
        raise StepError(f"`{' '.join(CHECKS)}` failed")
    if changed := git(release.root, "status", "--porcelain"):
        raise StepError(f"the tree is no longer clean after `{' '.join(CHECKS)}`:\n{changed}")


def write_version(release: Release) -> None:
    """Write the version into each of its places. Raises StepError when a place is not there."""
    for name, (line, becomes) in VERSION_PLACES.items():
        path = release.root / name
        text, count = re.subn(line, becomes.format(release.version), path.read_text())
        if count != 1:
            raise StepError(f"{name} has {count} lines with the version; it must have one")
        path.write_text(text)


def write_changelog(release: Release) -> None:
    """Give the unreleased section the version and the date, and put an empty unreleased section before it."""
    path = release.root / CHANGELOG
    heading = f"## {release.version}, {release.date}"
    path.write_text(path.read_text().replace(f"{UNRELEASED}\n", f"{UNRELEASED}\n\n{heading}\n", 1))


def build(release: Release, folder: Path) -> None:
    """Build the wheels into ``folder``. Raises StepError when a build fails, or a wheel has another version."""
    for name in DISTRIBUTIONS:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        done = subprocess.run(command, cwd=release.root / name, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StepError(f"the wheel of {name!r} was not built:\n{done.stdout}{done.stderr}")
    wrong = [path.name for path in folder.iterdir() if path.name.split("-")[1] != release.version]
    if wrong or len(list(folder.iterdir())) != len(DISTRIBUTIONS):
        raise StepError(f"not the wheels of {release.version}: {', '.join(path.name for path in folder.iterdir())}")


def commit(release: Release) -> None:
    """Commit the version and the changelog, and nothing else."""
    git(release.root, "commit", "--quiet", "-m", f"Safelight {release.version}", "--", *changed_files())


def add_tag(release: Release) -> None:
    """Make the annotated tag, with the notes."""
    # Git would take the lines that begin with # for comments.
    message = f"Safelight {release.version}\n\n{release.notes}"
    git(release.root, "tag", "--annotate", release.tag, "--cleanup=verbatim", "--file=-", given=message)


def write_dist(release: Release, built: Path) -> None:
    """Move the wheels into ``dist``, and write the notes with their hashes beside them."""
    folder = release.root / "dist"
    folder.mkdir(exist_ok=True)
    lines = [f"# Safelight {release.version}", "", release.date, "", release.notes, "| file | bytes | SHA-256 |"]
    lines.append("|---|---|---|")
    placed: list[Path] = []
    try:
        for wheel in sorted(built.iterdir()):
            content = wheel.read_bytes()
            lines.append(f"| `{wheel.name}` | {len(content)} | `{hashlib.sha256(content).hexdigest()}` |")
            placed.append(folder / wheel.name)
            placed[-1].write_bytes(content)
        placed.append(folder / f"NOTES-{release.version}.md")
        placed[-1].write_text("\n".join([*lines, ""]))
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise


def changed_files() -> tuple[str, ...]:
    """Return the files that a release changes."""
    return (*VERSION_PLACES, CHANGELOG)


@contextlib.contextmanager
def unchanged_on_failure(release: Release) -> Generator[None]:
    """Put the branch, the files of the release and its tag back when the context raises anything, an interrupt too."""
    before = git(release.root, "rev-parse", "HEAD")
    try:
        yield
    except BaseException:
        # Not `reset --hard`: somebody may have edited another file meanwhile.
        git(release.root, "reset", "--quiet", "--soft", before)
        git(release.root, "restore", f"--source={before}", "--staged", "--worktree", "--", *changed_files())
        if git(release.root, "tag", "--list", release.tag):
            git(release.root, "tag", "--delete", release.tag)
        raise


Step = tuple[str, Callable[[], None]]


def steps(release: Release, built: Path) -> Iterator[Step]:
    """Yield each step after the checks: what it does, and the function that does it."""
    version = release.version
    yield f"write {version} into {', '.join(VERSION_PLACES)}", lambda: write_version(release)
    yield f"{CHANGELOG}: `{UNRELEASED}` becomes `## {version}, {release.date}`", lambda: write_changelog(release)
    yield "build the wheels of safelight and safelight-starter", lambda: build(release, built)
    yield f"commit `Safelight {version}` on {BRANCH}", lambda: commit(release)
    yield f"make the tag {release.tag} with the notes", lambda: add_tag(release)
    yield f"write dist/*.whl and dist/NOTES-{version}.md", lambda: write_dist(release, built)


def carry_out(release: Release, dry_run: bool) -> None:
    """Run the checks and each step, and print each before it runs. Raises StepError."""
    with tempfile.TemporaryDirectory() as built:
        if dry_run:
            checks = [f"run `{' '.join(CHECKS)}`"] if release.checked else []
            for what in [*checks, *(what for what, _ in steps(release, Path(built)))]:
                print(f"would {what}")
            return
        if release.checked:
            print(f"run `{' '.join(CHECKS)}`", flush=True)
            run_checks(release)
        with unchanged_on_failure(release):
            for what, do in steps(release, Path(built)):
                print(what, flush=True)
                do()
    print(f"Safelight {release.version} is released here. To publish it: git push origin {BRANCH} {release.tag}")


def main(words: list[str], root: Path = HOME) -> int:
    """Release the version that the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make release VERSION=X.Y.Z", description="Release Safelight.")
    parser.add_argument("version", help="the new version, such as 0.2.0")
    parser.add_argument("--no-checks", action="store_true", help=f"do not run `{' '.join(CHECKS)}` first")
    parser.add_argument("--dry-run", action="store_true", help="print each step, and do nothing")
    asked = parser.parse_args(words)
    if asked.no_checks:
        print("WARNING: --no-checks: THE TESTS ARE NOT RUN. Nothing shows that this version works.", file=sys.stderr)
    try:
        carry_out(prepare(root, asked.version, not asked.no_checks), asked.dry_run)
    except RefusedError as error:
        print(*(f"refused: {reason}" for reason in error.reasons), sep="\n", file=sys.stderr)
        return 2
    except StepError as error:
        print(f"failed, and nothing was changed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
