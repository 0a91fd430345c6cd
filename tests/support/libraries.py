"""Diffusers as a value without types.

Its pipelines name classes of transformers, and pyright reads all of the models of transformers to find their types: a
quarter of the time of the type check.
"""

from importlib import import_module
from typing import Any

diffusers: Any = import_module("diffusers")
