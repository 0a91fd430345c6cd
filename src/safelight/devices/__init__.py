"""Devices: their memory, and the copies between them."""
