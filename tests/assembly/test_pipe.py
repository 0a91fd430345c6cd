"""Jobs as the processes that compute carry them out."""

from __future__ import annotations

import pytest

import safelight
from safelight.assembly.pipe import run_job
from safelight.workers.local_engine import LocalEngine
from safelight.workers.messages import FromWorker, Generate, Made, Progressed


class Heard:
    def __init__(self) -> None:
        self.messages: list[FromWorker] = []

    def say(self, message: FromWorker) -> None:
        self.messages.append(message)


@pytest.mark.parametrize("more", [{}, {"variation_strength": 0.4, "variation_seed": 9}])
def test_a_batch_that_is_resumed_has_the_images_of_the_whole_one(engine: LocalEngine, ask, more: dict) -> None:
    """After a worker's death, a restart or a stop a job goes on with the images that it lacks."""
    request: safelight.Request = ask(seed=5, count=4, **more)
    whole = list(engine.generate(request))
    assert len({image.pixels_sha256 for image in whole}) == 4
    job = engine.resolve(request)
    for first in (1, 2, 3):
        pipe = Heard()
        ended, _ = run_job(engine, Generate("job", job, first, ()), pipe, lambda: False)  # type: ignore[arg-type]
        assert ended.kind == "done"
        made = [message for message in pipe.messages if isinstance(message, Made)]
        assert [message.index for message in made] == list(range(first, 4))
        assert [message.image.pixels for message in made] == [image.pixels for image in whole[first:]]
        assert [message.image.metadata["request"] for message in made] == [
            image.metadata["request"] for image in whole[first:]
        ]
        told = {message.progress.image for message in pipe.messages if isinstance(message, Progressed)}
        assert told == set(range(first, 4))
