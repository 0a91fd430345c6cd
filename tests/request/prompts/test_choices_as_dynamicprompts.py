"""dynamicprompts is the oracle for choices: the same seed must give the same text.

Safelight used it, with stand-ins for the characters that only it interprets, when the first images were recorded.
"""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dynamicprompts.constants import DEFAULT_RANDOM
from dynamicprompts.generators import CombinatorialPromptGenerator, RandomPromptGenerator
from dynamicprompts.wildcards.item import WildcardItem
from dynamicprompts.wildcards.values import WildcardValues
from dynamicprompts.wildcards.wildcard_manager import WildcardManager
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support.scale import times

from safelight.errors import RequestError
from safelight.request.prompts import tags, variants
from safelight.request.prompts.choice_grammar import ChoiceSyntaxError, parse
from safelight.request.prompts.choice_sampling import PLAIN_NAME, Sampling, UnusableChoiceError
from safelight.request.prompts.wildcard_files import WildcardFiles
from safelight.request.schema import Request

pytestmark = pytest.mark.filterwarnings("ignore:Command .* has finite sampling method:UserWarning")

MOST = 40
"""How many combinations are compared."""

FILES = {
    "colour.txt": "red\ngreen\n\n# no value\nblue\nred\n",
    "one.txt": "the only\n",
    "mixed.txt": "{dark|light} __colour__\n50% $5 # x\n<lora:a__colour__b:1>\n{2$$ or $$p|q|r} \\{s\\}\na\tb // c\n",
    "cars/fast.txt": "racer\n{2$$__colour__}\n",
    "cars/slow.txt": "tractor\n",
    "weights.json": json.dumps(
        {"metal": ["3::gold", "0.5::tin", "iron", {"text": "zinc", "weight": 2}], "k": {"z": "u"}}
    ),
    "list.json": json.dumps(["l1", "l2", "2::l3", 5]),
    "deep/tree.yaml": "fruit:\n  red: [apple, cherry]\n  1: x\nword: single\nnone:\nnumber: 5\n",
    "broken.json": "{",
}
NAMES = (
    "colour",
    "one",
    "mixed",
    "cars/fast",
    "cars/*",
    "fast",
    "metal",
    "k/z",
    "list",
    "deep/fruit/red",
    "deep/*",
    "word",
    "nofile",
)
WORDS = (
    *("a", "b", "c", "red", " ", " ", ", ", "x\ty", "\n", "(n:1.2)", "[p:q:0.5]", "50%", "$5", "#t", "// s", "/* t */"),
    *(
        "\\{",
        "\\}",
        "<lora:my__colour__s:0.8>",
        "<lora:i:{0.5|0.8}>",
        "<lora:s{v}|$:1>",
        "<a__b>",
        "é、",
        "5",
        "1.5",
        "-",
        "_",
    ),
    *("<lora:a\\{b:1>", "\\", "\r\n\t", "embedding:easy__neg__v2", "::", "0.5::"),
)
FAULTS = ("{", "}", "|", "$$", "__", "2$$", "{|", "$", "${", "}}", "1-2$$", "(", ")")

WIDER_SEPARATOR = re.compile(r"\$\$[^${}]*[^!-\"&-~ ][^${}]*\$\$")
"""dynamicprompts allows only printable ASCII between chosen options. Safelight also allows ``{2$$、$$a|b}``."""

_STAND_INS = {"\\{": "\ue003", "\\}": "\ue004", "#": "\ue000", "%": "\ue001"}
_BACK = str.maketrans("\ue002\ue005\ue006\ue007\ue008\ue009\ue00a", "$_{}|/*")


def shielded(text: str) -> str:
    text = tags.replaced(text, shielded_tag)
    for plain, instead in _STAND_INS.items():
        text = text.replace(plain, instead)
    comment = re.compile(r"(__[\w/*.-]+?__)|//|/\*|\*/")
    text = comment.sub(lambda found: found[1] or found[0].replace("/", "\ue009").replace("*", "\ue00a"), text)
    return re.sub(r"(?<!\$)\$(?![\${])", "\ue002", text)


def shielded_tag(tag: str) -> str:
    tag = tag.replace("_", "\ue005")
    if not re.search(r"\{[^{}]*\|[^{}]*\}", tag):
        for plain, instead in (("{", "\ue006"), ("}", "\ue007"), ("|", "\ue008"), ("$", "\ue002")):
            tag = tag.replace(plain, instead)
    return tag


def restored(text: str) -> str:
    for plain, instead in _STAND_INS.items():
        text = text.replace(instead, plain.lstrip("\\"))
    return text.translate(_BACK)


SPELLED = "choices that only together spell a wildcard"
"""It was an error. Now it is text: a missing wildcard that is written as one is an error in test_variants.py."""


class OldError(Exception):
    """dynamicprompts could not make the choices."""


class OldCrashError(Exception):
    """dynamicprompts stopped where an iterator of it was empty, or would never stop."""


class Manager(WildcardManager):
    combines = False

    def get_values(self, wildcard: str) -> Any:
        def item(one: Any) -> Any:
            return replace(one, content=shielded(one.content)) if isinstance(one, WildcardItem) else shielded(one)

        found = super().get_values(wildcard).items
        if not found and self.combines and not PLAIN_NAME.fullmatch(wildcard):
            raise OldCrashError  # It would repeat the text without end.
        if not found and PLAIN_NAME.fullmatch(wildcard):
            raise OldError("a wildcard without a file")  # dynamicprompts would give the name, often without end.
        return WildcardValues(tuple(item(one) for one in found))


