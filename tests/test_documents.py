"""The commands and examples of the documents are executed, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from support import adapters, checkpoints, foreign_pictures, zimage

from safelight.cli.main import app

HOME = Path(__file__).parents[1]
DOCUMENTS = [HOME / "README.md", HOME / "CONTRIBUTING.md", *sorted((HOME / "docs").glob("*.md"))]
CHINESE = {HOME / "README.zh.md": HOME / "README.md"} | {
    page: HOME / "docs" / page.name for page in sorted((HOME / "docs/zh").glob("*.md"))
}
"""The pages in Chinese, and the page that each one translates."""

PAGES = [*DOCUMENTS, *CHINESE, HOME / "starter/README.md", *sorted((HOME / "starter/cards").glob("*.md"))]

ONLY_PARSED = {
    "serve": "it runs until someone stops it; tests/server starts it",
    "audit": "it needs the server of another program; tests/diagnostics/test_audit.py has one",
    "--server": "it needs a server; tests/workers/test_client.py starts one",
    "get": "it needs servers; tests/cli/test_getting.py has some",
    "doctor": "it takes too long; tests/diagnostics/test_doctor.py runs it",
    "--isolate": "it starts processes that import everything; tests/workers/test_isolation.py runs it",
    "--prove": "the same as --isolate, and more",
}
"""Commands of the README that are parsed and not executed: a word of each, and the reason."""

OTHER_PROGRAMS = (".", "buildah", "podman", "python3", "du", "mkdir", "cp", "systemctl", "journalctl", "ray", "export")
"""Programs of blocks that are not Safelight's: the shell, those that tests/test_install.py runs, and those that measure
the core's size."""


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if language in languages:
            yield block


def lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in a block, without its comment."""
    for block in blocks(page, "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.removeprefix("$ "), comments=True):
                yield words


def mentions(page: Path, program: str) -> Iterator[list[str]]:
    """Yield the words of each command of the program in the text, such as `make demo`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        words = shlex.split(code.split("'")[0]) if code.count('"') % 2 == 0 else code.split()
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        if words[:1] == [program]:
            yield words


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line's own parser; its commands do nothing."""

    def silence(command: Any) -> None:
        # typer makes the commands once, so other tests get the same ones.
        monkeypatch.setattr(command, "callback", lambda **_: None)
        for inner in getattr(command, "commands", {}).values():
            silence(inner)

    command = typer.main.get_command(app)
    silence(command)
    return command


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_a_command_of_a_block_is_one_that_the_parser_takes(page: Path, parser: Any) -> None:
    for program, *words in lines(page):
        if program == "safelight":
            parser.main(words, prog_name="safelight", standalone_mode=False)
        elif program == "make":
            check_target(words)
        else:
            assert program in OTHER_PROGRAMS, program


@pytest.mark.parametrize("page", [*DOCUMENTS, *CHINESE], ids=lambda page: page.name)
def test_a_command_in_the_text_has_a_name_and_options_that_exist(page: Path, parser: Any) -> None:
    """Such a command may lack its arguments."""
    for words in mentions(page, "make"):
        check_target(words[1:])
    for words in mentions(page, "safelight"):
        command, known = parser, set[str]()
        for word in words[1:]:
            known |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            if word.startswith("-"):
                assert word.partition("=")[0] in {*known, "--help"}, words
            elif word in getattr(command, "commands", {}):
                command, known = command.commands[word], set()
        named = [word for word in words[1:] if not word.startswith("-")]
        assert not named or command.name != "safelight" or named[0].isupper(), words


def check_target(words: list[str]) -> None:
    """Assert that the words of a command of make are targets, or variables that are used."""
    makefile = (HOME / "Makefile").read_text()
    read = makefile + (HOME / "tools/install.sh").read_text()
    for word in words:
        name, _, value = word.partition("=")
        if value:
            assert re.search(rf"\$\W*{name}\b", read), word
        else:
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), word


