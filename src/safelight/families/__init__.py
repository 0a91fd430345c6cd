"""Families of models: one folder for each architecture, which alone knows that architecture. See ``family.py``."""