def theirs(text: str, folder: Path, seed: int | None) -> list[str]:
    """``seed``: None for the first combinations."""
    read = shielded(text)
    if not re.search(r"\{[^{}]*[}|]|\$\{|__[\w/*.-]+?__", read):
        return [restored(read)]
    manager = Manager(folder)
    manager.combines = seed is None
    generator = RandomPromptGenerator(manager, seed=seed) if seed is not None else CombinatorialPromptGenerator(manager)
    DEFAULT_RANDOM.seed(0)
    try:
        found = [str(one) for one in generator.generate(read, 1 if seed is not None else MOST)]
    except OldCrashError:
        raise
    except RuntimeError as error:
        raise (OldCrashError if "StopIteration" in str(error) else OldError) from error
    except Exception as error:
        raise OldError from error
    if not found:
        raise OldError("a wildcard without a file")
    if re.search(r"__[\w/*.-]+?__", " ".join(found)):
        raise OldError(SPELLED)
    return [restored(one) for one in found]


def ours(text: str, folder: Path, seed: int | None) -> list[str]:
    if seed is not None:
        return [one.prompt for one in variants.make_choices(Request(text, "m", seed=seed), folder)]
    if not variants.has_choices(text):
        return [one.prompt for one in variants.all_combinations(Request(text, "m"), folder)]
    try:
        return Sampling(WildcardFiles(folder), random.Random(0)).combinations(parse(text), MOST)
    except (ChoiceSyntaxError, UnusableChoiceError) as error:
        raise RequestError("prompt", text, str(error)) from error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.getLogger("dynamicprompts").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("wildcards")
    for name, content in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    return root


def series(part: st.SearchStrategy[str], most: int) -> st.SearchStrategy[str]:
    return st.lists(part, min_size=1, max_size=most).map("".join)


def in_braces(inside: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    method = st.sampled_from(("", "", "", "", "~", "@", "!", " "))
    bounds = st.sampled_from(
        ("", "", "", "", "2$$", "1-2$$", "2-$$", "-2$$", "0-1$$", "3-1$$", "2$$ and $$", "2$$|$$", "9$$")
    )
    weight = st.sampled_from(("", "", "", "0.5::", "2::", ".5::", "+1.5::", "0::", " 3.:: ", "-1::"))
    options = st.lists(st.tuples(weight, inside | st.just("")).map("".join), min_size=1, max_size=4).map("|".join)
    return st.tuples(method, bounds, options).map(lambda parts: f"{{{''.join(parts)}}}")


WILDCARDS = st.sampled_from(
    [f"__{sign}{name}__" for name in NAMES for sign in ("", "", "", "~", "@", "!") if not sign or "*" not in name]
)
NESTED_NAMES = st.sampled_from(("__{colour|one}__", "__cars/{fast|slow}__", "__{@colour|metal}__", "__~{~metal|k/z}__"))
PARTS = st.recursive(
    st.sampled_from(WORDS) | WILDCARDS | NESTED_NAMES,
    lambda inside: in_braces(series(inside, 3)) | series(inside, 3),
    max_leaves=12,
)
VALID = series(PARTS | in_braces(series(PARTS, 2)), 5)
FAULTY = series(PARTS | st.sampled_from(FAULTS), 6)


STRICTER = ("gives no text", "a wildcard has no parameters", "/.txt with one value per line")
"""What Safelight refuses by name, and dynamicprompts draws: the last is a wildcard whose name is empty."""


def compared(text: str, folder: Path, seed: int | None) -> None:
    """Compare both texts. Where both fail, the reason does not matter."""
    # The old stand-ins took the /* in __cars/*__ for a comment if other underscores before it were paired wrongly.
    assume("\ue009\ue00a__" not in shielded(text))
    # Before dynamicprompts read a text, Safelight refused variables, and with them the nested {2$${a|b}}.
    assume("${" not in shielded(text))
    try:
        found = ours(text, folder, seed)
    except RequestError as error:
        # Where Safelight says that a choice has no text, dynamicprompts may search for one without end.
        if not any(refusal in str(error) for refusal in STRICTER):
            with pytest.raises((OldError, OldCrashError)):
                theirs(text, folder, seed)
        return
    fault: str | None = None
    right: list[str] = []
    try:
        right = theirs(text, folder, seed)
    except OldCrashError:
        return
    except OldError as error:
        fault = str(error)
    if fault is None:
        assert found == right, text
    else:
        assert fault == SPELLED or WIDER_SEPARATOR.search(text), text


MANY = settings(max_examples=times(60, 20_000), deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    "text",
    [
        "a {red|green|blue} __colour__, {2$$ and $$x|y|z} __cars/*__",
        "{2$$2::a|1::b|2::c|1::d} {1-3$$2::__colour__|2::e|f}",
        "{3$$__colour__} {__metal__} __metal__ __metal__ __mixed__",
        "{@a|b|c} {~2$$a|{@x|y}|__~colour__} {2$$a|a|b|b}",
    ],
)
def test_many_seeds_give_the_texts_of_dynamicprompts(folder: Path, text: str) -> None:
    for seed in range(40):
        assert ours(text, folder, seed) == theirs(text, folder, seed)
    assert ours(f"x {text}", folder, None) == theirs(f"x {text}", folder, None)


@MANY
@given(VALID | FAULTY, st.integers(0, 2**32 - 1))
def test_a_seed_gives_the_text_of_dynamicprompts(folder: Path, text: str, seed: int) -> None:
    compared(text, folder, seed)


@MANY
@example("__{2$$a|a}__")  # The name has no combination: two different of two equal texts.
@given(VALID | FAULTY)
def test_combinations_are_those_of_dynamicprompts(folder: Path, text: str) -> None:
    assume(text.count("$$") < 3)  # Nested, they can take minutes in both.
    # Behind other text, choices of one's own method have an end in dynamicprompts too.
    compared(f"x {text}", folder, None)
