"""The page."""

from __future__ import annotations

from fastapi import FastAPI

from safelight.assemble.control import Control


def mount(app: FastAPI, control: Control) -> None:
    """Put the page on the application."""
    del app, control
