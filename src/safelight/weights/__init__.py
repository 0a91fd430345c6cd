"""Immutable weights: digests, manifests, slabs, overlays, adapters."""
