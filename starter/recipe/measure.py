"""How good the starters are: 100 subjects, seeds 0 and 1, the settings that `safelight generate` has by default.

``python -m recipe.measure`` prints, for each checkpoint, in how many of its 200 images the judge names the subject, the
style, and both; and writes all 200 as one sheet, none picked, in the order of ``subjects.tsv``, the two seeds side by
side. The judge has seen real images only.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import safelight
from recipe import data, judge

SHEETS = Path(__file__).parents[1] / "sheets"
COLUMNS = 20


@contextmanager
def empty_library() -> Generator[Any]:
    """An engine whose library has the starters only."""
    with tempfile.TemporaryDirectory() as root:
        os.environ["SAFELIGHT_ROOT"] = root
        yield safelight.open_engine()


def draw(engine: Any, model: str, captions: Sequence[str], **settings: Any) -> list[np.ndarray]:
    """Draw each caption with seeds 0 and 1. Returns pixels (height, width, 3), the two of a caption side by side."""
    tiles = []
    for caption in captions:
        for image in engine.generate(safelight.Request(caption, model, count=2, **settings)):
            tiles.append(np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3))
    return tiles


def report(name: str, tiles: list[np.ndarray], styles: Sequence[str], sheets: Path) -> None:
    """Print the judge's verdict on a checkpoint's pictures, and write the sheet.

    ``tiles``: two for each of the first subjects. ``styles``: of each subject. The judge sees 64x64 pixels.
    """
    shown = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
    with torch.no_grad():
        subject, style = judge.load()(F.avg_pool2d(data.as_float(shown), shown.shape[-1] // data.SIZE))
    number = torch.arange(len(tiles)) // 2
    right_subject = subject.argmax(1) == number
    right_style = style.argmax(1) == torch.tensor([data.STYLES.index(one) for one in styles])[number]
    shares = (right.float().mean().item() for right in (right_subject, right_style, right_subject & right_style))
    words = ", ".join(f"{what} {share:.1%}" for what, share in zip(("subject", "style", "both"), shares, strict=True))
    print(f"{name}: {len(tiles)} images; {words}", flush=True)
    sheets.mkdir(exist_ok=True, parents=True)
    rows = [np.concatenate(tiles[i : i + COLUMNS], 1) for i in range(0, len(tiles), COLUMNS)]
    Image.fromarray(np.concatenate(rows, 0)).save(sheets / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=data.JUDGED)
    parser.add_argument("--cfg", type=float, default=7.0)
    parser.add_argument("--styles", nargs="*", default=data.STYLES)
    parser.add_argument("--sheets", type=Path, default=SHEETS)
    arguments = parser.parse_args()
    captions = [caption for _, caption in data.subjects()][: arguments.subjects]
    with empty_library() as engine:
        for style in arguments.styles:
            name = f"starter-{style}"
            tiles = draw(engine, name, captions, cfg=arguments.cfg)
            report(name, tiles, [style] * len(captions), arguments.sheets)


if __name__ == "__main__":
    main()
