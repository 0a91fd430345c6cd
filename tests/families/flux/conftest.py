"""FLUX.1 needs a newer diffusers than the oldest that Safelight supports."""

from importlib.util import find_spec

NEEDED = ("diffusers.models.attention_dispatch",)

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]