@pytest.fixture
def machine_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder and a home with the files that the README names. They are tiny."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in ("checkpoints", "Downloads", "loras", "invokeai"):
        (home / folder).mkdir(parents=True)
    checkpoints.write_single(home / "checkpoints/dreamshaper.safetensors", "sd1", 1)
    checkpoints.write_single(home / "checkpoints/deliberate.safetensors", "sd1", 2)
    (home / "Downloads/new.safetensors").hardlink_to(home / "checkpoints/deliberate.safetensors")
    save_file(adapters.lora("sd1", 1, adapters.kohya), home / "loras/style.safetensors")
    prefix, tensors = "first_stage_model.", load_file(home / "checkpoints/deliberate.safetensors")
    vae = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    save_file(vae, home / "loras/vae-ft-mse.safetensors")
    (home / "invokeai/invokeai.yaml").write_text("max_cache_ram_gb: 4\n")
    comfy = zimage.write_files(home / "ComfyUI/models", 1)
    (comfy / "diffusion_models/z_image_tiny.safetensors").rename(comfy / "diffusion_models/z_image_turbo.safetensors")
    (comfy / "vae/ae_tiny.safetensors").rename(comfy / "vae/ae.safetensors")
    outputs = home / "stable-diffusion-webui/outputs"
    outputs.mkdir(parents=True)
    (outputs / "00001-1.jpg").write_bytes(foreign_pictures.PICTURES["A1111, JPEG"]())
    here.mkdir()
    for name, colour in (("in", "red"), ("mask", "white"), ("apple", "green"), ("photo", "blue")):
        PILImage.new("RGB", (64, 64), colour).save(here / f"{name}.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return here


@pytest.mark.full
def test_the_commands_of_the_readme_run(machine_of_a_reader: Path) -> None:
    """In their order, as a reader types them."""
    only_parsed: set[str] = set()
    for program, *words in lines(HOME / "README.md"):
        if program != "safelight":
            continue
        if found := ONLY_PARSED.keys() & set(words):
            only_parsed |= found
            continue
        assert app(given(words, machine_of_a_reader), standalone_mode=False) in (None, 0), words
    assert only_parsed == ONLY_PARSED.keys()


def given(words: list[str], here: Path) -> list[str]:
    """What a shell would pass to the command. Images are made smaller."""
    passed: list[str] = []
    for word in words:
        if word == "out/IMAGE.png":
            passed.append(str(next((here / "out").glob("starter-*.png"))))
        elif word.startswith("~/"):
            path = Path(word).expanduser()
            found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
            assert found, word
            passed += map(str, found)
        else:
            passed.append(word)
    if "generate" in words or "grid" in words:
        # The last value of an option counts.
        passed += ["--steps", "1" if "grid" in words else "2"]
        passed += [] if "--outpaint" in words else ["--width", "64", "--height", "64"]
    return passed


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_python_of_a_document_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_extensions.py also uses the examples of docs/extending.md."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {"__name__": "example"})
    if page.name == "README.md":
        assert len(list((tmp_path / "out").glob("*.png"))) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """GitHub's names of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_a_translation_has_the_blocks_headings_and_tables_of_its_page(page: Path) -> None:
    """What is added to the one, or taken out of it, is missing in the other until somebody translates it."""
    assert outline(page) == outline(CHINESE[page])


def outline(page: Path) -> list[str]:
    """The blocks of code of a page, the marks of its headings and table rows, and its pictures, in their order."""
    marks = r"^```.*?^```|^#+(?= )|^\|(?:[- ]+\|)*|^!(?=\[)"
    return re.findall(marks, page.read_text(), re.DOTALL | re.MULTILINE)


def test_tests_that_the_documents_name_are_there() -> None:
    text = (HOME / "docs/corruption.md").read_text()
    every = "".join(path.read_text() for path in (HOME / "tests").rglob("*.py"))
    for name in re.findall(r"(?<!/)(test_[a-z0-9_]+)(?!\.py|[a-z0-9_]*\.py)", text):
        assert name.rstrip("_") in every, name
    for path in re.findall(r"`((?:tests|memory|devices|arch)/[a-z0-9_/]+(?:\.py)?)", text):
        assert (HOME / path).exists() or (HOME / "src/safelight" / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_place_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", page.read_text())


def test_the_site_has_every_document() -> None:
    nav = set(re.findall(r"[\w/-]+\.md", (HOME / "mkdocs.yml").read_text()))
    in_docs = {str(page.relative_to(HOME / "docs")) for page in (HOME / "docs").rglob("*.md")}
    assert nav == in_docs | {"index.md", "zh/index.md"}  # tools/docs_site.py makes these two


@pytest.mark.full
def test_the_site_is_built(tmp_path: Path) -> None:
    """It installs what it needs, and every link within it leads somewhere."""
    folder = tmp_path / "clone"
    shutil.copytree(HOME / "docs", folder / "docs")
    for name in ("README.md", "README.zh.md", "Makefile", "mkdocs.yml"):
        shutil.copy(HOME / name, folder / name)
    shutil.copytree(HOME / "tools", folder / "tools")
    done = subprocess.run(["make", "docs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Safelight" in (folder / "build/site/index.html").read_text()
    assert "整天切换" in (folder / "build/site/zh/index.html").read_text()
    assert (folder / "build/site/zh/tutorial.html").exists()
    for page in ("index.html", "zh/index.html"):
        assert not re.search(r'src="https?://', (folder / "build/site" / page).read_text())
