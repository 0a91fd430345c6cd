"""Checks prompts in compel's syntax, which InvokeAI uses: ``word+``, ``(some words)1.3``, ``("a", "b").blend(0.7,
0.3)``, ``.and()``.

compel's own parser parses them. This module loads just the parser's file, without torch. Only
``families/sd/compel_weighting.py`` imports the package.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pyparsing

from safelight.errors import RequestError
from safelight.request.prompts.emphasis import MOST_WEIGHT
from safelight.request.prompts.tokens import MOST_CHUNKS, TOKENS_PER_CHUNK, tokens_of


@cache
def _parser() -> Any:
    """Load the module ``compel.prompt_parser`` from its file, because an import by name would import torch."""
    package = importlib.util.find_spec("compel")
    if package is None or package.origin is None:
        raise ImportError("compel is not installed")
    path = Path(package.origin).with_name("prompt_parser.py")
    spec = importlib.util.spec_from_file_location("safelight_compel_parser", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MOST_DEPTH = 4
"""Limit of nested brackets. Each level multiplies the time of compel's parser by five."""


def _depth(text: str) -> int:
    depth = most = 0
    for mark in text:
        depth += (mark == "(") - (mark == ")" and depth > 0)
        most = max(most, depth)
    return most


def _weights(part: Any) -> list[float]:
    """Return all weights in a part of a parsed prompt."""
    own = [float(weight) for weight in getattr(part, "weights", ())]
    own += [float(part.weight)] if hasattr(part, "weight") else []
    inner = [*getattr(part, "prompts", ()), *getattr(part, "children", ())]
    return own + [weight for child in inner for weight in _weights(child)]


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

    Raises RequestError for a prompt that compel cannot parse, or that uses an unsupported feature.
    """
    parser = _parser()
    if _depth(text) > MOST_DEPTH:
        raise RequestError(field, text[:30], f"more than {MOST_DEPTH} nested brackets; write word+++")
    if (at := _unbalanced(text)) is not None:
        problem = f"at character {at}: a bracket without its match; write \\( or \\) for a plain bracket"
        raise RequestError(field, text[max(0, at - 10) : at + 20], problem)
    if len(tokens_of(text)) > MOST_CHUNKS * TOKENS_PER_CHUNK:
        raise RequestError(field, f"{text[:20]}…", f"is longer than {MOST_CHUNKS} chunks of {TOKENS_PER_CHUNK} tokens")
    try:
        parsed = parser.PromptParser().parse_conjunction(text)
    except pyparsing.ParseException as error:
        near = text[max(0, error.loc - 10) : error.loc + 20]
        raise RequestError(field, near, f"at character {error.loc}: compel cannot read this ({error.msg})") from error
    except (parser.PromptParser.ParsingException, ValueError, ArithmeticError, RecursionError) as error:
        raise RequestError(field, text[:30], f"compel cannot read this ({error})") from error
    odd = next((weight for weight in _weights(parsed) if not abs(weight) <= MOST_WEIGHT), None)
    if odd is not None:
        raise RequestError(field, text[:30], f"a weight of {odd:g} is over {MOST_WEIGHT:g}")
    if any(hasattr(part, "normalize_weights") and not sum(part.weights) for part in parsed.prompts):
        raise RequestError(field, text[:30], "the weights of a blend add up to 0")
    if parsed.lora_weights:
        raise RequestError(field, parsed.lora_weights[0].model, "withLora is not supported; write <lora:name:strength>")
    if any(getattr(part, "wants_cross_attention_control", False) for part in parsed.prompts):
        raise RequestError(field, text[:30], "swap() is not supported: it needs attention maps of another prompt")
