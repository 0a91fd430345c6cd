"""Chroma needs a newer diffusers than the oldest that Safelight supports."""

from importlib.util import find_spec

NEEDED = ("diffusers.models.transformers.transformer_chroma", "diffusers.pipelines.chroma.pipeline_chroma_inpainting")

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]
