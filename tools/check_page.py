"""Checks the types of the page's scripts by TypeScript: ``python tools/check_page.py``.

The scripts are JavaScript with types in comments. npm fetches TypeScript into ``build/``, unless it is there. The exit
code is TypeScript's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from safelight.files.disk import write_whole

HOME = Path(__file__).resolve().parents[1]
SCRIPTS = HOME / "src/safelight/server/page/static"
FOLDER = HOME / "build/typescript"
PACKAGE = "typescript@5.9.3"

OPTIONS = {
    "allowJs": True,
    "checkJs": True,
    "noEmit": True,
    "strict": True,
    "noUnusedLocals": True,
    "noUnusedParameters": True,
    "target": "es2023",
    "lib": ["es2023", "dom", "dom.iterable"],
    "module": "esnext",
    "moduleResolution": "bundler",
}


def program(name: str) -> str:
    """Return the path of a program. Exits if it is not installed."""
    found = shutil.which(name)
    if found is None:
        sys.exit(f"{name} is not installed; it comes with Node.js")
    return found


def compiler() -> Path:
    """Return the path of TypeScript's compiler, fetched if it is not there yet."""
    path = FOLDER / "package/lib/tsc.js"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        # Another process may fetch it at the same time, and none may see a part of it.
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            subprocess.run(
                [program("npm"), "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL
            )
            [archive] = Path(folder).glob("typescript-*.tgz")
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter="data")
            with contextlib.suppress(OSError):
                (Path(folder) / "package").rename(FOLDER / "package")
    return path


def main() -> None:
    tsc, settings = compiler(), FOLDER / "tsconfig.json"
    include = {"compilerOptions": OPTIONS, "include": [f"{SCRIPTS}/**/*.js"], "exclude": [f"{SCRIPTS}/lib"]}
    write_whole(settings, json.dumps(include).encode())
    sys.exit(subprocess.run([program("node"), str(tsc), "-p", str(settings)], check=False).returncode)


if __name__ == "__main__":
    main()
