"""What a large gallery costs: lists, searches, filters and changes.

``python benchmarks/gallery.py`` fills a database with 100,000 made-up images of 20 models with 2 KB of metadata each,
and times each question, the median of 20 and the longest. *A page* has 100 images with their metadata; *deep* is a page
in the middle. Each search finds other words.

Predicted before the first run: 5 ms for a page, because an index has the order; 50 ms for a search for a word that a
third of the images have, because SQLite first collects all of them; 10 ms to count.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safelight.queue.database import Database
from safelight.queue.image_table import ImageTable
from safelight.queue.stored_image import ImageChange, ImageFilter, StoredImage

WORDS = 2000
"""Different words of the prompts. The first ones are frequent."""

AT_ONCE = 1000
TIMES = 20


def image(number: int, chance: random.Random) -> StoredImage:
    """A made-up image."""
    words = [f"word{min(int(chance.expovariate(1 / 150)), WORDS - 1)}" for _ in range(30)]
    prompt = " ".join(["cat" if number % 3 == 0 else "dog", *words, *(["needle"] if number % 20_000 == 7 else [])])
    start = StoredImage(f"{number:032x}", "", 0, f"/pictures/{number}.png", 1024, 1024, number, "", "", "", 0.0, {})
    return replace(
        start,
        model=f"model{int(chance.paretovariate(1)) % 20}",
        created=1.7e9 + number * 60,
        metadata={"request": {"prompt": prompt}, "more": "x" * 2000},
        prompt=prompt,
        loras=(f"lora{number % 50}",) if number % 2 else (),
        starred=number % 100 == 0,
        imported=True,
    )


def fill(table: ImageTable, images: int) -> None:
    chance = random.Random(1)
    for first in range(0, images, AT_ONCE):
        table.add_imported([image(number, chance) for number in range(first, min(first + AT_ONCE, images))])


def seconds(what: Callable[[], object]) -> tuple[float, float]:
    """Return the median and the longest seconds."""
    taken: list[float] = []
    for _ in range(TIMES):
        start = time.perf_counter()
        what()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), max(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    images: int = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder))
        table = database.images
        start = time.perf_counter()
        fill(table, images)
        filled = time.perf_counter() - start
        board = database.boards.add("a board")
        table.change([f"{number:032x}" for number in range(0, images, 7)], ImageChange(board=board.id))
        table.change([f"{number:032x}" for number in range(0, images, 1000)], ImageChange(add_tags=("keep",)))
        middle = f"{1.7e9 + images // 2 * 60!r}-0"
        some = [f"{number:032x}" for number in range(min(100, images))]
        pages = {
            "a page": ImageFilter(),
            "search: a third has the word": ImageFilter(search="cat"),
            "search: two words": ImageFilter(search="cat word10"),
            "search: the beginning of many words": ImageFilter(search="wor"),
            "search: five have the word": ImageFilter(search="needle"),
            "search: nothing has the word": ImageFilter(search="unicorn"),
            "a model": ImageFilter(model="model3"),
            "a LoRA": ImageFilter(lora="lora7"),
            "a tag": ImageFilter(tag="keep"),
            "a board": ImageFilter(board=board.id),
            "starred": ImageFilter(starred=True),
            "a seed": ImageFilter(seed=images // 2),
            "a day": ImageFilter(after=1.7e9 + 86_400, before=1.7e9 + 2 * 86_400),
            "a model, starred, a word": ImageFilter(model="model1", starred=True, search="cat"),
            "the trash, which is empty": ImageFilter(trashed=True),
        }
        rows = {f"{label}": seconds(lambda wanted=wanted: table.page(wanted)) for label, wanted in pages.items()}
        rows["a page, deep"] = seconds(lambda: table.page(cursor=middle))
        rows["count all"] = seconds(table.count)
        rows["count: a third has the word"] = seconds(lambda: table.count(ImageFilter(search="cat")))
        rows["models, LoRAs and tags with their counts"] = seconds(table.facets)
        rows["boards"] = seconds(database.boards.all)
        rows["star 100"] = seconds(lambda: table.change(some, ImageChange(starred=True)))
        rows["tag 100"] = seconds(lambda: table.change(some, ImageChange(add_tags=("new",))))
        database.close()
    print(f"| {images} images, added in {filled:.0f} s | ms | longest |\n|---|---|---|")
    for label, (median, longest) in rows.items():
        print(f"| {label} | {median * 1000:.1f} | {longest * 1000:.1f} |")


if __name__ == "__main__":
    main()
