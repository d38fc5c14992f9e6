"""What is told while a network trains and after: the time that is left, and aligned tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tqdm import tqdm


class Pace:
    """How long trainings still take, from how long they have taken so far, with all that is in
    between: validation, checkpoints, and what happens once.

    Args:
        total: training samples of all epochs that are to come, of later seeds, too. clock: seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.perf_counter):
        self._total, self._clock = total, clock
        self._began, self._done = clock(), 0

    def add(self, samples: int) -> None:
        """So many more are trained on."""
        self._done += samples

    def left(self) -> str:
        """The time left, as 12:34 or 1:02:03; ? until the first sample is trained on."""
        if not self._done:
            return "?"
        each = (self._clock() - self._began) / self._done
        return tqdm.format_interval(each * max(self._total - self._done, 0))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines whose columns stand below each other, the first row being the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
