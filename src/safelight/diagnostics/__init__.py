"""Proves that images are right, and finds the causes of spoiled ones."""
