"""A field that is added by one line of the schema appears on every surface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import safelight

HOME = Path(__file__).parents[2]
LINE = (
    '    glow: Annotated[float, FieldDeclaration(help="How much it glows.", group=RUN, minimum=0, maximum=1)] = 0.25\n'
)

PROGRAM = """
import json, sys
sys.path.append(sys.argv[1])
import fields
from typer.testing import CliRunner
from safelight.cli.main import app
from safelight.pictures import chunks
from safelight.server.apis.native_fields import Generation
from pathlib import Path

command = ["generate", "apple", "-m", sys.argv[2], "--steps", "1", "--seed", "0", "--width", "64", "--height", "64"]
runs = [CliRunner().invoke(app, [*command, "--out", out, "--glow", glow]) for out, glow in (("a", "0.5"), ("b", "2"))]
[picture] = Path("a").glob("*.png")
request = chunks.read(picture)[0]["request"]
print(json.dumps({
    "help": CliRunner().invoke(app, ["generate", "--help"]).output,
    "api": Generation.model_json_schema()["properties"]["glow"],
    "page": [line for line in fields.page() if "glow" in line],
    "metadata": request["glow"],
    "refused": str(runs[1].exception),
}))
"""


@pytest.mark.full
def test_one_line_of_the_schema_is_enough(tmp_path: Path, tiny: Path) -> None:
    copy = tmp_path / "src/safelight"
    shutil.copytree(Path(safelight.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    schema = copy / "request/schema.py"
    before = "    seamless: Annotated["
    assert schema.read_text().count(before) == 1
    schema.write_text(schema.read_text().replace(before, LINE + before))
    command = [sys.executable, "-c", PROGRAM, str(HOME / "tools"), str(tiny / "a.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "TERM": "dumb", "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert not done.returncode, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert "--glow" in got["help"]
    assert "How much it glows. (0 to 1)" in got["help"]
    assert got["api"] == {
        "default": 0.25,
        "description": "How much it glows.",
        "maximum": 1,
        "minimum": 0,
        "title": "Glow",
        "type": "number",
    }
    assert got["page"] == ["| `glow` | `0.25` | 0 to 1 | How much it glows. | `--glow` | – | – | 1 |"]
    assert got["metadata"] == 0.5
    assert got["refused"] == "glow=2.0: must be a number from 0 to 1"
