"""ERNIE-Image needs a newer diffusers than the oldest that Safelight supports."""

from importlib.util import find_spec

NEEDED = (
    "diffusers.models.transformers.transformer_ernie_image",
    "transformers.models.ministral3",
    "diffusers.pipelines.ernie_image",
)

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]
