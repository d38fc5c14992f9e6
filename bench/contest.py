"""The subjects of one case: set up, checked, timed in turns, and each described by a flat record.

Both drivers run these, pytest (conftest.py) and the one for a GPU (gpu.py), and their records have
one form, which report.py reads.
"""

from __future__ import annotations

import functools
import gc
import math
import operator
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench import measure
from bench.cases import Case
from bench.competitors import Unavailable
from bench.subjects import Entry, Wrong
from gpn_triton.machine import device as machine
from gpn_triton.machine.provenance import provenance
from gpn_triton.neurons import cost

# why a subject was left out whose turn came after the deadline
NO_TIME = "no time left"


@functools.cache
def header(device: torch.device) -> dict[str, Any]:
    """What every record carries of the machine and the program."""
    found = provenance(device)
    kept = {key: found[key] for key in ("commit", "device", "threads", "versions")}
    cuda = device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    return {**kept, "device_type": device.type, "capability": 10 * major + minor}


class Contest:
    """The subjects of one case.

    Args:
        case: the sizes. prepare: makes a subject's Entry from its name. subjects: names, in order.
        device, rounds, seconds: see measure.race.
        deadline: on time.monotonic's clock; a subject whose turn comes later is left out.
    Attributes:
        times: of the subjects that ran, by name. failed: by name, why the others did not.
    """

    def __init__(
        self, case: Case, prepare: Callable[[str], Entry], subjects: Iterable[str],
        device: torch.device, rounds: int, seconds: float, deadline: float = math.inf,
    ):  # fmt: skip
        self.case, self.device = case, device
        self.failed: dict[str, Exception] = {}
        self._entries: dict[str, tuple[Entry, dict[str, Any]]] = {}
        for name in subjects:
            try:
                if time.monotonic() > deadline:
                    raise Unavailable(NO_TIME)
                entry = prepare(name)
                self._entries[name] = entry, self._try(name, entry)
            except Exception as error:
                # a competitor that breaks is left out and named; ours breaking is a failure
                known = isinstance(error, (Unavailable, Wrong, torch.OutOfMemoryError))
                if not known and not name.startswith("gpn"):
                    error = Unavailable(f"{type(error).__name__}: {error}")
                # a traceback holds the subject's tensors; a failure of ours needs it all the same
                error = error.with_traceback(None) if known else error
                self.failed[name] = error
                entry = None
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        calls = {name: entry.call for name, (entry, _) in self._entries.items()}
        self.times = measure.race(calls, device, rounds, seconds) if calls else {}
        self.clocks = measure.clocks_mhz(device)

    def _try(self, name: str, entry: Entry) -> dict[str, Any]:
        """Check a subject, warm it up and count its memory."""
        seen = entry.check()
        entry.call()
        held = measure.held_bytes(entry.saves) if entry.saves else (None, None)
        peak = seen.get("peak_bytes", getattr(entry.call, "peak_bytes", None))
        peak = measure.peak_bytes(entry.call, self.device) if peak is None else peak
        if self.device.type == "cuda" and not name.startswith("gpn"):
            seen = {**seen, "kernels": measure.longest_kernels(entry.call, self.device)}
        return {**seen, "peak_bytes": peak, "held_bytes": held[0], "held_beyond_bytes": held[1]}

    def left_out(self, subject: str) -> tuple[str, str]:
        """How a subject that did not run ended, skipped or failed, and the reason on one line."""
        error = self.failed[subject]
        if isinstance(error, Wrong):
            return "failed", f"wrong: {subject}: {error}"
        line = str(error).strip().partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError):
            return "skipped", f"out of memory: {line}"
        if isinstance(error, Unavailable):
            return "skipped", line
        return "failed", f"{type(error).__name__}: {line}"

    def record(self, subject: str, ceilings: machine.Ceilings, **info: Any) -> dict[str, Any]:
        """What the figures of a subject that ran are, of what, on what, and `info` beside them."""
        case, times, (entry, seen) = self.case, self.times[subject], self._entries[subject]
        count, floor = entry.count, 1e3 * cost.floor_seconds(entry.count, ceilings)
        ours = [s for s in ("gpn-triton", *self.times) if s.startswith("gpn")]
        first = next((s for s in ours if s in self.times), None)
        wall = measure.summary(times.wall)
        cache = machine.l2_bytes(self.device)
        inputs = case.T * case.B * case.inputs * getattr(torch, case.dtype).itemsize
        # of one's time over another's, taken next to each other
        ratios = first and map(operator.truediv, times.wall, self.times[first].wall)
        return {
            **header(self.device),
            **{key: getattr(case, key) for key in ("kind", "T", "B", "inputs", "dtype", "scaled")},
            "case": case.name,
            "subject": subject,
            "hidden": list(case.hidden),
            "full": list(case.full),
            "rounds": len(times.wall),
            **wall,
            "device_median_ms": 1e3 * statistics.median(times.device) if times.device else None,
            **{key: getattr(count, key) for key in ("flops", "serial_flops", "bytes")},
            "floor_ms": floor,
            "fraction_of_floor": floor / wall["median_ms"],
            "ceilings": vars(ceilings),
            "clocks_mhz": self.clocks,
            # what it touches may lie in the cache from one call to the next, where no copy's rate
            # is a bound
            "fits_l2": None if cache is None else seen["peak_bytes"] + inputs <= cache,
            "time_relative_to": first,
            "time_ratio": statistics.median(ratios) if first else None,
            **seen,
            **info,
        }
