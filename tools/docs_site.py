"""A hook of mkdocs: the README is the first page of the documentation site, and its translation the first page in
Chinese, with their links changed to fit there."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]

READMES = {"README.md": "index.md", "README.zh.md": "zh/index.md"}
"""The READMEs, and the pages of the site that they become."""


def on_files(files: Any, config: Any) -> Any:
    """Add the READMEs."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for readme, page in READMES.items():
        files.append(File.generated(config, page, content=in_site((HOME / readme).read_text(), page)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change links to files that the site does not have into plain text."""
    del config, files
    return in_docs(markdown) if page.file.src_uri not in READMES.values() else markdown


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Take the script for a search without a server from the site itself: nothing comes from another host."""
    del config
    up = "../" * page.url.count("/")
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{up}assets/iframe-worker.js")


def in_site(text: str, page: str) -> str:
    """Return a README's text with links from its page. Those to files that the site does not have become plain text."""

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found.groups()
        if not target or target.startswith(("http:", "https:")):
            return found[0]
        there = READMES.get(target, target.removeprefix("docs/"))
        if there == target:
            return words
        return f"[{words}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(r"\[([^\]]+)\]\(([^)#]*)([^)]*)\)", link, text)


def in_docs(text: str) -> str:
    """Return a document's text without links to files outside of the folder of the documents."""
    text = text.replace("](../README.md", "](index.md")
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!index\.md|\w+\.(?:md|png))[^)]*\)", r"\1", text)
