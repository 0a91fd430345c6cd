"""Which family a file or folder is of: on headers with the names and shapes of published checkpoints.

On each header, the rules of exactly one family fire, whatever the order of the families.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from support import naming
from support.families import PUBLISHED, Published
from support.scale import ALL, thinned, times

from safelight.catalog import identify
from safelight.families.registry import families
from safelight.families.rules import lines_of
from safelight.files.folder import Folder
from safelight.files.header import Header

Tensors = dict[str, torch.Tensor]


def joined(parts: dict[str, Tensors], prefixes: dict[str, str]) -> Tensors:
    return {name: one for role, some in parts.items() for name, one in naming.prefixed(prefixes[role], some).items()}


def whole_files(published: Published) -> Iterator[tuple[str, Tensors]]:
    """Yield what a file with all components may have: in the module's names, and in the original's with each prefix."""
    modules, originals = published.in_module_names(), published.in_original_names()
    yield "all, in the module's names", joined(modules, {role: f"{role}." for role in modules})
    places = [component for component in published.family.components if component.role in modules]
    first = {component.role: component.prefixes[0] for component in places}
    for role, component in ((one.role, one) for one in places):
        for prefix in component.prefixes if published.family.separate_parts else component.prefixes[:1]:
            if prefix not in ("", f"{role}."):
                yield f"all, with {prefix}", joined(originals, {**first, role: prefix})


def lone_denoisers(published: Published) -> Iterator[tuple[str, Tensors]]:
    """Yield what a file with the denoiser alone may have, in the module's names and in the original's."""
    if not published.family.separate_parts:
        return
    role = published.family.denoiser
    own, original = published.denoiser_file(original=False), published.denoiser_file(original=True)
    for prefix in published.family.component(role).prefixes:
        yield f"module's names with {prefix or 'no prefix'}", naming.prefixed(prefix, own)
        yield f"original with {prefix or 'no prefix'}", naming.prefixed(prefix, original)


@cache
def forms(label: str) -> dict[str, Tensors]:
    return dict((*whole_files(PUBLISHED[label]), *lone_denoisers(PUBLISHED[label])))


def folder_of(published: Published) -> Folder:
    headers = {role: naming.header_of(tensors) for role, tensors in published.in_module_names().items()}
    return Folder(Path("made-up"), published.family.pipeline_class, {}, headers, {}, ())


def identified(header: Header, monkeypatch: pytest.MonkeyPatch) -> identify.Identity:
    monkeypatch.setattr(identify, "read_header", lambda _: header)
    return identify.identify(header.path)


def shuffle_families(chance: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(families())
    chance.shuffle(names)
    shuffled = {name: families()[name] for name in names}
    monkeypatch.setattr(identify, "families", lambda: shuffled)


FIRST = {published.name: label for label, published in reversed(PUBLISHED.items())}
LABELS = thinned(dict.fromkeys([*FIRST.values(), *PUBLISHED]), len(FIRST))


@pytest.mark.parametrize("label", LABELS)
def test_the_rules_of_one_family_fire_on_each_form(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = PUBLISHED[label]
    for form, tensors in forms(label).items():
        header = naming.header_of(tensors)
        shapes, lines = {name: tuple(one.shape) for name, one in tensors.items()}, lines_of(tensors)
        fired = [rule for rule in identify.kind_rules() if rule.fires(shapes, lines)]
        assert {rule.base for rule in fired if rule.base is not None} == {published.name}, form
        if ALL or "original" not in form:
            assert_identified(header, published.name, monkeypatch)


def assert_identified(header: Header, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = identified(header, monkeypatch)
    assert (found.kind, found.base) == ("checkpoint", name)
    assert found.layout is not None


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("seed", range(times(2, 10)))
def test_the_order_of_the_families_does_not_matter(label: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    shuffle_families(chance, monkeypatch)
    assert_identified(
        naming.header_of(forms(label)[chance.choice(list(forms(label)))]), PUBLISHED[label].name, monkeypatch
    )


@pytest.mark.parametrize("label", LABELS)
def test_one_family_recognises_each_folder(label: str) -> None:
    folder = folder_of(PUBLISHED[label])
    found = {name: family.recognise_folder(folder) for name, family in families().items()}
    assert [name for name, reason in found.items() if reason is not None] == [PUBLISHED[label].name]


@pytest.mark.parametrize("label", [label for label in FIRST.values() if PUBLISHED[label].family.separate_parts])
def test_a_part_in_a_file_of_its_own_is_of_no_family(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoders and VAEs are shared, so a file's kind says what it is, and its settings say whom it fits."""
    family = PUBLISHED[label].family
    for names in (PUBLISHED[label].in_module_names(), PUBLISHED[label].in_original_names()):
        for role in names:
            if role != family.denoiser and not family.prefix_within_denoiser(role):
                found = identified(naming.header_of(names[role]), monkeypatch)
                assert (found.kind, found.base) == ("vae" if role == family.vae else "text_encoder", None)
