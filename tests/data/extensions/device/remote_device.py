"""The simulated accelerator behind a slow link."""

from safelight.devices.simulated import Simulated


class Remote(Simulated):
    name = "remote"

    def __init__(self):
        super().__init__(nbytes=1 << 30, bandwidth=2e9, latency=0.0005)
