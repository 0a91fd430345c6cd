"""Z-Image needs newer libraries than the oldest that Safelight supports."""

from importlib.util import find_spec

NEEDED = ("diffusers.models.transformers.transformer_z_image", "transformers.models.qwen3")

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]
