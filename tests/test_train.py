"""The training command: what a run leaves, resuming bit for bit, and a line for a mistake."""

import contextlib
import gzip
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules import module

from gpn_triton import SpikingClassifier, train
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.machine import device as machine
from gpn_triton.neurons import cost
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training import run as run_module
from gpn_triton.training import run_folder
from tests.stores import make_store

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "gpn_triton.train"]
# other numbers of threads would round other sums
THREADS = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
SMALL = ["--hidden", "8", "--time-bins", "6", "--batch-size", "8", "--device", "cpu"]


def store(samples, seed):
    """Samples whose class is the channel range that fires; 20 events each."""
    one = dict(least=20, most=20, end=1.0, empty=False)
    return make_store(samples, 2, **one, seed=seed, band=(100, 200))


@pytest.fixture
def files(tmp_path):
    """Flags for a small training and test file, and for where runs go."""
    flags = []
    for part, samples in (("train", 48), ("test", 16)):
        write_events(tmp_path / f"{part}.h5", store(samples, len(part)))
        flags += [f"--{part}-file", str(tmp_path / f"{part}.h5")]
    return [*flags, "--out", str(tmp_path / "runs")]


def only_run(out):
    (run,) = Path(out).iterdir()
    return run


def trained(files, *options):
    """Train with 44 samples in 6 steps an epoch; the run's folder and result."""
    assert train.main([*files, *SMALL, "--epochs", "2", *options]) == 0
    run = only_run(files[-1])
    return run, json.loads((run / "result.json").read_text())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def at_training_call(act, step):
    """Call act with the logits when a network has been called in training for the step-th time.

    What act returns, if anything, takes the logits' place.
    """
    calls = itertools.count(1)

    def hook(called, inputs, output):
        if isinstance(called, SpikingClassifier) and called.training and next(calls) == step:
            changed = act(output[0])
            return None if changed is None else (changed, output[1])

    handle = module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_run_learns_and_leaves_its_files(files, capsys):
    run, result = trained(files, "--epochs", "12", "--lr", "0.02", "--seed", "3")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert result["test_accuracy"] >= 0.9
    assert result["valid_accuracy"] == max(line["valid_accuracy"] for line in lines[1:])
    # a Linear with its gain, the gates, the readout
    assert result["parameters"] == 700 * 8 + 2 * 8 + 2 * 32 * 8 + 32 + 8 * 2 + 2
    assert result["epochs"] == 12 == len(lines) - 1 and result["seed"] == 3
    assert lines[0]["config"]["lr"] == 0.02 and lines[0]["versions"]["torch"] == torch.__version__
    assert lines[-1]["train_loss"] < lines[1]["train_loss"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert set(load_file(run / "best.safetensors")) >= {"neurons.0.weight_v", "output.weight"}
    # what computed each layer is said once, and stands in both files with where the run was
    (layer,) = result["layers"]
    assert layer == lines[0]["layers"][0] and layer["reason"]
    assert [here["commit"] for here in result["ran_on"]] == [lines[0]["commit"]]
    # the test file is read after the last epoch alone
    printed = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in printed]
    assert [w for w in words if w in ("epoch", "test")] == ["epoch"] * 12 + ["test"]
    assert f"test accuracy {100 * result['test_accuracy']:.2f} % (1 seed)" in printed[-1]
    assert printed[-1].endswith(str(run))
    # throughput, and the share of the floor: 44 samples of 6 steps
    ceilings = machine.ceilings(torch.device("cpu"))
    floor = cost.training_floor(NEURONS["gpn"].work, [8], 700, 2, 6, 44, None, ceilings)
    assert result["floor_seconds_per_epoch"] == pytest.approx(floor)
    assert result["fraction_of_floor"] == pytest.approx(floor / result["seconds_per_epoch"])
    assert result["samples_per_second"] == pytest.approx(44 / result["seconds_per_epoch"])
    assert "measured" in result["ceilings"]["source"] and result["peak_memory_mib"] > 0


