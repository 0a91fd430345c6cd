"""Checks prompts in compel's syntax, which InvokeAI uses: ``word+``, ``(some words)1.3``, ``("a", "b").blend(0.7,
0.3)``, ``.and()``.

``compel_grammar.py`` parses them.
"""

from __future__ import annotations

from collections.abc import Iterator

from safelight.errors import RequestError
from safelight.request.prompts import compel_grammar as grammar
from safelight.request.prompts.compel_grammar import Blend, CompelSyntaxError, Conjunction, UnsupportedOperatorError
from safelight.request.prompts.emphasis import MOST_WEIGHT
from safelight.request.prompts.tokens import MOST_CHUNKS, TOKENS_PER_CHUNK, tokens_of

MOST_DEPTH = 4
"""Limit of nested brackets. Each level multiplies the parser's time by five."""

_LORA = "is not supported; write <lora:name:strength>"
_UNSUPPORTED = {
    "withLora": f"withLora {_LORA}",
    "useLora": f"useLora {_LORA}",
    "swap()": "swap() is not supported: it needs attention maps of another prompt",
}


def _depth(text: str) -> int:
    depth = most = 0
    for mark in text:
        depth += (mark == "(") - (mark == ")" and depth > 0)
        most = max(most, depth)
    return most


def _weights(prompt: Conjunction) -> Iterator[float]:
    """Return all weights in a prompt."""
    yield from prompt.weights
    for part in prompt.parts:
        yield from part.weights if isinstance(part, Blend) else ()
        for phrase in part.phrases if isinstance(part, Blend) else (part,):
            yield from (fragment.weight for fragment in phrase.fragments)


def _unbalanced(text: str) -> int | None:
    """Return the position of a bracket without a match, None if there is none.

    compel would treat such a bracket, and the weight after it, as text of the prompt.
    """
    open_at: list[int] = []
    for at, mark in enumerate(text):
        plain = text[:at].endswith("\\")
        if mark == "(" and not plain:
            open_at.append(at)
        elif mark == ")" and not plain:
            if not open_at:
                return at
            open_at.pop()
    return open_at[-1] if open_at else None


def check(field: str, text: str) -> None:
    """Check a prompt in compel's syntax.

    Raises RequestError for a prompt that is not in compel's syntax, or that uses an unsupported operator.
    """
    if _depth(text) > MOST_DEPTH:
        raise RequestError(field, text[:30], f"more than {MOST_DEPTH} nested brackets; write word+++")
    if (at := _unbalanced(text)) is not None:
        problem = f"at character {at}: a bracket without its match; write \\( or \\) for a plain bracket"
        raise RequestError(field, text[max(0, at - 10) : at + 20], problem)
    if len(tokens_of(text)) > MOST_CHUNKS * TOKENS_PER_CHUNK:
        raise RequestError(field, f"{text[:20]}…", f"is longer than {MOST_CHUNKS} chunks of {TOKENS_PER_CHUNK} tokens")
    try:
        parsed = grammar.parse(text)
    except CompelSyntaxError as error:
        at = "" if error.at is None else f"at character {error.at}: "
        near = text[:30] if error.at is None else text[max(0, error.at - 10) : error.at + 20]
        raise RequestError(field, near, f"{at}is not a prompt in compel's syntax ({error})") from error
    except UnsupportedOperatorError as error:
        raise RequestError(field, text[:30], _UNSUPPORTED[error.operator]) from error
    odd = next((weight for weight in _weights(parsed) if not abs(weight) <= MOST_WEIGHT), None)
    if odd is not None:
        raise RequestError(field, text[:30], f"a weight of {odd:g} is over {MOST_WEIGHT:g}")
    if any(isinstance(part, Blend) and part.normalized and not sum(part.weights) for part in parsed.parts):
        raise RequestError(field, text[:30], "the weights of a blend add up to 0")
