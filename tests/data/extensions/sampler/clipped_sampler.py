"""A sampler. This module imports no torch, because the server and the command line load it for their lists."""

from safelight.request.samplers import Sampler

SAMPLER = Sampler("clipped_scheduler:Clipped", a1111="Clipped", schedules=("default",))
