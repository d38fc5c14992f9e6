"""Where the time of a training step goes: a table and a Chrome trace of some steps in the middle.

On a GPU the step is split kernel by kernel, on a CPU op by op; what is in none of them has a row of
its own, so that rows add up to the step's time on the wall clock. Built on torch.profiler.
"""

from __future__ import annotations

import functools
import gzip
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from gpn_triton.files import write_atomically

STEP = "training step"
# rows of a table; what is left is summed in one more
SHOWN = 30
NAME_WIDTH = 60


@dataclass(frozen=True)
class Row:
    """What a step spends somewhere: calls (0: nothing to count) and milliseconds a step."""

    name: str
    calls: float
    ms: float


class StepProfile:
    """Records some training steps; a context manager around the loop that makes them.

        profile = StepProfile(steps=20, device=device)
        with profile:
            for ...:
                ...one training step...
                profile.step()
            with profile.paused():
                ...what is no step, such as an evaluation...
        print(profile.table())

    Once the steps are recorded, `step` returns at once. The device is waited for twice: before the
    first recorded step and after the last. Reading what was recorded takes seconds, where there
    are many ops, and happens when `rows`, `table` or `write` first asks for it. On a GPU the
    driver's tracing library stays loaded for the rest of the process.

    Args:
        steps: so many are recorded. warmup: so many before them are not: those that compile,
            capture a graph or fill a cache. device: where training runs.
    Attributes:
        recorded: steps recorded so far. ended: whether the recording is over.
    Raises:
        ValueError: steps below 1 or warmup below 0.
    """

    def __init__(self, steps: int, warmup: int = 5, device: torch.device | str = "cpu"):
        for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.steps, self.warmup = steps, warmup
        self.device = torch.device(device)
        self.recorded = 0
        self._warm = 0
        self.ended = self._tracing = False
        self._profiler: profile | None = None
        # the region of the step that is going on; of those before, whether they were whole steps
        self._marker: record_function | None = None
        self._whole: list[bool] = []

    def __enter__(self) -> StepProfile:
        self._approach()
        return self

    def __exit__(self, *_) -> None:
        if not self.ended:
            self._end()

    def step(self) -> None:
        """Tell that a training step has been made; the next begins here."""
        if self.ended:
            return
        if not self._tracing:
            self._warm += 1
            self._approach()
            return
        self.recorded += 1
        if self.recorded == self.steps:
            self._end()
        else:
            self._close(whole=True)
            self._open()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done in the block out of the table; it is in the trace."""
        if self._marker is None:
            yield
            return
        self._wait()
        self._close(whole=False)
        yield
        self._wait()
        self._open()

    @property
    def rows(self) -> list[Row]:
        """The step's time by kernel or op, longest first, and last what is in none of them.

        Rows add up to the step's time on the wall clock. Empty if no step was recorded.

        Raises:
            RuntimeError: the recording is not over.
        """
        return self._read[0]

    @property
    def regions(self) -> list[Row]:
        """Likewise by torch.profiler.record_function region; empty on a GPU and without regions."""
        return self._read[1]

    def table(self) -> str:
        """The step's time by region, if there are any, and by kernel or op; raises as `rows`."""
        if not self.rows:
            return (
                f"profile: nothing recorded: training ended after {self._warm} steps, "
                f"and the first {self.warmup} are not recorded"
            )
        step = sum(row.ms for row in self.rows)
        lines = [
            f"{self.recorded} training steps of {step:.3f} ms on {self.device}, after {self._warm} "
            "that were not recorded"
        ]
        if self.regions:
            lines += ["", *_lines("region", self.regions, step)]
        cuda = self.device.type == "cuda"
        lines += ["", *_lines("kernel" if cuda else "op, self time", self.rows, step)]
        if cuda and len(self.rows) == 1:
            lines += ["", "the profiler saw no kernel: is CUPTI there, and allowed to trace?"]
        return "\n".join(lines)

    def write(self, run: Path) -> None:
        """Write profile.txt and, if steps were recorded, trace.json.gz for Perfetto or Chrome.

        Args:
            run: an existing folder.
        Raises:
            OSError: it cannot be written. RuntimeError: the recording is not over.
        """
        text, trace = self.table() + "\n", self._read[2]
        write_atomically(Path(run, "profile.txt"), lambda file: file.write(text.encode()))
        if trace:
            write_atomically(Path(run, "trace.json.gz"), lambda file: file.write(trace))

    def _approach(self) -> None:
        """Get ready before the last step that is not recorded, and start after it."""
        left = self.warmup - self._warm
        if left <= 1 and self._profiler is None:
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profiler.prepare_trace()
        if left == 0:
            self._wait()
            self._profiler.start_trace()
            self._tracing = True
            self._open()

    def _open(self) -> None:
        self._marker = record_function(STEP)
        self._marker.__enter__()

    def _close(self, whole: bool) -> None:
        """End the region of a step; not whole: the device's rest of the steps before."""
        self._marker.__exit__(None, None, None)
        self._marker = None
        self._whole.append(whole)

    def _end(self) -> None:
        if self._marker is not None:
            self._wait()
            self._close(whole=self.recorded == self.steps)
        if self._profiler is not None:
            if not self._tracing:
                # prepared in the last step that is not recorded: only what was started can stop
                self._profiler.start_trace()
            self._profiler.stop_trace()
        self._tracing, self.ended = False, True

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @functools.cached_property
    def _read(self) -> tuple[list[Row], list[Row], bytes]:
        """Rows, regions and the compressed trace; the profiler can go then."""
        if not self.ended:
            raise RuntimeError(
                f"profile: {self.recorded} of {self.steps} steps are recorded: ask when `ended`, "
                "or after the block"
            )
        profiler, self._profiler = self._profiler, None
        if not self.recorded:
            return [], [], b""
        events = profiler.events()
        if self.device.type == "cuda":
            rows, regions = kernel_rows(events, self._whole), []
        else:
            rows, regions = op_rows(events, self._whole)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            return rows, regions, gzip.compress(path.read_bytes(), 6)


