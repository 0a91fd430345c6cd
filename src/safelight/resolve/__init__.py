"""Turns a request into a job: replaces every name by a digest, once. No torch."""
