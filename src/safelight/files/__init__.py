"""Reads and writes files: headers of model files, and files written wholly or not at all. No torch."""