def op_rows(events: Iterable[FunctionEvent], whole: list[bool]) -> tuple[list[Row], list[Row]]:
    """Where the training thread spent whole steps: by op, and by record_function region.

    Args:
        events: what the profiler recorded. whole: of each STEP region, in order, if it counts.
    Returns:
        Rows as StepProfile.rows, an op's time without that of the ops inside it; and regions.
    """
    steps = [e for e, kept in zip(_step_regions(events), whole, strict=True) if kept]
    us, calls, regions, nowhere = Counter(), Counter(), Counter(), 0.0
    inside = list(steps)
    while inside:
        event = inside.pop()
        inside += event.cpu_children
        if event.is_user_annotation:
            nowhere += event.self_cpu_time_total
            continue
        # autograd runs a node in an event of its own: both are the node
        name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        us[name] += event.self_cpu_time_total
        calls[name] += name == event.name
    for step in steps:
        for event in step.cpu_children:
            if event.is_user_annotation:
                regions[event.name] += event.cpu_time_total
    elsewhere = sum(step.cpu_time_total for step in steps) - regions.total()
    counted = Counter(e.name for step in steps for e in step.cpu_children)
    return (
        _rows(us, calls, len(steps), "in no op: Python, gaps", nowhere),
        _rows(regions, counted, len(steps), "in no region", elsewhere) if regions else [],
    )


def kernel_rows(events: Iterable[FunctionEvent], whole: list[bool]) -> list[Row]:
    """Where a GPU spent the stretches of time that whole steps took, by kernel.

    Where k kernels run at once each is given 1/k of the time, so that rows add up to the wall
    clock's.

    Args:
        events, whole: as op_rows. A region that is not whole ends a stretch: in it the device
            finished the steps before.
    """
    # (time, +1 or -1 for begin or end, what)
    edges: list[tuple[float, int, str]] = []
    regions = list(zip(_step_regions(events), whole, strict=True))
    stretch: list[FunctionEvent] = []
    for k, (region, kept) in enumerate(regions):
        stretch.append(region)
        if not kept or k == len(regions) - 1:
            if kept or len(stretch) > 1:
                edges.append((stretch[0].time_range.start, 1, STEP))
                edges.append((region.time_range.end, -1, STEP))
            stretch = []
    for event in events:
        # a region has a shadow on the device, from its first kernel to its last
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            name = kernel_name(event.name)
            edges.append((event.time_range.start, 1, name))
            edges.append((event.time_range.end, -1, name))
    us, calls, running = Counter(), Counter(), Counter()
    last = nowhere = 0.0
    in_step = False
    for time, change, name in sorted(edges):
        at_once = running.total()
        if in_step and at_once:
            for kernel, count in (+running).items():
                us[kernel] += (time - last) * count / at_once
        elif in_step:
            nowhere += time - last
        last = time
        if name == STEP:
            in_step = change > 0
        else:
            running[name] += change
            calls[name] += in_step and change > 0
    return _rows(us, calls, sum(whole), "in no kernel: gaps, the host", nowhere)


def kernel_name(name: str) -> str:
    """A kernel's name without return type, parameters and namespaces, cut in the middle to fit.

    `void at::native::foo<float>(int, float*)` is `foo<float>`; what is no C++ stays.
    """
    if name.endswith(")"):
        depth = 0
        for start in range(len(name) - 1, 0, -1):
            depth += (name[start] == ")") - (name[start] == "(")
            if depth == 0:
                break
        # Memcpy HtoD (Pinned -> Device) has no parameters
        if name[start - 1] != " ":
            name = name[:start]
    name = name.removeprefix("void ")
    for namespace in ("at::native::", "(anonymous namespace)::", "std::"):
        name = name.replace(namespace, "")
    name = re.sub(r", array<char\*, \d+(ul)?> ?", "", name)
    # a template's name is at the front, what it computes at the back
    half = NAME_WIDTH // 2
    return name if len(name) <= NAME_WIDTH else f"{name[:half]}...{name[3 - half :]}"


def _step_regions(events: Iterable[FunctionEvent]) -> list[FunctionEvent]:
    found = [e for e in events if e.name == STEP and e.device_type == DeviceType.CPU]
    return sorted(found, key=lambda e: e.time_range.start)


def _rows(us: Counter, calls: Counter, steps: int, rest: str, rest_us: float) -> list[Row]:
    """Sums over steps as rows of one step, longest first, and the rest."""
    rows = [Row(name, calls[name] / steps, t / 1e3 / steps) for name, t in us.most_common()]
    return [*rows, Row(rest, 0, rest_us / 1e3 / steps)]


def _lines(title: str, rows: list[Row], step: float) -> list[str]:
    """A table of rows and their sum; step: its milliseconds."""
    *found, rest = rows
    shown, others = found[:SHOWN], found[SHOWN:]
    if others:
        sums = (sum(row.calls for row in others), sum(row.ms for row in others))
        shown.append(Row(f"{len(others)} others", *sums))
    lines = [f"{title:{NAME_WIDTH}} {'calls a step':>12} {'ms a step':>10} {'share':>8}"]
    for row in (*shown, rest, Row("all", 0, step)):
        calls = f"{row.calls:.4g}" if row.calls else ""
        share = f"{100 * row.ms / step:.1f} %"
        lines.append(f"{row.name:{NAME_WIDTH}} {calls:>12} {row.ms:10.3f} {share:>8}")
    return lines
