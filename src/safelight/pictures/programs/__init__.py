"""The readers of each program's generation data. Each returns None for what is not of its program."""
