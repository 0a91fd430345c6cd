"""How good the FLUX.1 starter is: 100 subjects, seeds 0 and 1, the settings that `safelight generate` has by default.

``python -m recipe.flux.measure`` draws the subjects in the three styles in turn, so the first "red apple, noto style",
the second "octopus, twemoji style". It prints the judge's verdict, and writes all 200 images as one sheet, none picked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipe import data
from recipe.flux.export import NAME
from recipe.measure import SHEETS, draw, empty_library, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=data.JUDGED)
    parser.add_argument("--sheets", type=Path, default=SHEETS)
    arguments = parser.parse_args()
    subjects = [caption for _, caption in data.subjects()][: arguments.subjects]
    styles = [data.STYLES[number % len(data.STYLES)] for number in range(len(subjects))]
    captions = [f"{subject}, {style} style" for subject, style in zip(subjects, styles, strict=True)]
    with empty_library() as engine:
        report(NAME, draw(engine, NAME, captions), styles, arguments.sheets)


if __name__ == "__main__":
    main()
