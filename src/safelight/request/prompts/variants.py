"""Choices in prompts: ``{red|green} apple``, ``{2$$a|b|c}``, and wildcards such as ``__colour__``, which are files.

An image's seed makes each choice. From then on the chosen text is the prompt: in the queue, in the image's metadata,
and when the image is made again.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

from safelight.errors import RequestError
from safelight.request.prompts import choice_grammar
from safelight.request.prompts.choice_grammar import ChoiceSyntaxError, Node, marked
from safelight.request.prompts.choice_sampling import Sampling, UnusableChoiceError
from safelight.request.prompts.wildcard_files import WildcardFiles
from safelight.request.schema import Request

_CHOICE = re.compile(r"\{[^{}]*[}|]|\$\{|__[\w/*.-]+?__")
_WILDCARD = re.compile(r"__([\w/*.-]+?)__")

MOST_CHOICES = 200
"""Limit of choices written in one prompt."""

MOST_VARIANTS = 1000


def has_choices(text: str) -> bool:
    """Return whether the text contains a choice."""
    return _CHOICE.search(marked(text).mask) is not None


def escaped(text: str) -> str:
    """Escape a text so that it contains no choice."""
    return text.replace("{", "\\{").replace("}", "\\}") if has_choices(text) else text


def make_choices(request: Request, wildcards: Path) -> list[Request]:
    """Make the choices of a request by the seed of each image.

    ``wildcards``: the folder of ``NAME.txt`` files with one value per line.
    Returns one request per image; a single request for all images if there are no choices.
    Raises RequestError for a prompt that cannot be parsed, and for a wildcard without a file.
    """
    files = WildcardFiles(wildcards)
    prompt = _Template("prompt", request.prompt, files)
    negative = _Template("negative", request.negative, files)
    if prompt.is_plain and negative.is_plain:
        return [replace(request, prompt=prompt.random(0), negative=negative.random(0))]
    singles = [request.for_image(index) for index in range(request.count)]
    return [replace(one, prompt=prompt.random(one.seed), negative=negative.random(one.seed)) for one in singles]


def all_combinations(request: Request, wildcards: Path) -> list[Request]:
    """Return a request for each combination of choices in the prompt and the negative prompt, all with the same seed.

    Raises RequestError as :func:`make_choices`, and for more than :data:`MOST_VARIANTS` combinations.
    """
    files = WildcardFiles(wildcards)
    prompts = _Template("prompt", request.prompt, files).combinations(request.seed)
    negatives = _Template("negative", request.negative, files).combinations(request.seed)
    if len(prompts) * len(negatives) > MOST_VARIANTS:
        raise RequestError("prompt", request.prompt[:40], f"has more than {MOST_VARIANTS} combinations")
    return [replace(request, prompt=prompt, negative=negative) for prompt in prompts for negative in negatives]


class _Template:
    """A prompt with choices.

    ``field``: the name of its field in the request.
    ``is_plain``: it has no choices.
    """

    def __init__(self, field: str, text: str, files: WildcardFiles) -> None:
        self._field = field
        self._text = text
        self._files = files
        read = marked(text)
        self.is_plain = _CHOICE.search(read.mask) is None
        self._node: Node = choice_grammar.PlainText(read.plain) if self.is_plain else self._parsed(read.mask)

    def random(self, seed: int) -> str:
        """Return a text with random choices. Raises RequestError."""
        with self._errors():
            return Sampling(self._files, Random(seed)).random(self._node)

    def combinations(self, seed: int) -> list[str]:
        """Return a text for each combination, at most one more than are allowed. Raises RequestError."""
        with self._errors():
            return Sampling(self._files, Random(seed)).combinations(self._node, MOST_VARIANTS + 1)

    def _parsed(self, mask: str) -> Node:
        for wildcard in _WILDCARD.finditer(mask):
            if ".." in wildcard[1] or wildcard[1].startswith("/"):
                problem = "is not a wildcard: its name must be that of a file in the folder wildcards"
                raise RequestError(self._field, wildcard[0], problem)
        if len(_CHOICE.findall(mask)) > MOST_CHOICES:
            raise self._error(self._text, f"has more than {MOST_CHOICES} choices")
        try:
            return choice_grammar.parse(self._text)
        except ChoiceSyntaxError as error:
            near = self._text[max(0, error.at - 10) : error.at + 20]
            raise self._error(near, f"at character {error.at}: its choices cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            raise self._error(self._text, f"its choices cannot be read ({error})") from error

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except UnusableChoiceError as error:
            raise self._error(error.source or self._text, str(error)) from error
        except RecursionError as error:
            raise self._error(self._text, "its choices are too deep: does a wildcard contain itself?") from error

    def _error(self, value: str, problem: str) -> RequestError:
        return RequestError(self._field, value[:40], problem)
