"""Sequences of everything that can happen, on the simulated device, until the time is up.

``make soak``, or ``PYTHONPATH=tests python tools/soak.py SECONDS``.

Each round tries new sequences (``tests/stateful/test_switching.py``); the first that breaks an invariant is printed in
its shortest form and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import logging
import time

import structlog
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from stateful.test_switching import Switching

from safelight.devices import machine

EACH = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--sequences", type=int, default=EACH, help="in a round")
    asked = parser.parse_args()
    # What is repaired on purpose thousands of times is no news.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    until, rounds = time.monotonic() + asked.seconds, 0
    start = machine.anonymous_bytes()
    while time.monotonic() < until:
        run_state_machine_as_test(
            Switching,
            settings=settings(max_examples=asked.sequences, stateful_step_count=25, deadline=None, database=None),
        )
        rounds += 1
        grown = (machine.anonymous_bytes() - start) / 1e6
        print(f"{rounds * asked.sequences} sequences, anonymous memory {grown:+.1f} MB", flush=True)


if __name__ == "__main__":
    main()
