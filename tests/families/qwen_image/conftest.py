"""Qwen-Image needs newer libraries than the oldest that Safelight supports."""

from importlib.util import find_spec

NEEDED = ("diffusers.models.transformers.transformer_qwenimage", "transformers.models.qwen2_5_vl")

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]
