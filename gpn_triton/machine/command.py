"""How a command ends: one line on standard error for whatever stops it, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from gpn_triton.machine import interrupt


class Interrupted(Exception):
    """Training stopped at a signal, by number, with what is needed to go on in a checkpoint."""

    def __init__(self, signal: int, saved: str):
        super().__init__(f"interrupted: saved {saved}")
        self.signal = signal


def answer(
    work: Callable[[], int], *expected: type[Exception], stopped: str = "stopped at once"
) -> int:
    """Do a command's work; returns its exit status, 2 for a mistake, 128 and more for a signal.

    Args:
        work: returns the status of a command that was not stopped.
        expected: the errors that name a user's mistake or the machine's; others are raised.
        stopped: what is said where Ctrl-C stops the work in its middle.
    """
    try:
        interrupt.started()
        return work()
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
