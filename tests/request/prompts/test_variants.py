"""Choices in prompts: made by the seed, the same each time. test_choices_as_dynamicprompts.py compares the texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.errors import RequestError
from safelight.request.prompts import variants
from safelight.request.prompts.variants import escaped, make_choices
from safelight.request.schema import Request


@pytest.fixture
def wildcards(tmp_path: Path) -> Path:
    (tmp_path / "colour.txt").write_text("red\ngreen\nblue\n# no value\n")
    return tmp_path


def ask(prompt: str, **more: object) -> Request:
    return Request(prompt, "m", **more)  # type: ignore[arg-type]


def test_a_choice_is_the_seeds(wildcards: Path) -> None:
    asked = ask("a {big|small} __colour__ (apple:1.2) [x:y:0.5] <lora:a:0.8>", negative="{p|q}", seed=5, count=20)
    made = variants.make_choices(asked, wildcards)
    assert [one.seed for one in made] == list(range(5, 25))
    assert all(one.count == 1 and one.prompt.endswith("(apple:1.2) [x:y:0.5] <lora:a:0.8>") for one in made)
    assert {one.prompt.split()[1] for one in made} == {"big", "small"}
    assert {one.prompt.split()[2] for one in made} == {"red", "green", "blue"}
    assert {one.negative for one in made} == {"p", "q"}
    # Image k of a batch is the image of seed + k alone.
    for index in (0, 7):
        assert variants.make_choices(ask(asked.prompt, negative="{p|q}", seed=5 + index), wildcards) == [made[index]]


def test_nothing_to_choose_is_the_request_itself(wildcards: Path) -> None:
    asked = ask("a plain (apple:1.2), [b], snake_case", count=3)
    assert variants.make_choices(asked, wildcards) == [asked]
    assert variants.all_combinations(asked, wildcards) == [asked]


def test_all_combinations(wildcards: Path) -> None:
    made = variants.all_combinations(ask("{a|b} __colour__", seed=3), wildcards)
    assert {one.prompt for one in made} == {f"{x} {y}" for x in "ab" for y in ("red", "green", "blue")}
    assert {one.seed for one in made} == {3}


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("an __unknown__ apple", "is a wildcard without a file: create .*unknown.txt"),
        ("{a|b", "at character 0: its choices cannot be read .*write } behind its last option"),
        ("\\{ {c|{a|b}", "at character 3: its choices cannot be read"),
        ("<lora:a_b:1>\\}\t{a|b} $$", "at character 21: .*needs a number of options before it"),
        ("{a$$b|c}", "at character 2: .*needs a number of options before it"),
        ("{a|b} x__y", "at character 7: .*write __NAME__"),
        ("{a|b} __colour(x=1)__", "at character 14: .*has no parameters"),
        ("{a|${x}}", "at character 3: .*has a variable"),
        ("{" * 3000 + "|" + "}" * 3000, "its choices cannot be read"),
        ("{" + "9" * 5000 + "$$a|b}", "its choices cannot be read"),
        ("{0::a|0::b}", r"'\{0::a\|0::b\}': needs more options with a weight above 0"),
        ("a {@3$$b|b}", r"'\{@3\$\$b\|b\}': gives no text"),
        # The search for 40 different values among 20 would not end.
        ("{@40$$" + "|".join("abcdefghijklmnopqrst" * 2) + "}", "gives no text"),
        ("a {2$$__unknown__}", "is a wildcard without a file"),
        ("__{unknown|unknown}__ {a|b}", "is a wildcard without a file"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(wildcards: Path, prompt: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        variants.make_choices(ask(prompt), wildcards)


def test_too_many_combinations_are_an_error(wildcards: Path) -> None:
    with pytest.raises(RequestError, match="more than 1000 combinations"):
        variants.all_combinations(ask(" ".join(["{a|b|c|d}"] * 6)), wildcards)


@pytest.mark.parametrize("name", ["__../secret__", "__a/../../secret__", "__/etc/secret__"])
def test_wildcards_are_below_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "secret.txt").write_text("password\n")
    with pytest.raises(RequestError, match="is not a wildcard"):
        variants.make_choices(ask(f"a {name}"), tmp_path / "wildcards")


def test_a_wildcard_that_names_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").write_text("__loop__\n")
    with pytest.raises(RequestError):
        variants.make_choices(ask("a __loop__"), tmp_path)


def test_other_signs_are_plain(wildcards: Path) -> None:
    for text in ("50% off", "$5", "#tag, c", "a # b"):
        [made] = variants.make_choices(ask(f"{{x|x}} {text}"), wildcards)
        assert made.prompt == f"x {text}"
    assert variants.make_choices(ask(r"a \{b\} c"), wildcards) == [ask("a {b} c")]
    with pytest.raises(RequestError, match="variable"):
        variants.make_choices(ask("${a={x|y}} ${a}"), wildcards)
    with pytest.raises(RequestError, match="more than 200 choices"):
        variants.make_choices(ask("{a|b}" * 300), wildcards)


def test_names_in_tags_are_never_rewritten(wildcards: Path) -> None:
    """With a wildcard file of the name that stands between underscores, another adapter could be loaded."""
    for tag in (
        "<lora:my__colour__style:0.8>",
        "<a__colour__b>",
        "<lora:style{v2}:1>",
        "<lora:a$b|c:1>",
        "<lora:x_y:1>",
    ):
        for prompt in (f"an apple {tag}", f"{{an|an}} apple {tag}", f"an {{apple {tag}|apple {tag}}}"):
            [made] = variants.make_choices(ask(prompt), wildcards)
            assert made.prompt == f"an apple {tag}"
        assert not variants.has_choices(tag)
        (wildcards / "line.txt").write_text(f"apple {tag}\n")
        assert variants.make_choices(ask("an __line__"), wildcards)[0].prompt == f"an apple {tag}"
        assert variants.all_combinations(ask("an __line__"), wildcards)[0].prompt == f"an apple {tag}"


def test_a_choice_of_strengths_within_a_tag_is_made(wildcards: Path) -> None:
    made = variants.all_combinations(ask("<lora:a__colour__:{0.5|0.8}>"), wildcards)
    assert [one.prompt for one in made] == ["<lora:a__colour__:0.5>", "<lora:a__colour__:0.8>"]


@pytest.mark.parametrize("text", ["{red|green}", "a {b} c", "plain", "\\{a|b\\}"])
def test_what_is_escaped_is_not_chosen_again(text: str, tmp_path: Path) -> None:
    (once,) = make_choices(Request(escaped(text), "m"), tmp_path)
    assert once.prompt == text.replace("\\", "")


def test_names_of_embeddings_and_comments_are_text(wildcards: Path) -> None:
    (wildcards / "neg.txt").write_text("HACK\n")
    for prompt in ("embedding:easy__neg__v2, {a|b}", "{a|b} // blue sky, trees", "/* c */ {a|b}", "http://x/y {a|b}"):
        (made,) = make_choices(ask(prompt, seed=1), wildcards)
        assert made.prompt in {prompt.replace("{a|b}", one) for one in "ab"}
    (wildcards / "deeper").mkdir()
    (wildcards / "deeper/one.txt").write_text("value\n")
    (made,) = make_choices(ask("__deeper/one__ // x", seed=1), wildcards)
    assert made.prompt == "value // x"
    (made,) = make_choices(ask("__deeper/*__ */ x", seed=1), wildcards)
    assert made.prompt == "value */ x"


def test_all_combinations_of_both_prompts(wildcards: Path) -> None:
    made = variants.all_combinations(ask("{a|b} c", negative="{d|e|f}"), wildcards)
    assert [(one.prompt, one.negative) for one in made] == [(f"{a} c", d) for a in "ab" for d in "def"]
    assert [one.negative for one in variants.all_combinations(ask("x", negative="{d|e}"), wildcards)] == ["d", "e"]


def test_all_combinations_without_a_text_are_an_error(wildcards: Path) -> None:
    for prompt in ("{2$$a|a}", "x {2$$a|a}"):
        with pytest.raises(RequestError, match="gives no text"):
            variants.all_combinations(ask(prompt), wildcards)


def test_any_character_is_allowed(wildcards: Path) -> None:
    for make in (make_choices, variants.all_combinations):
        assert make(ask("\ue000 {a\ue004|a\ue004} \ue006"), wildcards)[0].prompt == "\ue000 a\ue004 \ue006"
    assert variants.all_combinations(ask("{2$$、$$a|b}"), wildcards)[0].prompt == "a、b"


def test_one_random_choice_is_one_combination(wildcards: Path) -> None:
    for prompt in ("{~a|b}", "__~colour__", "{@a|b}"):
        first, second = (variants.all_combinations(ask(f"{prompt}", seed=3), wildcards) for _ in range(2))
        # The seed makes this choice too.
        assert len(first) == 1
        assert first == second


def test_text_between_underscores_without_a_file_is_text(wildcards: Path) -> None:
    made = variants.all_combinations(ask("{a|b} __ x y __"), wildcards)
    assert [one.prompt for one in made] == ["a __ x y __", "b __ x y __"]


def test_values_that_cannot_be_read_are_an_error(wildcards: Path) -> None:
    (wildcards / "faulty.txt").write_text("red ${x}\n")
    with pytest.raises(RequestError, match="as a value of __faulty__: at character 4: has a variable"):
        make_choices(ask("__faulty__"), wildcards)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("it.json", "{", "it.json: Expecting"),
        ("it.yaml", "a: [", "it.yaml: is not YAML"),
        ("other.yaml", "it: [1]", "other.yaml: '1' is no value"),
        ("other.yaml", "it: 5", "other.yaml: it is neither a text nor a list"),
        ("other.yaml", "it: [{text: a, weight: much}]", "other.yaml: it: could not convert"),
        ("other.json", '{"it": [{"text": "a", "weight": 1e999}]}', "is no value"),
    ],
)
def test_what_cannot_be_read_in_a_file_is_in_the_error(wildcards: Path, file: str, content: str, problem: str) -> None:
    (wildcards / file).write_text(content)
    with pytest.raises(RequestError, match=f"without a file.*; cannot be read: .*{problem}"):
        make_choices(ask("__it__"), wildcards)


def test_values_without_a_text_are_never_chosen(wildcards: Path) -> None:
    (wildcards / "gaps.json").write_text('["", "a"]')
    (wildcards / "weights.json").write_text(
        '{"empty": ["1::"], "light": ["0.5::a"], "nothing": ["0::a", "0.0::b", "0::c"]}'
    )
    assert {one.prompt for one in make_choices(ask("__gaps__", count=20), wildcards)} == {"a"}
    assert [one.prompt for one in variants.all_combinations(ask("__gaps__"), wildcards)] == ["a"]
    for prompt in ("__empty__", "{a|b} __@light__", "{a|b} __@empty__"):
        with pytest.raises(RequestError, match="gives no text"):
            make_choices(ask(prompt), wildcards)
    with pytest.raises(RequestError, match="weight"):
        make_choices(ask("{__light__}"), wildcards)
