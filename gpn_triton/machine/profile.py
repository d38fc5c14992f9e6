"""Where the time of training steps goes: torch.profiler's table and Chrome trace of a few."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from gpn_triton.machine.files import write_atomically

# the steps that compile kernels, capture a graph or fill a cache; rows of the table
WARM_STEPS, SHOWN = 5, 30
# the files it leaves in a run's folder
PROFILE, TRACE = "profile.txt", "trace.json.gz"


@contextmanager
def profiled(
    steps: int, epoch_steps: int, device: torch.device, folder: Path
) -> Iterator[Callable[[], None]]:
    """Record some of an epoch's training steps; print and write where their time went.

        with profiled(20, epoch_steps, device, folder) as made:
            for ...:
                ...one training step...
                made()

    The recorded steps come after the first five, or after fewer where the epoch is short; a short
    epoch has fewer to record. What is left in the folder is profile.txt, the table that is printed
    (by kernel on a GPU, by op on a CPU, and by region), and trace.json.gz for Perfetto or Chrome.
    After an exception nothing is printed or written. On a GPU the driver's tracing library stays
    loaded for the rest of the process.

    Args:
        steps: how many to record, at least 1. epoch_steps: how many there will be.
        device: where training runs. folder: an existing one.
    Raises:
        OSError: the folder cannot be written.
    """
    # torch's tracing library prints its own start and stop as errors, below this level
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    steps = min(steps, max(epoch_steps - 1, 1))
    before = min(WARM_STEPS, epoch_steps - steps)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    warm = min(before, 1)
    plan = schedule(wait=before - warm, warmup=warm, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan) as profiler:
        yield profiler.step
    averages = profiler.key_averages()
    key = f"self_{'device' if cuda else 'cpu'}_time_total"
    text = (
        f"{steps} training steps on {device}, after {before} that were not recorded; times are "
        "sums over all of them\n"
        + averages.table(sort_by=key, row_limit=SHOWN, max_name_column_width=60)
    )
    if cuda and not any(row.self_device_time_total for row in averages):
        text += "the profiler saw no kernel: is CUPTI there, and allowed to trace?\n"
    print(text)
    write_atomically(folder / PROFILE, lambda file: file.write(text.encode()))
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch, TRACE)
        profiler.export_chrome_trace(str(trace))
        write_atomically(folder / trace.name, lambda file: file.write(trace.read_bytes()))
