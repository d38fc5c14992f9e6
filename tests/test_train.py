"""The training command: what a run leaves, resuming bit for bit, and a line for a mistake."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpn_triton import build, cost, engine, run_folder, train
from gpn_triton import device as machine
from gpn_triton.data import binning
from gpn_triton.data.datasets import DataSource, load_splits
from gpn_triton.data.events import DeviceEvents, EventStore
from gpn_triton.data.feed import Feed
from gpn_triton.data.hdf5 import write_events
from gpn_triton.model import NEURONS
from gpn_triton.options import TrainConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = ["--hidden", "8", "--time-bins", "6", "--batch-size", "8", "--device", "cpu"]


def store(samples, seed, classes=2):
    """Samples whose class is the channel range that fires; 20 events each."""
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    units = rng.integers(0, 100, (samples, 20)) + 200 * labels[:, None]
    return EventStore(
        times=np.sort(rng.random((samples, 20), dtype=np.float32), 1).ravel(),
        units=units.astype(np.uint16).ravel(),
        offsets=np.arange(samples + 1) * 20,
        labels=labels,
        speakers=(np.arange(samples) // classes % 4).astype(np.int32),
        num_channels=700,
        class_names=tuple(map(str, range(classes))),
    )


@pytest.fixture
def files(tmp_path):
    """Flags for a small training and test file."""
    flags = []
    for part, samples in (("train", 48), ("test", 16)):
        write_events(tmp_path / f"{part}.h5", store(samples, len(part)))
        flags += [f"--{part}-file", str(tmp_path / f"{part}.h5")]
    return [*flags, "--out", str(tmp_path / "runs")]


def only_run(out):
    (run,) = Path(out).iterdir()
    return run


def test_a_run_learns_and_leaves_its_files(files, capsys):
    assert train.main([*files, *SMALL, "--epochs", "12", "--lr", "0.02", "--seed", "3"]) == 0
    run = only_run(files[-1])
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert result["test_accuracy"] >= 0.9
    assert result["valid_accuracy"] == max(line["valid_accuracy"] for line in lines[1:])
    assert result["parameters"] == 700 * 8 + 8 + 2 * 32 * 8 + 32 + 8 * 2 + 2
    assert result["epochs"] == 12 == len(lines) - 1 and result["seed"] == 3
    assert result["samples_per_second"] > 0 and result["peak_memory_mib"] > 0
    assert lines[0]["config"]["lr"] == 0.02 and lines[0]["versions"]["torch"] == torch.__version__
    assert lines[-1]["train_loss"] < lines[1]["train_loss"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert set(load_file(run / "best.safetensors")) >= {"neurons.0.weight_v", "output.weight"}
    printed = capsys.readouterr().out.splitlines()
    assert f"test accuracy {100 * result['test_accuracy']:.2f} % (1 seed)" in printed[-1]
    assert printed[-1].endswith(str(run))


def test_the_test_file_is_read_after_the_last_epoch_only(files, monkeypatch):
    read = []
    evaluate = engine.Engine.evaluate

    def spy(self, events):
        read.append(len(events))
        return evaluate(self, events)

    monkeypatch.setattr(engine.Engine, "evaluate", spy)
    assert train.main([*files, *SMALL, "--epochs", "3"]) == 0
    assert read == [4, 4, 4, 16]


def test_several_seeds_give_mean_and_deviation(files, capsys):
    assert train.main([*files, *SMALL, "--epochs", "2", "--seed", "1", "2"]) == 0
    run = only_run(files[-1])
    summary = json.loads((run / "result.json").read_text())
    accuracies = [r["test_accuracy"] for r in summary["results"]]
    assert summary["seeds"] == [1, 2]
    assert summary["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["test_accuracy_deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    assert (run / "seed-2" / "best.safetensors").exists()
    mean, deviation = (100 * summary[f"test_accuracy{x}"] for x in ("", "_deviation"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"test accuracy {mean:.2f} +- {deviation:.2f} % (2 seeds)" in last


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(files):
    weights = []
    for seed in ("1", "1", "2"):
        out = Path(files[-1] + str(len(weights)))
        assert train.main([*files[:-1], str(out), *SMALL, "--epochs", "2", "--seed", seed]) == 0
        weights.append(load_file(only_run(out) / "best.safetensors")["output.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_eval_only_repeats_the_runs_test_accuracy(files, capsys):
    assert train.main([*files, *SMALL, "--epochs", "3"]) == 0
    run = only_run(files[-1])
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir())
    accuracy = json.loads((run / "result.json").read_text())["test_accuracy"]
    assert train.main(["--eval-only", str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"test accuracy {100 * accuracy:.2f} %")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir()) == before


def test_event_driven_input_gives_the_losses_of_the_dense_one(files, monkeypatch, tmp_path):
    # 20 events a sample in 6 bins of 700 channels: far below the density where it is chosen
    bin_cells, calls, lines = binning.bin_cells, [], []
    monkeypatch.setattr(binning, "bin_cells", lambda *a: calls.append(a) or bin_cells(*a))
    for name in ("sparse", "dense"):
        calls.clear()
        assert train.main([*files[:-1], str(tmp_path / name), *SMALL, "--epochs", "3"]) == 0
        assert bool(calls) == (name == "sparse")
        metrics = only_run(tmp_path / name) / "metrics.jsonl"
        lines.append(metrics.read_text().splitlines()[1:])
        monkeypatch.setattr(binning, "prefers_cells", lambda *_: False)
    for sparse, dense in zip(*lines, strict=True):
        for name in ("train_loss", "valid_loss"):
            assert json.loads(sparse)[name] == pytest.approx(json.loads(dense)[name], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ["--amp"],
        ["--amp", "fp16", "--clip-grad", "1"],
        ["--schedule", "plateau", "--neuron", "lif"],
        ["--warmup-epochs", "1", "--neuron", "lstm", "--hidden", "6", "5"],
        ["--channel-shift", "5", "--time-stretch", "0.1", "--event-drop", "0.1", "--noise", "0.1"],
        ["--readout", "last", "--checkpoint-every", "3", "--neuron", "gpn-no-i"],
        ["--binning", "authors", "--max-time", "1.0"],
        ["--channel-bin", "5", "--neuron", "cnn", "--overflow", "clip"],
    ],
    ids=" ".join,
)
def test_every_kind_of_option_trains(files, options):
    assert train.main([*files, *SMALL, "--epochs", "2", *options]) == 0
    result = json.loads((only_run(files[-1]) / "result.json").read_text())
    assert np.isfinite(result["test_loss"])


COMMAND = [sys.executable, "-m", "gpn_triton.train"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
LONGER = [*SMALL, "--epochs", "12", "--seed", "5", "--noise", "0.2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Flags for the data, and the run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    flags = []
    for part, samples in (("train", 400), ("test", 16)):
        write_events(folder / f"{part}.h5", store(samples, len(part)))
        flags += [f"--{part}-file", str(folder / f"{part}.h5")]
    out = ["--out", str(folder / "runs")]
    subprocess.run([*COMMAND, *flags, *out, *LONGER], check=True, cwd=ROOT, env=ONE_THREAD)
    return flags, only_run(out[1])


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_resumes_to_the_same_bits(uninterrupted, kill, tmp_path):
    flags, whole = uninterrupted
    out = ["--out", str(tmp_path / "runs")]
    broken = subprocess.Popen(
        [*COMMAND, *flags, *out, *LONGER],
        cwd=ROOT,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in broken.stdout:
        if line.startswith("epoch   4"):
            broken.send_signal(kill)
            break
    rest = broken.stdout.read()
    run = only_run(out[1])
    if kill == signal.SIGKILL:
        assert broken.wait() == -kill
    else:
        assert broken.wait() == 128 + kill
        assert f"go on with --resume {run}" in rest
    assert not (run / "result.json").exists()
    resume = [*COMMAND, "--resume", "auto", *out]
    resumed = subprocess.run(resume, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert resumed.returncode == 0 and "resumed from" in resumed.stdout

    expected, got = (load_file(r / "best.safetensors") for r in (whole, run))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    timing = ("seconds", "samples_per_second")
    metrics = [
        [
            {k: v for k, v in json.loads(line).items() if k not in timing}
            for line in (r / "metrics.jsonl").read_text().splitlines()[1:]
        ]
        for r in (whole, run)
    ]
    assert len(metrics[0]) == 12 and metrics[0] == metrics[1]


def test_a_finished_run_taken_up_again_is_left_as_it_is(files, capsys):
    assert train.main([*files, *SMALL, "--epochs", "2"]) == 0
    run = only_run(files[-1])
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir())
    assert train.main(["--resume", str(run)]) == 0
    assert sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir()) == before
    assert f"{run} is finished" in capsys.readouterr().out


def test_data_changed_since_the_checkpoint_are_refused(files, capsys):
    assert train.main([*files, *SMALL, "--epochs", "2"]) == 0
    run = only_run(files[-1])
    (run / "result.json").unlink()
    write_events(Path(files[1]), store(48, 99))
    assert train.main(["--resume", str(run)]) == 2
    assert "resume: the data have changed" in capsys.readouterr().err


def test_evaluation_does_not_depend_on_the_batch_size(files):
    splits = load_splits(DataSource(train_file=files[1], test_file=files[3]))
    losses = []
    for batch_size in (3, 8, 100):
        torch.manual_seed(0)
        cfg = TrainConfig(hidden=(8,), time_bins=6, batch_size=batch_size)
        net = engine.Engine(cfg, build.build_model(cfg, 700, 2), CPU)
        losses.append(net.evaluate(Feed(DeviceEvents(splits.valid))))
    for other in losses[1:]:
        assert other["loss"] == pytest.approx(losses[0]["loss"], rel=1e-5)
        assert other["accuracy"] == losses[0]["accuracy"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "mnist"], "dataset: expected synthetic, shd, ssc or a file ending in .h5"),
        (["--train-file", "none.h5"], "none.h5"),
        (["--hidden", "0"], "hidden: expected sizes of at least 1, got [0]"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:K, got 'tpu'"),
        (["--device", "cuda:99"], "device: cuda:99 is not here"),
        (["--dataset", "shd", "--data-dir", "nowhere"], "--download"),
        (["--resume", "nowhere"], "resume: nowhere is not a run folder"),
        (["--eval-only", "nowhere"], "eval_only: nowhere is not a run folder"),
        (["--resume", "auto", "--out", "nowhere"], "resume: no unfinished run under nowhere"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_users_mistake_is_one_line_and_a_status(argv, message, capsys):
    assert train.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_triton_asked_for_on_a_cpu_is_refused_by_the_command():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gpn_triton.train", "--backend", "triton", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: backend: triton cannot run: ")


def test_a_broken_weights_file_is_named(files, capsys):
    assert train.main([*files, *SMALL, "--epochs", "2"]) == 0
    run = only_run(files[-1])
    (run / "best.safetensors").write_bytes(b"junk")
    assert train.main(["--eval-only", str(run)]) == 2
    assert "best.safetensors does not fit this network" in capsys.readouterr().err


def test_gradients_that_are_not_finite_stop_the_run_and_are_named(files, monkeypatch, capsys):
    # an infinite input silences the neurons, so that the loss stays finite
    monkeypatch.setattr(binning, "prefers_cells", lambda *_: False)
    spoil(monkeypatch, engine, "batch_input", step=9)
    assert train.main([*files, *SMALL, "--epochs", "3"]) == 2
    error = capsys.readouterr().err
    assert "error: epoch 2, step 3: loss 0." in error
    assert "gradients not finite in inputs.0.weight" in error
    run = only_run(files[-1])
    assert f"last good checkpoint: {run}/checkpoint-00001-000000.pt" in error
    state, _ = run_folder.load_checkpoint(run)
    assert all(t.isfinite().all() for t in state["engine"]["model"].values())


@pytest.mark.parametrize("amp", [[], ["--amp", "fp16"]], ids=["float32", "fp16"])
def test_a_loss_that_is_not_finite_stops_the_run(files, monkeypatch, amp, capsys):
    spoil(monkeypatch, engine.F, "cross_entropy", step=9)
    assert train.main([*files, *SMALL, "--epochs", "3", *amp]) == 2
    assert "error: epoch 2, step 2: loss inf" in capsys.readouterr().err


def test_steps_that_are_not_finite_are_skipped_and_counted_when_asked(files, monkeypatch):
    monkeypatch.setattr(binning, "prefers_cells", lambda *_: False)
    spoil(monkeypatch, engine, "batch_input", step=9)
    assert train.main([*files, *SMALL, "--epochs", "3", "--skip-nonfinite"]) == 0
    run = only_run(files[-1])
    assert json.loads((run / "result.json").read_text())["skipped_steps"] == 1
    assert all(t.isfinite().all() for t in load_file(run / "best.safetensors").values())


def spoil(monkeypatch, owner, name, step):
    """Make what a function returns infinite, at the step-th call; evaluation counts, too."""
    function, calls = getattr(owner, name), iter(range(1, 10**6))

    def spoiled(*arguments, **options):
        result = function(*arguments, **options)
        # six training batches and one of validation an epoch; batch_input is not counted there
        if (name != "batch_input" or arguments[3] is not None) and next(calls) == step:
            return result + torch.inf
        return result

    monkeypatch.setattr(owner, name, spoiled)


def test_processes_together_compute_what_one_does_and_any_number_resumes(uninterrupted, tmp_path):
    flags, _ = uninterrupted
    options = [*SMALL, "--batch-size", "21", "--epochs", "2", "--lr", "0.01", "--clip-grad", "0.1"]

    def run_with(processes, *arguments):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        launch = [sys.executable, *torchrun, *port] if processes > 1 else [sys.executable]
        command = [*launch, "-m", "gpn_triton.train", *arguments]
        subprocess.run(command, cwd=ROOT, env=ONE_THREAD, check=True, timeout=900)

    def outcome(run):
        state, _ = run_folder.load_checkpoint(run)
        return state["engine"]["model"], json.loads((run / "result.json").read_text())

    outcomes = []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        run_with(processes, *flags, *options, "--out", str(out))
        outcomes.append(outcome(only_run(out)))
        assert outcomes[-1][1]["processes"] == processes
    # take three processes' run back to its first epoch and let two go on
    run_of_three = only_run(out)
    (run_of_three / "result.json").unlink()
    max(run_of_three.glob("checkpoint-*.pt")).unlink()
    run_with(2, "--resume", str(run_of_three))
    outcomes.append(outcome(run_of_three))

    (weights, result), *others = outcomes
    for other_weights, other in others:
        for name, expected in weights.items():
            torch.testing.assert_close(other_weights[name], expected, rtol=1e-3, atol=1e-5)
        assert other["test_loss"] == pytest.approx(result["test_loss"], rel=1e-4)
        assert other["valid_accuracy"] == result["valid_accuracy"]


def test_an_unwritable_folder_is_named(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert train.main(["--samples", "40", "--out", str(tmp_path / "runs")]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_one_line(files, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "save_checkpoint", full)
    assert train.main([*files, *SMALL, "--epochs", "2"]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_results_hold_throughput_and_the_share_of_the_floor(files):
    assert train.main([*files, *SMALL, "--epochs", "2"]) == 0
    result = json.loads((only_run(files[-1]) / "result.json").read_text())
    # 44 samples of 6 steps
    floor = cost.training_floor(
        NEURONS["gpn"].work, [8], 700, 2, 6, 44, None, machine.ceilings(CPU)
    )
    assert result["floor_seconds_per_epoch"] == pytest.approx(floor)
    assert result["fraction_of_floor"] == pytest.approx(floor / result["seconds_per_epoch"])
    assert result["samples_per_second"] == pytest.approx(44 / result["seconds_per_epoch"])
    assert "measured" in result["ceilings"]["source"]


def test_a_profile_is_printed_and_lies_in_the_runs_folder(files, capsys):
    assert train.main([*files, *SMALL, "--epochs", "3", "--profile", "4"]) == 0
    run = only_run(files[-1])
    text = (run / "profile.txt").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("4 training steps of ") and "gpn_triton::recurrence" in text
    assert "forward" in text and "data" in text
    trace = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))
    assert any("gpn_triton::recurrence" in e.get("name", "") for e in trace["traceEvents"])


def test_where_and_in_which_parts_may_change_on_resuming(files, capsys):
    whole = [*SMALL, "--epochs", "4"]
    assert train.main([*files[:-1], files[-1] + "-whole", *whole]) == 0
    expected = json.loads((only_run(files[-1] + "-whole") / "result.json").read_text())
    assert train.main([*files, *whole, "--accumulate", "3", "--event-mib", "1", "--no-graph"]) == 0
    run = only_run(files[-1])
    result = json.loads((run / "result.json").read_text())
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


def test_want_of_memory_is_one_line_with_what_fits(files, monkeypatch, capsys):
    forward = engine.Engine._forward

    def limited(self, model, events, indices, *rest):
        if self.model.training and len(indices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, model, events, indices, *rest)

    monkeypatch.setattr(engine.Engine, "_forward", limited)
    assert train.main([*files, *SMALL, "--epochs", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: a step of 8 samples at once; --accumulate 4")
    run = only_run(files[-1])
    assert train.main(["--resume", str(run), "--accumulate", "4"]) == 0
