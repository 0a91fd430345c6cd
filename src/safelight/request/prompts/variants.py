"""Choices in prompts: ``{red|green} apple``, ``{2$$a|b|c}``, and wildcards such as ``__colour__``, which are files.

dynamicprompts parses them (https://github.com/adieyal/dynamicprompts). An image's seed makes each choice. From then on
the chosen text is the prompt: in the queue, in the image's metadata, and when the image is made again.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safelight.errors import RequestError
from safelight.request.prompts import tags
from safelight.request.schema import Request

_CHOICE = re.compile(r"\{[^{}]*[}|]|\$\{|__[\w/*.-]+?__")

# Private-use stand-ins for characters that dynamicprompts would interpret.
# ``_PLACEHOLDERS``: replaced everywhere, and restored afterwards.
# ``_PLACEHOLDER_TO_CHARACTER``: restores the stand-ins that ``_literal`` (tags), ``_COMMENT`` and ``_BARE`` insert.
_PLACEHOLDERS = {"\\{": "\ue003", "\\}": "\ue004", "#": "\ue000", "%": "\ue001"}
_PLACEHOLDER_TO_CHARACTER = str.maketrans("\ue002\ue005\ue006\ue007\ue008\ue009\ue00a", "$_{}|/*")
_COMMENT = re.compile(r"(__[\w/*.-]+?__)|//|/\*|\*/")
"""Marks of a comment in dynamicprompts, except in a wildcard's name. In Safelight they are plain text."""
_PRIVATE = re.compile("[\ue000-\ue00a]")
"""Safelight replaces other characters by these while it makes choices, so no prompt may contain them."""
_OPTIONS = re.compile(r"\{[^{}]*\|[^{}]*\}")
_BARE = re.compile(r"(?<!\$)\$(?![\${])")
"""A ``$`` that has a meaning only in dynamicprompts. Safelight replaces it before parsing, and restores it after."""

MOST_CHOICES = 200
"""Limit of choices written in one prompt."""

_WILDCARD = re.compile(r"__([\w/*.-]+?)__")

MOST_VARIANTS = 1000


def has_choices(text: str) -> bool:
    """Return whether the text contains a choice."""
    return _CHOICE.search(_shielded(text)) is not None


def escaped(text: str) -> str:
    """Escape a text so that it contains no choice."""
    return text.replace("{", "\\{").replace("}", "\\}") if has_choices(text) else text


def _shielded(text: str) -> str:
    text = tags.replaced(text, _literal)
    for plain, instead in _PLACEHOLDERS.items():
        text = text.replace(plain, instead)
    text = _COMMENT.sub(lambda found: found[1] or found[0].replace("/", "\ue009").replace("*", "\ue00a"), text)
    return _BARE.sub("\ue002", text)


def _literal(tag: str) -> str:
    """Shield a tag from dynamicprompts, so that names in it stay as they are. Only a choice with several options, as in
    ``<lora:ink:{0.5|0.8}>``, stays a choice."""
    tag = tag.replace("_", "\ue005")
    if not _OPTIONS.search(tag):
        for plain, instead in (("{", "\ue006"), ("}", "\ue007"), ("|", "\ue008"), ("$", "\ue002")):
            tag = tag.replace(plain, instead)
    return tag


def _unescaped(text: str) -> str:
    return _plain(_shielded(text))


def _plain(text: str) -> str:
    for plain, instead in _PLACEHOLDERS.items():
        text = text.replace(instead, plain.lstrip("\\"))
    return text.translate(_PLACEHOLDER_TO_CHARACTER)


def make_choices(request: Request, wildcards: Path) -> list[Request]:
    """Make the choices of a request by the seed of each image.

    ``wildcards``: the folder of ``NAME.txt`` files with one value per line.
    Returns one request per image; a single request for all images if there are no choices.
    Raises RequestError for a prompt that cannot be parsed, and for a wildcard without a file.
    """
    _refuse_private(request)
    if not has_choices(request.prompt) and not has_choices(request.negative):
        return [replace(request, prompt=_unescaped(request.prompt), negative=_unescaped(request.negative))]
    out: list[Request] = []
    for index in range(request.count):
        single = request.for_image(index)
        prompt = _random("prompt", single.prompt, wildcards, single.seed)
        negative = _random("negative", single.negative, wildcards, single.seed)
        out.append(replace(single, prompt=prompt, negative=negative))
    return out


