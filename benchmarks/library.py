"""What a large library costs: lists, finding a model by name, and accepting a request that names a LoRA.

``python benchmarks/library.py`` makes records of 1,000 models and 5,000 adapters (those of a starter and of a LoRA over
it, under other names), opens a server's parts on them, without its worker, and times each, the median of 50. *First*:
in a process that has not looked yet, with and without the index that is kept in ``index.db``.

Predicted before the first run: 5 ms to accept (three rows and their commit), 1 ms for a list; the first look 20 s
without the index, as each record is a megabyte of JSON, and 0.1 s with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from safelight.assembly.services import open_services
from safelight.catalog import records, starters
from safelight.catalog.adapters import Adapters
from safelight.catalog.library import Library
from safelight.queue.person import LOCAL
from safelight.request.schema import Lora, Request
from safelight.server import intake
from safelight.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import adapters as loras

TIMES = 50


def copied(folder: Path, values: dict[str, object], count: int, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{name}{number}.json").write_bytes(records.encoded({**values, "name": f"{name}{number}"}))


def seconds(what: Callable[[], object], times: int = TIMES) -> float:
    taken: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        what()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=5000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        starter = next(model for model in starters.models() if model.name == "starter-noto")
        added = Adapters(root).add(loras.for_starter(root / "style.safetensors"), "style")
        records.write(root / "models/m.json", replace(starter, name="m", origin="added"))
        copied(root / "models", _values(root / "models/m.json"), asked.models - 1, "model")
        copied(root / "adapters", _values(root / f"adapters/{added.name}.json"), asked.adapters - 1, "adapter")

        def look() -> None:
            Library(root).cards()
            Adapters(root).cards()

        rows = {"first look, without the index": seconds(look, 1), "first look, with the index": seconds(look, 3)}
        control = open_services(Settings(root=root, spare_worker=False))
        try:
            request = Request("red apple", "m", loras=(Lora("style", 1.0),))
            rows["models list"] = seconds(control.library.cards)
            rows["adapters list"] = seconds(control.catalog.adapters.cards)
            rows["find a model"] = seconds(lambda: control.library.get("m"))
            accept = partial(intake.accept, control, request, who=LOCAL, client="me")
            rows["accept a request with a LoRA"] = seconds(accept)
        finally:
            control.stop()
    print(f"| {asked.models} models, {asked.adapters} adapters | ms |\n|---|---|")
    for label, taken in rows.items():
        print(f"| {label} | {taken * 1000:.2f} |")


def _values(record: Path) -> dict[str, object]:
    values = json.loads(record.read_text())
    values.pop("checksum", None)
    return values


if __name__ == "__main__":
    main()
