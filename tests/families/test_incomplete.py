"""Each tensor left out, and each in a wrong shape: an error that names it. On headers of the tiny checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import naming
from support.families import LDM, TinyFamily, tiny_families
from support.scale import ALL

from safelight.catalog import identify
from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.families.components import Config
from safelight.files.folder import Folder
from safelight.weights import adapter_file

Tensors = dict[str, torch.Tensor]

FORMS = ("folder", "files")


def place_of(tiny_family: TinyFamily, form: str, role: str) -> str:
    """The component whose folder or file a component is in."""
    return tiny_family.place_in_files(role) if form == "files" else tiny_family.family.component(role).folder


def tensors_of(tiny_family: TinyFamily, form: str) -> dict[str, Tensors]:
    """The tensors of each folder or file, without bytes, by the component whose folder or file it is."""
    found: dict[str, Tensors] = {}
    for role, config in tiny_family.configs().items():
        component = tiny_family.family.component(role)
        which = 0 if form == "folder" and not component.within else LDM
        named = naming.in_files(config, naming.on_meta(config), which)
        place = place_of(tiny_family, form, role)
        if form == "files" and place == tiny_family.family.denoiser:
            named = naming.prefixed(component.prefixes[0], named)
        found[place] = found.get(place, {}) | named
    return found


def identified(
    tiny_family: TinyFamily, form: str, role: str, parts: dict[str, Tensors], patch: pytest.MonkeyPatch, place: Path
) -> set[str]:
    """Identify a folder, or the file of one component. Returns the names of the tensors that are read."""
    if form == "files":
        header = naming.header_of(parts[place_of(tiny_family, form, role)])
        patch.setattr(identify, "read_header", lambda _: header)
        found = identify.identify(header.path)
        layouts = found.layout.components if found.layout else adapter_file.layout(header, found.kind)
        layout = next((one for one in layouts if one.role == role), layouts[0])
        return {one.source for one in layout.tensors}
    headers = {one: naming.header_of(some) for one, some in parts.items()}
    made_up = Folder(place, tiny_family.family.pipeline_class, {}, headers, {}, ())
    patch.setattr(identify.folder, "read", lambda *_: made_up)
    found = identify.identify(place, variant=tiny_family.variant)
    assert found.layout is not None
    folder = tiny_family.family.component(role).folder
    return {one.source.removeprefix(f"{folder}.") for one in found.layout.component(role).tensors}


def wrong_shapes(shape: torch.Size, columns: bool) -> Iterator[torch.Size]:
    """Yield shapes that a tensor cannot have: half the rows; in `make test-all` also more columns and more axes."""
    yield torch.Size((max(1, shape[0] // 2) if shape[0] > 1 else 2, *shape[1:]))
    if ALL:
        yield torch.Size((*shape, 3))
        if len(shape) > 1 and columns:
            yield torch.Size((*shape[:-1], shape[-1] + 1))


def sampled(names: set[str]) -> list[str]:
    """One name of each kind, such as that of all blocks; in `make test-all` all names."""
    return sorted(names) if ALL else sorted({re.sub(r"[0-9]+", "N", name): name for name in sorted(names)}.values())


def other_names(config: Config, name: str) -> set[str]:
    """All names of a tensor in files. ``name``: one of them, with any prefix."""
    every = [{source.name for source in row.sources} for row in config.rows()]
    return {name}.union(*(names for names in every if name in names))


def roles_of(tiny_family: TinyFamily, form: str) -> list[str]:
    """The components to try. `make test` tries folders by their denoiser, and each architecture in files once."""
    configs = tiny_family.configs()
    if form == "files" and not tiny_family.lone_text_encoder:
        configs = {role: one for role, one in configs.items() if role not in tiny_family.family.text_encoders}
    if ALL:
        return list(configs)
    if form == "folder":
        return [tiny_family.family.denoiser]
    names = list(tiny_families())
    before = [tiny_families()[name].configs().values() for name in names[: names.index(tiny_family.name)]]
    known = {config.architecture for some in before for config in some}
    return [role for role, config in configs.items() if config.architecture not in known]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", tiny_families())
def test_each_missing_tensor_and_each_wrong_shape_is_named(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_family = tiny_families()[name]
    whole = tensors_of(tiny_family, form)
    silent: list[str] = []

    def listen(what: str, role: str, changed: Tensors, names: set[str]) -> None:
        folder = place_of(tiny_family, form, role)
        try:
            identified(tiny_family, form, role, {**whole, folder: changed}, monkeypatch, tmp_path)
        except (IncompleteModelError, UnsupportedModelError) as error:
            if not any(name in str(error) for name in names):
                silent.append(f"{role} {what}: {error}")
        else:
            silent.append(f"{role} {what}: no error")

    for role in roles_of(tiny_family, form):
        folder = place_of(tiny_family, form, role)
        tensors = whole[folder]
        for tensor_name in sampled(identified(tiny_family, form, role, whole, monkeypatch, tmp_path)):
            if re.search(tiny_family.optional_layers, tensor_name):
                continue
            names = other_names(tiny_family.configs()[role], tensor_name)
            lacking = {key: one for key, one in tensors.items() if key != tensor_name}
            listen(f"without {tensor_name}", role, lacking, names)
            is_input = re.search(tiny_family.input_layers, tensor_name) is not None
            shapes = list(wrong_shapes(tensors[tensor_name].shape, columns=not is_input))
            for shape in shapes[1:] if re.search(tiny_family.free_rows, tensor_name) else shapes:
                changed = {**tensors, tensor_name: torch.empty(shape, device="meta")}
                listen(f"with {tensor_name} as {list(shape)}", role, changed, names)
    assert silent == []