def all_combinations(request: Request, wildcards: Path) -> list[Request]:
    """Return a request for each combination of choices in the prompt and the negative prompt, all with the same seed.

    Raises RequestError as :func:`make_choices`, and for more than :data:`MOST_VARIANTS` combinations.
    """
    _refuse_private(request)
    prompts = _combinations("prompt", request.prompt, wildcards)
    negatives = _combinations("negative", request.negative, wildcards)
    if len(prompts) * len(negatives) > MOST_VARIANTS:
        raise RequestError("prompt", request.prompt[:40], f"has more than {MOST_VARIANTS} combinations")
    return [replace(request, prompt=prompt, negative=negative) for prompt in prompts for negative in negatives]


def _combinations(field: str, text: str, wildcards: Path) -> list[str]:
    if not has_choices(text):
        return [_unescaped(text)]
    from dynamicprompts.generators import CombinatorialPromptGenerator

    generator = CombinatorialPromptGenerator(_manager(wildcards))
    return _generated(field, text, generator, MOST_VARIANTS + 1, wildcards)


def _refuse_private(request: Request) -> None:
    for field, text in (("prompt", request.prompt), ("negative", request.negative)):
        found = _PRIVATE.search(text)
        if found is not None:
            problem = f"at character {found.start()}: U+{ord(found[0]):04X} is a private-use character and not allowed"
            raise RequestError(field, text[:40], problem)


def _manager(wildcards: Path) -> Any:
    from dynamicprompts.wildcards.item import WildcardItem
    from dynamicprompts.wildcards.values import WildcardValues
    from dynamicprompts.wildcards.wildcard_manager import WildcardManager

    def shielded(item: Any) -> Any:
        return replace(item, content=_shielded(item.content)) if isinstance(item, WildcardItem) else _shielded(item)

    class Manager(WildcardManager):
        """Shields the tags in values, because dynamicprompts parses values as prompts too."""

        def get_values(self, wildcard: str) -> Any:
            return WildcardValues(tuple(shielded(item) for item in super().get_values(wildcard).items))

    # dynamicprompts only warns of a wildcard without a file. Here it is an error.
    logging.getLogger("dynamicprompts").setLevel(logging.ERROR)
    return Manager(wildcards if wildcards.is_dir() else None)


def _random(field: str, text: str, wildcards: Path, seed: int) -> str:
    if not has_choices(text):
        return _unescaped(text)
    from dynamicprompts.generators import RandomPromptGenerator

    generator = RandomPromptGenerator(_manager(wildcards), seed=seed)
    return _generated(field, text, generator, 1, wildcards)[0]


def _generated(field: str, text: str, generator: Any, most: int, folder: Path) -> list[str]:
    from pyparsing import ParseException

    shielded = _shielded(text)
    for wildcard in _WILDCARD.finditer(shielded):
        if ".." in wildcard[1] or wildcard[1].startswith("/"):
            raise RequestError(field, wildcard[0], f"is not a wildcard: its name must be that of a file in {folder}")
    if "${" in shielded:
        raise RequestError(field, text[:40], "has a variable, ${…}, which is not supported")
    if len(_CHOICE.findall(shielded)) > MOST_CHOICES:
        raise RequestError(field, text[:40], f"has more than {MOST_CHOICES} choices")
    try:
        found = [str(prompt) for prompt in generator.generate(shielded, most)]
    except ParseException as error:
        near = text[max(0, error.loc - 10) : error.loc + 20]
        problem = f"at character {error.loc}: its choices cannot be read ({error.msg})"
        raise RequestError(field, near, problem) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(field, text[:40], f"its choices cannot be read ({error})") from error
    missing = _WILDCARD.search(" ".join(found))
    if missing is not None or not found:
        name = missing[1] if missing is not None else text
        problem = f"is a wildcard without a file: create {folder / f'{name}.txt'} with one value per line"
        raise RequestError(field, name, problem)
    return [_plain(prompt) for prompt in found]
