"""Nothing outside ``families`` knows a family: no name, no role, no shape of latents, no class of the libraries."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from safelight.families.registry import families

SOURCE = Path(__file__).parents[2] / "src/safelight"

NAMES = frozenset(families())
ROLES = frozenset(role for family in families().values() for role in family.roles) - {"vae"}

EXEMPT = {
    "families/": "here",
    "boundary/": "names the libraries' classes, which families choose",
    "request/adapters.py": "users' syntax: strengths of a LoRA for the UNet and for the text encoders",
    "request/schema.py": "users' syntax: text_encoder names another model's text encoders",
    "request/prompts/loras.py": "users' syntax: unet= and te= in a LoRA's tag",
    "resolve/resolve.py": "the request's field text_encoder",
    "resolve/parts.py": "the request's field text_encoder",
    "weights/adapter_mapping.py": "PEFT's name for modules without a component's name, in files",
    "weights/adapter_file.py": "the kind of a file that has a text encoder alone",
    "diagnostics/audited_servers.py": "ComfyUI's names of outputs",
    "server/": "the request's field text_encoder",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a module that are no docstring."""
    tree = ast.parse(path.read_text())
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.lineno, node.value


def test_no_family_and_no_role_is_named_elsewhere() -> None:
    found: list[str] = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not any(name.startswith(exempt) for exempt in EXEMPT):
            found += [f"{name}:{line}: {text}" for line, text in texts(path) if text in NAMES | ROLES]
    assert found == []


def test_nothing_elsewhere_imports_the_inside_of_a_family() -> None:
    found: list[str] = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith("families/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = node.module.split(".")
                if parts[:2] == ["safelight", "families"] and len(parts) > 3:
                    found.append(f"{name}:{node.lineno}: {node.module}")
    assert found == []
