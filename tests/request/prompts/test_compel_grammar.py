"""compel's own parser is the oracle for our grammar."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from compel import prompt_parser as compels
from support.scale import thinned, times

from safelight.request.prompts import compel_grammar as grammar
from safelight.request.prompts.compel_grammar import Blend, CompelSyntaxError, UnsupportedOperatorError

PIECES = (
    *("a", "cat", "red apple", " ", " ", " ", "(", ")", "(", ")", "+", "-", "++", "--", "1.3", "0.5", "2", '"', '"'),
    *('\\"', "\\(", "\\)", ", ", ",", ".", ".blend(", ").blend(0.7, 0.3)", ").and()", ").and(1, 0.5)", ").add()", "="),
    *(".attend(1.2)", ".attend(+)", ".swap(dog)", "withLora(x, 0.5)", "useLora(x)", "<x>", "it's", "no_normalize"),
    *("\\", "-1", "+1", "wo-rd", "x+y", "1e3", "é"),
)
OPERATORS = ("blend", "and", "add")
ARGUMENTS = ("", "1", "0.7, 0.3", "1,2,no_normalize", "1, 2, 3", "a=1")
UNSUPPORTED, ERROR = "unsupported", "error"


@cache
def parser() -> Any:
    return compels.PromptParser()


def fragments(phrase: Any) -> tuple[tuple[str, float], ...]:
    return tuple((one.text, one.weight) for one in phrase)


def theirs(text: str) -> Any:
    try:
        found = parser().parse_conjunction(text)
    except Exception:  # noqa: BLE001 - it documents none of its exceptions
        return ERROR
    parts: list[Any] = []
    for part in found.prompts:
        blended = isinstance(part, compels.Blend)
        prompts = part.prompts if blended else [part]
        if found.lora_weights or any(one.wants_cross_attention_control for one in prompts):
            return UNSUPPORTED
        read = [fragments(one.children) for one in prompts]
        parts.append((read, part.weights, part.normalize_weights) if blended else read)
    return (parts, list(found.weights)) if parts else UNSUPPORTED if found.lora_weights else ([[(("", 1.0),)]], [1.0])


def ours(text: str) -> Any:
    try:
        found = grammar.parse(text)
    except CompelSyntaxError as error:
        return None if "may follow" in str(error) else ERROR
    except UnsupportedOperatorError:
        return UNSUPPORTED
    parts: list[Any] = []
    for part in found.parts:
        read = [fragments(one.fragments) for one in (part.phrases if isinstance(part, Blend) else (part,))]
        parts.append((read, list(part.weights), part.normalized) if isinstance(part, Blend) else read)
    return parts, list(found.weights)


def random_prompt(chance: random.Random) -> str:
    text = "".join(chance.choice(PIECES) for _ in range(chance.randint(1, 9)))
    if chance.random() < 0.4:
        first = chance.choice(PIECES).replace('"', "")
        operator, arguments = chance.choice(OPERATORS), chance.choice(ARGUMENTS)
        text = f'("{first}", "{text.replace(chr(34), "")}").{operator}({arguments}){chance.choice(("", "", " x"))}'
    return text if text.count("(") < 4 else random_prompt(chance)


@pytest.mark.parametrize("seed", thinned(range(4)))
def test_random_prompts_mean_what_they_mean_to_compel(seed: int) -> None:
    chance, known = random.Random(seed), set()
    for _ in range(times(40, 1000)):
        text = random_prompt(chance)
        right, found = theirs(text), ours(text)
        # compel ignores what follows .and(); here it is an error. Which of two faults is reported does not matter.
        assert found is None or found == right or sorted([found, right], key=str) == [ERROR, UNSUPPORTED], text
        known.add(type(right))
    assert known == {tuple, str}


def test_what_follows_a_conjunction_is_an_error() -> None:
    with pytest.raises(CompelSyntaxError, match=r"nothing may follow \.and\(\), but 'by night' does"):
        grammar.parse('("a cat", "a dog").and() by night')


@pytest.mark.parametrize("text", ["", "  ", "()", '""'])
def test_no_words_are_the_empty_prompt(text: str) -> None:
    assert grammar.parse(text).parts == (grammar.EMPTY,)
