"""The metadata of picture files."""
