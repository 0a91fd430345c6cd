"""Stable Diffusion XL and its refiner."""
