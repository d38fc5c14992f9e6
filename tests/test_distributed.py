"""Processes that train together on CPUs: one that dies ends the others, and the run goes on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.training import run_folder
from tests.stores import make_store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
OPTIONS = ["--hidden", "8", "--time-bins", "6", "--batch-size", "8", "--epochs", "6", "--noise"]
OPTIONS += ["0.2", "--device", "cpu"]
# the training command, which sooner finds out that another process is lost; and that kills its
# process 1 in the fourth epoch of the first try, where it is told to
COMMAND = """
import os, signal, sys
from gpn_triton import train
from gpn_triton.machine import distributed
from gpn_triton.training.run import Run

distributed.LOST_SECONDS = 3.0
end_epoch = Run._end_epoch

def killed(self, epoch, trained):
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if epoch == 3 and self.world.rank == 1 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return end_epoch(self, epoch, trained)

if "KILL" in os.environ:
    Run._end_epoch = killed
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags for a small training and test file."""
    folder, found = tmp_path_factory.mktemp("files"), []
    for part, samples in (("train", 48), ("test", 16)):
        one = dict(least=20, most=20, end=1.0, empty=False, seed=samples, band=(100, 200))
        write_events(folder / f"{part}.h5", make_store(samples, 2, **one))
        found += [f"--{part}-file", str(folder / f"{part}.h5")]
    (folder / "command.py").write_text(COMMAND)
    return folder / "command.py", [*found, *OPTIONS]


def environment(**more):
    # the root of the tree, as `python -m` has it
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **path, **more}


def start_two(command, *arguments):
    """Two processes, as a launcher that only starts them would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(command), *arguments], cwd=ROOT, text=True,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **where),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run of two processes that nothing interrupted."""
    command, options = flags
    out = tmp_path_factory.mktemp("whole")
    for process in start_two(command, *options, "--out", str(out)):
        assert process.communicate(timeout=120) and process.returncode == 0
    return next(out.iterdir())


def same_bits(run, whole):
    """Whether two runs have the same weights and the same metrics but for seconds."""
    weights = [load_file(r / "best.safetensors") for r in (run, whole)]
    last = [run_folder.load_checkpoint(r)[0]["engine"]["model"] for r in (run, whole)]
    lines = []
    for r in (run, whole):
        found = map(json.loads, (r / "metrics.jsonl").read_text().splitlines()[1:])
        drop = ("seconds", "samples_per_second")
        lines.append([{k: v for k, v in line.items() if k not in drop} for line in found])
    return lines[0] == lines[1] and all(
        (a[name] == b[name]).all() for a, b in (weights, last) for name in b
    )


def test_a_killed_process_ends_the_other_with_one_line(flags, tmp_path):
    command, options = flags
    writer, other = start_two(command, *options, "--out", str(tmp_path))
    for line in writer.stdout:
        if line.startswith("epoch   3"):
            other.send_signal(signal.SIGKILL)
            break
    started = time.monotonic()
    _, error = writer.communicate(timeout=60)
    assert writer.returncode == 2 and time.monotonic() - started < 30
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    assert re.match("error: process 1 of 2 has shown no sign of life for 3 s", lines[0])
    other.communicate()


def test_torchrun_starts_again_what_was_killed_and_the_run_goes_on(flags, whole, tmp_path):
    command, options = flags
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*torchrun, str(command), *options, "--out", str(tmp_path)], cwd=ROOT, text=True,
        env=environment(KILL="1"), capture_output=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    (run,) = tmp_path.iterdir()
    assert same_bits(run, whole)
