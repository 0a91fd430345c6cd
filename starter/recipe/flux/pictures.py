"""The training pictures of the FLUX.1 starter: the same emoji sets, 128x128 pixels on white.

The packages of :mod:`recipe.data` have Noto Emoji and Twemoji with 64 pixels only, so these two are rendered from the
SVG files of two other packages. ``resvg`` renders them, in Node.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipe import data

SIZE = 128
DRAWINGS = {"noto": "@iconify-json/noto@1.2.3", "twemoji": "@iconify-json/twemoji@1.2.5"}
RENDERER = "@resvg/resvg-js@2.6.2"
SCRIPT = Path(__file__).with_name("render.js")


def load(packages: Path) -> data.Images:
    """Load every subject in every style: uint8, (styles, subjects, 3, 128, 128).

    Raises KeyError, naming the subject, when a package lacks one.
    """
    data.fetch(packages, [*data.PACKAGES.values(), *DRAWINGS.values()])
    if not (packages / "node_modules/@resvg/resvg-js").exists():
        subprocess.run(["npm", "install", "--silent", "--no-save", "--prefix", ".", RENDERER], cwd=packages, check=True)
    files = data.file_stems(packages)
    pictures = [
        data.on_white(png, SIZE) for style in DRAWINGS for png in _render(_drawings(packages, style, files), packages)
    ]
    pictures += [data.on_white(picture, SIZE) for picture in data.read_pictures(packages, "fluent", files)]
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    captions = [caption for _, caption in data.subjects()]
    return data.Images(stacked.reshape(len(data.STYLES), len(captions), 3, SIZE, SIZE).contiguous(), captions)


def _drawings(packages: Path, style: str, files: dict[str, str]) -> list[str]:
    """Return each subject's SVG. ``files``: as :func:`recipe.data.file_stems` returns them."""
    with tarfile.open(data.archive(packages, DRAWINGS[style])) as tar:
        names, icons = (json.loads(data.read_member(tar, f"package/{name}.json")) for name in ("chars", "icons"))
    out = []
    for short, stem in files.items():
        name = next((names[code] for code in (stem, stem.removesuffix("-fe0f")) if code in names), None)
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if name is None:
            raise KeyError(f"{DRAWINGS[style]} has no picture of {short}")
        out.append(_svg(icons, icons["icons"][name]))
    return out


def _svg(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def _render(svgs: list[str], packages: Path) -> list[bytes]:
    """Return each SVG as the bytes of a PNG, 128 pixels wide, on white."""
    environment = os.environ | {"NODE_PATH": str((packages / "node_modules").resolve())}
    request = json.dumps({"size": SIZE, "svgs": svgs})
    done = subprocess.run(
        ["node", str(SCRIPT)], input=request, env=environment, check=True, text=True, stdout=subprocess.PIPE
    )
    return [base64.b64decode(png) for png in json.loads(done.stdout)]
