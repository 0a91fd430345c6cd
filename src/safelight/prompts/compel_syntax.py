"""compel's syntax, which InvokeAI has: ``word+``, ``(some words)1.3``, ``("a", "b").blend(0.7, 0.3)``, ``.and()``.

Parsed by compel's own parser, which alone needs no torch; the rest of compel is in ``arch/compel_fence.py``.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pyparsing

from safelight.errors import RequestError


@cache
def _parser() -> Any:
    """The module ``compel.prompt_parser`` by itself: importing it by its name imports torch."""
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


def check(field: str, text: str) -> None:
    """Raise RequestError, which says where, for a prompt that compel cannot parse, or asks for what is not done."""
    parser = _parser()
    try:
        parsed = parser.PromptParser().parse_conjunction(text)
    except pyparsing.ParseException as error:
        near = text[max(0, error.loc - 10) : error.loc + 20]
        raise RequestError(field, near, f"at character {error.loc}: compel cannot read this ({error.msg})") from error
    except (parser.PromptParser.ParsingException, ValueError, RecursionError) as error:
        raise RequestError(field, text[:30], f"compel cannot read this ({error})") from error
    if parsed.lora_weights:
        raise RequestError(field, parsed.lora_weights[0].model, "withLora: ask for it as <lora:name:strength>")
    if any(getattr(part, "wants_cross_attention_control", False) for part in parsed.prompts):
        raise RequestError(field, text[:30], "swap() cannot be done: it needs attention maps of another prompt")
