"""How many steps a request computes."""

from __future__ import annotations

from safelight.request.schema import Request


def computed_steps(request: Request) -> int:
    """Return the number of steps that both passes compute."""
    again = int((request.hires_steps or request.step_count) * request.hires_strength) if request.hires_scale > 1 else 0
    return request.first_pass_steps + again
