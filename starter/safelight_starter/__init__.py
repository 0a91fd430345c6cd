"""Safelight's starter checkpoints: data only. Safelight finds them by this package's folder."""
