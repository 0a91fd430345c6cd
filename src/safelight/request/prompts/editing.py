"""Prompts that change between steps, in AUTOMATIC1111's syntax: ``[from:to:when]``, ``[to:when]`` (added),
``[from::when]`` (removed), and ``[a|b]``, which switches to the next option at each step. Edits may be nested.

``when`` is the number of steps with ``from``. If it has a decimal point, it is a fraction of all steps.
https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#prompt-editing
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.errors import RequestError
from safelight.request.prompts.emphasis import MOST_DEPTH
from safelight.request.schema import Request
from safelight.request.steps import computed_steps

_NUMBER = re.compile(r"\s*([0-9]+(\.[0-9]*)?|\.[0-9]+)\s*")

_TOKENS = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
"""An escaped character, a bracket or separator, or the text between them."""


@dataclass(frozen=True, slots=True)
class _Edited:
    before: Sequence[_Node]
    after: Sequence[_Node]
    when: str

    def last(self, steps: int) -> int:
        """Return the last step with ``before``. Steps count from 1."""
        share = float(self.when)
        return int(min(steps, share * steps if "." in self.when else share))


@dataclass(frozen=True, slots=True)
class _Alternating:
    options: Sequence[Sequence[_Node]]


_Node = str | _Edited | _Alternating


def prompt_per_step(field: str, text: str, steps: int, more: int = 0) -> list[str]:
    """Return the text of each step.

    ``steps``: steps of the first pass; fractions in edits refer to them.
    ``more``: steps of a second pass. All edits end before it.
    Raises RequestError, with the position, for a malformed edit.
    """
    if "[" not in text:
        return [text] * (steps + more)
    nodes = _Reader(field, text).read()
    return [_at(nodes, step, steps) for step in range(1, steps + more + 1)]


def prompt_per_step_of(request: Request, text: str, field: str) -> list[str]:
    """Return the text of each computed step of both passes. Steps skipped because of an input image do not count."""
    return prompt_per_step(field, text, request.first_pass_steps, computed_steps(request) - request.first_pass_steps)


def _at(nodes: Sequence[_Node], step: int, steps: int) -> str:
    out: list[str] = []
    for node in nodes:
        match node:
            case _Edited():
                out.append(_at(node.before if step <= node.last(steps) else node.after, step, steps))
            case _Alternating():
                out.append(_at(node.options[(step - 1) % len(node.options)], step, steps))
            case str():
                out.append(node)
    return "".join(out)


class _Reader:
    """Reads a prompt from left to right. It leaves brackets without a match to the parser of weights."""

    def __init__(self, field: str, text: str) -> None:
        self._field, self._text, self._depth = field, text, 0
        self._tokens = list(_TOKENS.finditer(text))
        self._next = 0

    def read(self) -> list[_Node]:
        nodes: list[_Node] = []
        while self._next < len(self._tokens):
            nodes += self._one()
        return nodes

    def _one(self) -> list[_Node]:
        token = self._tokens[self._next]
        self._next += 1
        return self._bracket(token.start()) if token[0] == "[" else [token[0]]

    def _bracket(self, start: int) -> list[_Node]:
        """Read what follows an opening bracket, up to the bracket that closes it."""
        self._depth += 1
        if self._depth > MOST_DEPTH:
            near = self._text[start : start + 30]
            problem = f"at character {start}: more than {MOST_DEPTH} nested brackets"
            raise RequestError(self._field, near, problem)
        found = self._parts(start)
        self._depth -= 1
        return found

    def _parts(self, start: int) -> list[_Node]:
        parts: list[list[_Node]] = [[]]
        separators: list[str] = []
        depth = 0
        while self._next < len(self._tokens):
            token = self._tokens[self._next][0]
            if token == "]" and depth == 0:
                self._next += 1
                return self._nodes(start, parts, separators)
            if token in (":", "|") and depth == 0:
                self._next += 1
                separators.append(token)
                parts.append([])
                continue
            depth += (token == "(") - (token == ")" and depth > 0)
            parts[-1] += self._one()
        return ["[", *_joined(parts, separators)]

    def _nodes(self, start: int, parts: list[list[_Node]], separators: list[str]) -> list[_Node]:
        if "|" in separators:
            return [_Alternating(_split(parts, separators))]
        last = "".join(part for part in parts[-1] if isinstance(part, str))
        found = _NUMBER.fullmatch(last) if separators and len(parts[-1]) == 1 else None
        if found is None:
            return ["[", *_joined(parts, separators), "]"]
        if len(separators) > 2:
            near = self._text[start : start + 30]
            problem = f"at character {start}: an edit is [from:to:when]; write \\[ for a plain bracket"
            raise RequestError(self._field, near, problem)
        return [_Edited(parts[0] if len(separators) == 2 else [], parts[-2], found[1])]


def _joined(parts: list[list[_Node]], separators: list[str]) -> list[_Node]:
    out = list(parts[0])
    for separator, part in zip(separators, parts[1:], strict=True):
        out += [separator, *part]
    return out


def _split(parts: list[list[_Node]], separators: list[str]) -> list[list[_Node]]:
    """Split at bars into options. Colons in an option are plain text."""
    options = [list(parts[0])]
    for separator, part in zip(separators, parts[1:], strict=True):
        if separator == "|":
            options.append(list(part))
        else:
            options[-1] += [separator, *part]
    return options
