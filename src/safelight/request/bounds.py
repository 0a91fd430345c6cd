"""Bounds of a request's fields."""

MOST_SEED = 2**32 - 1

MOST_PIXELS = 4096 * 4096
"""Of an image."""

MOST_SIDE = 16384
"""Pixels of a width or height."""

MOST_COUNT = 1000
"""Images of one request."""

MOST_REFERENCES = 10
"""Reference images of one request."""

MOST_HIRES = 8.0
"""The largest factor of the hires fix."""

LEAST_TILE = 64
"""Pixels per side of a tile."""
