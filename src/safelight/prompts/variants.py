"""Prompts with choices in them: ``{red|green} apple``, ``{2$$a|b|c}``, and wildcards, ``__colour__``, which are files.

Read by dynamicprompts (https://github.com/adieyal/dynamicprompts). A choice is made by an image's seed; what was chosen
is the prompt from then on, in the queue, in the image and when it is made again.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safelight.errors import RequestError
from safelight.prompts import tags
from safelight.request.schema import Request

_CHOICE = re.compile(r"\{[^{}]*[}|]|\$\{|__[\w/*.-]+?__")

_SHIELDED = {"\\{": "\ue003", "\\}": "\ue004", "#": "\ue000", "%": "\ue001"}
_LITERALS = str.maketrans("\ue002\ue005\ue006\ue007\ue008\ue009\ue00a", "$_{}|/*")
_COMMENT = re.compile(r"(__[\w/*.-]+?__)|//|/\*|\*/")
"""A comment to dynamicprompts, unless it stands in a wildcard's name; here it is text."""
_PRIVATE = re.compile("[\ue000-\ue00a]")
"""Stand for others while choices are made, so no prompt may have them."""
_OPTIONS = re.compile(r"\{[^{}]*\|[^{}]*\}")
_BARE = re.compile(r"(?<!\$)\$(?![\${])")
"""What means something to dynamicprompts and nothing here: kept from it, and put back."""

MOST_CHOICES = 200
"""In one prompt, written out."""

_WILDCARD = re.compile(r"__([\w/*.-]+?)__")

MOST_VARIANTS = 1000


def has_choices(text: str) -> bool:
    """Whether anything in the text is to be chosen."""
    return _CHOICE.search(_shielded(text)) is not None


def escaped(text: str) -> str:
    """The text so written that nothing in it is chosen again."""
    return text.replace("{", "\\{").replace("}", "\\}") if has_choices(text) else text


def _shielded(text: str) -> str:
    text = tags.replaced(text, _literal)
    for plain, instead in _SHIELDED.items():
        text = text.replace(plain, instead)
    text = _COMMENT.sub(lambda found: found[1] or found[0].replace("/", "\ue009").replace("*", "\ue00a"), text)
    return _BARE.sub("\ue002", text)


def _literal(tag: str) -> str:
    """A tag, set aside: no name in it is rewritten. Only a choice with several options, as in
    ``<lora:ink:{0.5|0.8}>``, is left to be made."""
    tag = tag.replace("_", "\ue005")
    if not _OPTIONS.search(tag):
        for plain, instead in (("{", "\ue006"), ("}", "\ue007"), ("|", "\ue008"), ("$", "\ue002")):
            tag = tag.replace(plain, instead)
    return tag


def _unescaped(text: str) -> str:
    return _plain(_shielded(text))


def _plain(text: str) -> str:
    for plain, instead in _SHIELDED.items():
        text = text.replace(instead, plain.lstrip("\\"))
    return text.translate(_LITERALS)


def chosen(request: Request, wildcards: Path) -> list[Request]:
    """A request for each image, its choices made by its seed; one for all of them when there is nothing to choose.

    ``wildcards``: the folder of ``NAME.txt``, a line for each value. Raises RequestError for what cannot be parsed, and
    for a wildcard that has no file.
    """
    _refuse_private(request)
    if not has_choices(request.prompt) and not has_choices(request.negative):
        return [replace(request, prompt=_unescaped(request.prompt), negative=_unescaped(request.negative))]
    out: list[Request] = []
    for index in range(request.count):
        made = request.for_image(index)
        prompt = _random("prompt", made.prompt, wildcards, made.seed)
        negative = _random("negative", made.negative, wildcards, made.seed)
        out.append(replace(made, prompt=prompt, negative=negative))
    return out


def every(request: Request, wildcards: Path) -> list[Request]:
    """A request for each combination of all choices in the prompt and the negative prompt, with the same seed."""
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
            problem = f"at character {found.start()}: U+{ord(found[0]):04X} is for private use and cannot be drawn"
            raise RequestError(field, text[:40], problem)


def _manager(wildcards: Path) -> Any:
    from dynamicprompts.wildcards.item import WildcardItem
    from dynamicprompts.wildcards.values import WildcardValues
    from dynamicprompts.wildcards.wildcard_manager import WildcardManager

    def shielded(item: Any) -> Any:
        return replace(item, content=_shielded(item.content)) if isinstance(item, WildcardItem) else _shielded(item)

    class Manager(WildcardManager):
        """Values are read as prompts too: their tags are set aside as well."""

        def get_values(self, wildcard: str) -> Any:
            return WildcardValues(tuple(shielded(item) for item in super().get_values(wildcard).items))

    # It warns of wildcards without a file, which is an error here.
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
            raise RequestError(field, wildcard[0], f"is no wildcard: names are those of files below {folder}")
    if "${" in shielded:
        raise RequestError(field, text[:40], "has a variable, ${…}, which is not read")
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
        problem = f"is a wildcard without a file: make {folder / f'{name}.txt'}, with a value a line"
        raise RequestError(field, name, problem)
    return [_plain(one) for one in found]