def test_several_seeds_give_mean_and_deviation_and_each_its_own_weights(files, capsys):
    run, summary = trained(files, "--seed", "1", "2")
    accuracies = [r["test_accuracy"] for r in summary["results"]]
    assert summary["seeds"] == [1, 2]
    assert summary["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["test_accuracy_deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    mean, deviation = (100 * summary[f"test_accuracy{x}"] for x in ("", "_deviation"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"test accuracy {mean:.2f} +- {deviation:.2f} % (2 seeds)" in last
    alone, _ = trained([*files[:-1], f"{files[-1]}-alone"], "--seed", "1")
    one, first, second = (
        load_file(folder / "best.safetensors")["output.weight"]
        for folder in (alone, run / "seed-1", run / "seed-2")
    )
    assert torch.equal(one, first) and not torch.equal(one, second)


def test_a_finished_run_is_evaluated_and_left_as_it_is(files, capsys):
    run, result = trained(files)
    before = contents(run)
    assert train.main(["--eval-only", str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"test accuracy {100 * result['test_accuracy']:.2f} %")
    assert train.main(["--resume", str(run)]) == 0
    assert f"{run} is finished" in capsys.readouterr().out
    assert contents(run) == before
    (run / "best.safetensors").write_bytes(b"junk")
    assert train.main(["--eval-only", str(run)]) == 2
    assert "best.safetensors does not fit this network" in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    "--amp fp16 --clip-grad 1 --schedule plateau --neuron lif",
    "--amp --warmup-epochs 1 --neuron lstm --hidden 6 5",
    "--channel-shift 5 --time-stretch 0.1 --event-drop 0.1 --noise 0.1 --max-time 1.0",
    "--readout last --checkpoint-every 3 --neuron gpn-no-i --binning authors",
    "--channel-bin 5 --neuron cnn --overflow clip",
])  # fmt: skip
def test_every_kind_of_option_trains(files, options):
    assert np.isfinite(trained(files, *options.split())[1]["test_loss"])


LONGER = [*SMALL, "--epochs", "4", "--noise", "0.2"]


def same_bits(folder, whole):
    """Whether a run ended with the weights and metrics of another, seconds apart."""
    expected, got = (load_file(r / "best.safetensors") for r in (whole, folder))
    metrics = [
        [json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()[1:]]
        for r in (whole, folder)
    ]
    for line in (*metrics[0], *metrics[1]):
        del line["seconds"], line["samples_per_second"]
    return metrics[0] == metrics[1] and all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize(("seeds", "kill", "step"), [
    (["5"], signal.SIGTERM, 15),
    # the last step of an epoch
    (["5"], signal.SIGINT, 12),
    # of two seeds, in the second one's second epoch
    (["5", "6"], signal.SIGINT, 24 + 9),
], ids=["SIGTERM", "SIGINT", "second seed"])  # fmt: skip
def test_an_interrupted_run_resumes_to_the_same_bits(files, seeds, kill, step, tmp_path, capsys):
    whole, _ = trained([*files[:-1], str(tmp_path / "whole")], *LONGER, "--seed", *seeds)
    with at_training_call(lambda _: signal.raise_signal(kill), step):
        assert train.main([*files, *LONGER, "--seed", *seeds]) == 128 + kill
    run = only_run(files[-1])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("interrupted: saved checkpoint-0000")
    assert last.endswith(f"go on with --resume {run}") and not (run / "result.json").exists()
    assert train.main(["--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert "resumed from" in said and "layer 1, 8 gpn: cpu, these are" in said
    result = json.loads((run / "result.json").read_text())
    places = result.get("results", [result])[-1]["ran_on"]
    assert len(places) == 2 and places[1]["from_epoch"] == 2 + (step == 15)
    for name in [""] if len(seeds) == 1 else [f"seed-{seed}" for seed in seeds]:
        assert same_bits(run / name, whole / name)


def test_a_killed_run_resumes_to_the_same_bits(files, tmp_path, capsys):
    longer = [*LONGER, "--epochs", "40"]
    command = [*COMMAND, *files, *longer]
    broken = subprocess.Popen(command, cwd=ROOT, env=THREADS, stdout=subprocess.PIPE, text=True)
    for line in broken.stdout:
        if line.startswith("epoch   4"):
            broken.kill()
            break
    broken.stdout.close()
    assert broken.wait() == -signal.SIGKILL
    assert train.main(["--resume", "auto", *files[-2:]]) == 0
    assert "resumed from" in capsys.readouterr().out
    whole, _ = trained([*files[:-1], str(tmp_path / "whole")], *longer)
    assert same_bits(only_run(files[-1]), whole)


def test_data_changed_since_the_checkpoint_are_refused(files, capsys):
    run, _ = trained(files)
    (run / "result.json").unlink()
    write_events(Path(files[1]), store(48, 99))
    assert train.main(["--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-00002-000000.pt is not of this run: the data have changed" in error


@pytest.mark.parametrize(("place", "value", "message"), [
    # the option is younger than the checkpoint
    ("computes readout", None, None),
    ("computes lr", 7.0, "lr 7.0 there, 0.001 here"),
    ("engine model", None, "KeyError('model')"),
    ("progress epoch", "x", "invalid literal"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_named_in_one_line(files, place, value, message, capsys):
    run, _ = trained(files)
    (run / "result.json").unlink()
    path = max(run.glob("checkpoint-*.pt"))
    state = torch.load(path, weights_only=True)
    outer, last = place.split()
    state[outer][last] = value
    if value is None:
        del state[outer][last]
    torch.save(state, path)
    before = contents(run)
    assert train.main(["--resume", str(run)]) == (0 if message is None else 2)
    if message is not None:
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: resume: {path} is not of this run: ") and message in line
        assert contents(run) == before


@pytest.mark.parametrize(("argv", "message"), [
    ("--dataset mnits", "dataset: expected synthetic, "),
    ("--train-file none.h5", "none.h5"),
    ("--device tpu", "device: expected auto, cpu, cuda or cuda:K, got 'tpu'"),
    ("--device cuda:99", "device: cuda:99 is not here"),
    ("--dataset shd --data-dir nowhere", "--download"),
    ("--resume nowhere", "resume: nowhere is not a run folder"),
    ("--eval-only nowhere", "eval_only: nowhere is not a run folder"),
    ("--resume auto --out nowhere", "resume: no unfinished run under nowhere"),
    ("--samples 40 --out /dev/null/runs", "Not a directory"),
])  # fmt: skip
def test_a_users_mistake_is_one_line_and_a_status(argv, message, capsys):
    assert train.main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_the_module_is_a_command_and_triton_asked_for_on_a_cpu_is_refused():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [*COMMAND, "--backend", "triton", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: backend: triton cannot run: ")


def _bad_gradient(logits):
    logits.register_hook(lambda gradient: gradient * torch.inf)


def test_gradients_that_are_not_finite_stop_the_run_or_are_skipped_when_asked(files, capsys):
    with at_training_call(_bad_gradient, 9):
        assert train.main([*files, *SMALL, "--epochs", "3"]) == 2
    error = capsys.readouterr().err
    assert "error: epoch 2, step 3: loss 0." in error
    assert "gradients not finite in inputs.0.weight" in error and "output.weight" in error
    run = only_run(files[-1])
    assert f"last good checkpoint: {run}/checkpoint-00001-000000.pt" in error
    weights = run_folder.load_checkpoint(run)[0]["engine"]["model"]
    assert all(t.isfinite().all() for t in weights.values())
    with at_training_call(_bad_gradient, 9):
        run, result = trained([*files[:-1], f"{files[-1]}-skipping"], "--skip-nonfinite")
    assert result["skipped_steps"] == 1
    assert all(t.isfinite().all() for t in load_file(run / "best.safetensors").values())


@pytest.mark.parametrize("amp", [[], ["--amp", "fp16"]], ids=["float32", "fp16"])
def test_a_loss_that_is_not_finite_stops_the_run(files, amp, capsys):
    with at_training_call(lambda logits: logits * torch.nan, 9):
        assert train.main([*files, *SMALL, "--epochs", "3", *amp]) == 2
    assert "error: epoch 2, step 3: loss nan" in capsys.readouterr().err


def test_processes_together_compute_what_one_does_and_any_number_goes_on(files, tmp_path):
    options = ["--batch-size", "21", "--epochs", "2", "--lr", "0.01", "--clip-grad", "0.1"]
    whole, result = trained([*files[:-1], str(tmp_path / "whole")], *options)

    def with_processes(count, *arguments):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        command = [*torchrun, *port, *COMMAND[1:], *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        options = dict(cwd=ROOT, env=env, check=True, timeout=900, stdout=subprocess.PIPE)
        return subprocess.run(command, **options, text=True).stdout.splitlines()

    def compare(run):
        weights, expected = (
            run_folder.load_checkpoint(r)[0]["engine"]["model"] for r in (run, whole)
        )
        for name, t in expected.items():
            torch.testing.assert_close(weights[name], t, rtol=1e-3, atol=1e-5)
        found = json.loads((run / "result.json").read_text())
        assert found["test_loss"] == pytest.approx(result["test_loss"], rel=1e-4)
        assert found["valid_accuracy"] == result["valid_accuracy"]
        return found

    with_processes(3, *files, *SMALL, *options)
    run = only_run(files[-1])
    assert compare(run)["processes"] == 3
    # take the run back to its first epoch and let two processes go on
    (run / "result.json").unlink()
    max(run.glob("checkpoint-*.pt")).unlink()
    with_processes(2, "--resume", str(run))
    accuracy = compare(run)["test_accuracy"]
    before = contents(run)
    said = with_processes(2, "--eval-only", str(run))
    (line,) = [line for line in said if line.startswith("test accuracy")]
    assert line.startswith(f"test accuracy {100 * accuracy:.2f} %") and contents(run) == before


def test_a_disk_without_room_ends_the_run_with_one_line(files, capsys):
    trained([*files[:-1], files[-1] + "-before"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a checkpoint is larger
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert train.main([*files, *SMALL, "--epochs", "2"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno 27] File too large")
    assert not [path for path in only_run(files[-1]).iterdir() if path.name.startswith(".")]


def test_a_profile_is_printed_and_lies_in_the_runs_folder(files):
    command = [*COMMAND, *files, *SMALL, "--epochs", "2", "--profile", "4"]
    done = subprocess.run(command, cwd=ROOT, env=THREADS, capture_output=True, text=True)
    assert done.returncode == 0 and "USDT" not in done.stderr
    run = only_run(files[-1])
    text = (run / "profile.txt").read_text()
    assert text in done.stdout
    assert text.startswith("4 training steps on cpu") and "gpn_triton::recurrence" in text
    assert " forward " in text and " update " in text
    trace = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))
    assert any("gpn_triton::recurrence" in e.get("name", "") for e in trace["traceEvents"])


def test_where_and_in_which_parts_may_change_on_resuming(files, capsys):
    whole = ["--epochs", "4"]
    _, expected = trained([*files[:-1], files[-1] + "-whole"], *whole)
    run, result = trained(files, *whole, "--accumulate", "3", "--event-mib", "1", "--no-graph")
    assert result["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
    assert train.main(["--eval-only", str(run), "--accumulate", "2", "--event-mib", "2"]) == 0
    (run / "result.json").unlink()
    (run / "checkpoint-00004-000000.pt").unlink()
    resume = ["--resume", str(run)]
    assert train.main([*resume, "--accumulate", "1", "--no-graph", "--event-mib", "2"]) == 0
    resumed = json.loads((run / "result.json").read_text())
    assert resumed["test_loss"] == pytest.approx(result["test_loss"], rel=1e-4)
    assert train.main([*resume, "--lr", "1"]) == 2
    assert "remove --lr" in capsys.readouterr().err


def test_want_of_memory_is_one_line_with_what_may_help(files, capsys):
    def limited(called, inputs):
        if isinstance(called, SpikingClassifier) and called.training and inputs[0].shape[1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = module.register_module_forward_pre_hook(limited)
    try:
        assert train.main([*files, *SMALL, "--epochs", "2"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: out of memory: a step of 8 samples at once did not fit cpu")
        assert "--accumulate K" in line
        run = only_run(files[-1])
        assert train.main(["--resume", str(run), "--accumulate", "4"]) == 0
    finally:
        handle.remove()


def test_a_result_is_written_before_the_device_is_measured(files, monkeypatch, capsys):
    def full(device):
        assert list(Path(files[-1]).rglob("result.json"))
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(run_module, "ceilings", full)
    _, result = trained(files)
    assert result["ceilings"] is None and result["fraction_of_floor"] is None
    assert "no share of the floor: no memory to measure cpu with" in capsys.readouterr().out


def test_deterministic_runs_fill_no_buffers(files):
    # a process of its own: the choice is torch's, for the whole process
    code = (
        "import sys, torch; from gpn_triton import train; assert train.main(sys.argv[1:]) == 0; "
        "assert torch.are_deterministic_algorithms_enabled(); "
        "assert not torch.utils.deterministic.fill_uninitialized_memory"
    )
    command = [sys.executable, "-c", code, *files, *SMALL, "--epochs", "1", "--deterministic"]
    subprocess.run(command, cwd=ROOT, env=THREADS, check=True, stdout=subprocess.DEVNULL)
