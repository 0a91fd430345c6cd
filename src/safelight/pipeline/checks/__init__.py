"""Checks of latents and images."""
