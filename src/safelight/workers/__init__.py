"""Engines that make images: in this process, in a worker, in fresh processes, on a server elsewhere."""
