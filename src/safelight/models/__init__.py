"""Skeletons, and binding them to weights."""
