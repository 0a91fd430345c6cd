"""Documents of jobs are read as they are stored, and those that were read last are not read again."""

from __future__ import annotations

from support.jobs import made_up

from safelight.queue import documents
from safelight.request.schema import Request


def test_a_document_is_read_again_only_if_it_changed() -> None:
    stored = made_up(Request("a cat", "m", seed=3), "d").to_json()
    request, job, why = documents.read("1", stored)
    assert (request.prompt, request.seed, why) == ("a cat", 3, "")
    assert job is not None
    assert documents.read("1", {**stored})[1] is job
    assert documents.read("2", {**stored})[1] is not job
    changed = {**stored, "request": {**stored["request"], "prompt": "a dog"}}
    assert documents.read("1", changed)[0].prompt == "a dog"
    stand_in, nothing, why = documents.read("1", {**stored, "version": 999})
    assert (stand_in.prompt, nothing) == ("a cat", None)
    assert "newer Safelight" in why


def test_only_the_last_stay_read() -> None:
    stored = made_up(Request("a cat", "m"), "d").to_json()
    first = documents.read("first", stored)
    for number in range(documents.DOCUMENTS):
        documents.read(str(number), stored)
    assert documents.read("first", stored) is not first
    assert len(documents._known) == documents.DOCUMENTS
