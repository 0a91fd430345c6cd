"""How good the starters are: 100 subjects, seeds 0 and 1, the settings that `safelight generate` has by default.

``python -m recipe.measure`` prints, for each checkpoint, in how many of its 200 images the judge names the subject, the
style, and both; and writes all 200 as one sheet, none picked, in the order of ``subjects.tsv``, the two seeds side by
side. The judge has seen real images only.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import safelight
from recipe import data, judge

SHEETS = Path(__file__).parents[1] / "sheets"
COLUMNS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=data.JUDGED)
    parser.add_argument("--cfg", type=float, default=7.0)
    parser.add_argument("--styles", nargs="*", default=data.STYLES)
    parser.add_argument("--sheets", type=Path, default=SHEETS)
    arguments = parser.parse_args()
    named = judge.load()
    captions = [caption for _, caption in data.subjects()][: arguments.subjects]
    arguments.sheets.mkdir(exist_ok=True, parents=True)
    with tempfile.TemporaryDirectory() as root:
        os.environ["SAFELIGHT_ROOT"] = root
        engine = safelight.open_engine()
        for style in arguments.styles:
            tiles = []
            for caption in captions:
                request = safelight.Request(caption, f"starter-{style}", count=2, cfg=arguments.cfg)
                for image in engine.generate(request):
                    pixels = np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)
                    tiles.append(pixels)
            shown = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
            with torch.no_grad():
                subject, guess = named(data.as_float(shown))
            right_subject = subject.argmax(1) == torch.arange(len(tiles)) // 2
            right_style = guess.argmax(1) == data.STYLES.index(style)
            both = (right_subject & right_style).float().mean().item()
            print(
                f"starter-{style}: {len(tiles)} images; subject {right_subject.float().mean().item():.1%}, "
                f"style {right_style.float().mean().item():.1%}, both {both:.1%}",
                flush=True,
            )
            rows = [np.concatenate(tiles[i : i + COLUMNS], 1) for i in range(0, len(tiles), COLUMNS)]
            Image.fromarray(np.concatenate(rows, 0)).save(arguments.sheets / f"starter-{style}.png", optimize=True)


if __name__ == "__main__":
    main()
