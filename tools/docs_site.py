"""A hook of mkdocs: the README is the first page of the documentation site, with its links changed to fit there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add the README as ``index.md``."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    files.append(File.generated(config, "index.md", content=in_site((HOME / "README.md").read_text())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change links to files that the site does not have into plain text."""
    del config, files
    return in_docs(markdown) if page.file.src_uri != "index.md" else markdown


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Take the script for a search without a server from the site itself: nothing comes from another host."""
    del config
    up = "../" * page.url.count("/")
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{up}assets/iframe-worker.js")


def in_site(text: str) -> str:
    """Return the README's text with links from the folder of the documents."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|[\w/-]+\.(?:md|png))[^)]*\)", r"\1", text)


def in_docs(text: str) -> str:
    """Return a document's text without links to files outside of the folder of the documents."""
    text = text.replace("](../README.md", "](index.md")
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!index\.md|\w+\.(?:md|png))[^)]*\)", r"\1", text)
