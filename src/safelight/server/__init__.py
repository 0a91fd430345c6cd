"""The HTTP application. No torch."""
