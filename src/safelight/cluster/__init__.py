"""Slots on other machines, which Ray places and restarts."""
