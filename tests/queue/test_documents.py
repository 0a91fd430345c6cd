"""The document of a job is parsed again only if it changed, or left the cache."""

from __future__ import annotations

from support.jobs import made_up

from safelight.queue import documents
from safelight.request.schema import Request


def test_a_document_is_parsed_again_only_if_it_changed() -> None:
    stored = made_up(Request("a cat", "m", seed=3), "d").to_json()
    request, job, why = documents.parse("1", stored)
    assert (request.prompt, request.seed, why) == ("a cat", 3, "")
    assert job is not None
    assert documents.parse("1", {**stored})[1] is job
    assert documents.parse("2", {**stored})[1] is not job
    changed = {**stored, "request": {**stored["request"], "prompt": "a dog"}}
    assert documents.parse("1", changed)[0].prompt == "a dog"
    stand_in, nothing, why = documents.parse("1", {**stored, "version": 999})
    assert (stand_in.prompt, nothing) == ("a cat", None)
    assert "newer Safelight" in why


def test_the_cache_has_the_most_recent_documents() -> None:
    stored = made_up(Request("a cat", "m"), "d").to_json()
    first = documents.parse("first", stored)
    for number in range(documents.MOST_CACHED):
        documents.parse(str(number), stored)
    assert documents.parse("first", stored) is not first
    assert len(documents._cached) == documents.MOST_CACHED
