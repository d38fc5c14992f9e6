"""What a configuration asks for, from its data to its summary: one run a seed, or their test."""

import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from gpn_triton.data.datasets import DataSource, Splits, load_splits
from gpn_triton.data.feed import make_feed
from gpn_triton.machine.command import Interrupted
from gpn_triton.machine.device import thread_slowdown, unavailable
from gpn_triton.machine.distributed import World, own_device, restarted
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training import run_folder
from gpn_triton.training.build import amp_dtype, build_network
from gpn_triton.training.engine import Engine
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.progress import aligned
from gpn_triton.training.run import Run
from gpn_triton.training.trackers import check_trackers

# threads that slow a product down so much wait for other work
WAITING = 2.0


def run_experiment(cfg: TrainConfig) -> None:
    """Train with every seed of a configuration, or evaluate what was trained; prints what it does.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C, with everything needed to go on saved.
        ValueError, OSError, MemoryError, NonFiniteError: one line says what is wrong.
    """
    device = ready_device(cfg)
    source = DataSource(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(DataSource)})
    # split with the same seed whatever the training seed, so that seeds compare like with like
    splits = load_splits(source)
    with World.join(device, cfg.quiet) as world:
        world.say(f"{splits.description}\n{splits.train.summary()}")
        advise(cfg, device, world)
        if cfg.eval_only:
            evaluate_run(cfg, Path(cfg.eval_only), splits, device, world)
            return
        shift = cfg.channel_shift and f"shifted by up to {cfg.channel_shift} channels"
        world.say(f"training samples are {shift or 'not shifted'} (--channel-shift)")
        made = str(_begin(cfg)) if world.is_writer and not cfg.resume else None
        run = Path(cfg.resume or world.share(made))
        try:
            results = train_seeds(cfg, run, splits, device, world)
        except Interrupted as stop:
            world.say(f"{stop}; go on with --resume {run}", matters=True)
            raise
        except BaseException as error:
            removed = made and run_folder.remove_unused(run)
            if isinstance(error, KeyboardInterrupt) and not removed:
                raise KeyboardInterrupt(run_folder.how_to_go_on(run)) from None
            raise
        if len(results) > 1:
            world.say(_table(results, splits.learns_number), matters=True)
        world.say(_summary(cfg, results, run, splits.learns_number), matters=True)


def ready_device(cfg: TrainConfig) -> torch.device:
    """This process's device, with torch set as a configuration asks.

    Raises:
        ValueError: no such device, or the backend or a tracker is not there.
    """
    device = own_device(cfg.device)
    if not cfg.eval_only:
        check_trackers(cfg.track)
    row = NEURONS[cfg.neuron]
    backend, example = row.backend(cfg.backend), torch.empty(1, device=device)
    if row.compiles_first and (reason := unavailable(backend, example)):
        raise ValueError(f"backend: {cfg.backend} cannot run: {reason}")
    if cfg.deterministic:
        # cuBLAS asks for this to be deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # else torch fills every buffer that nobody has written yet, some of them at every step
        torch.utils.deterministic.fill_uninitialized_memory = False
    return device


def advise(cfg: TrainConfig, device: torch.device, world: World) -> None:
    """Say what makes a configuration slower on this machine than one expects."""
    row, example = NEURONS[cfg.neuron], torch.empty(1, device=device)
    backend = row.backend(cfg.backend)
    threads = torch.get_num_threads()
    asks = world.is_writer and device.type == "cpu" and threads > 1
    if asks and (slowdown := thread_slowdown()) > WAITING:
        world.say(
            f"warning: {threads} threads take {slowdown:.1f} times as long as one for a small "
            "product, since other work holds the cores: OMP_NUM_THREADS=1 would be faster",
            matters=True,
        )
    if cfg.amp and not amp_dtype(cfg, device):
        world.say(
            f"--amp {cfg.amp}: this CPU has no arithmetic for it and would emulate it, several "
            "times as slow: computing in float32",
            matters=True,
        )
    if row.compiles_first and row.compiles_first(backend, example):
        world.say("the first step compiles the kernels for this CPU, once: some 10 s")


def _begin(cfg: TrainConfig) -> Path:
    """A new run's folder; where torchrun has started again what failed, the unfinished one's."""
    there = run_folder.unfinished_like(cfg) if restarted() else None
    return there or run_folder.make_run_folder(cfg)


def evaluate_run(
    cfg: TrainConfig, run: Path, splits: Splits, device: torch.device, world: World
) -> None:
    """Print the test accuracy of every seed's best weights."""
    test, decision = make_feed(splits.test, device, cfg.event_mib)
    world.say(f"test {decision}")
    for folder in run_folder.seed_folders(run, cfg.seed):
        model = build_network(cfg, splits).to(device)
        run_folder.load_weights(folder / run_folder.WEIGHTS, model)
        found = Engine(cfg, model, device, world).evaluate(test)
        line = f"test accuracy {100 * found.accuracy:.2f} %  loss {found.loss:.4f}  {folder}"
        world.say(line, matters=True)


def train_seeds(
    cfg: TrainConfig, run: Path, splits: Splits, device: torch.device, world: World
) -> list[dict[str, Any]]:
    """Train with every seed that is not finished; the results of all, also in result.json."""
    folders = run_folder.seed_folders(run, cfg.seed)
    several = len(folders) > 1
    if world.is_writer:
        if cfg.resume:
            _take_test_file(cfg, run, folders)
        for folder in folders:
            folder.mkdir(exist_ok=True)
    world.barrier()
    results = []
    for place, (seed, folder) in enumerate(zip(cfg.seed, folders, strict=True), 1):
        if (finished := run_folder.read_result(folder, "resume")) is not None:
            world.say(f"{folder} is finished")
            results.append(finished)
            continue
        if several:
            world.say(f"seed {seed}")
        later = sum(not (f / run_folder.RESULT).exists() for f in folders[place:])
        results.append(Run(cfg, seed, folder, splits, device, world, later).train())
        if several:
            world.say(f"{_outcome(results[-1:], splits.learns_number)}  {folder}")
    if several and world.is_writer:
        accuracies = [result["test_accuracy"] for result in results]
        summary = {
            "test_accuracy": statistics.mean(accuracies),
            "test_accuracy_deviation": statistics.stdev(accuracies),
            "test_loss": statistics.mean(result["test_loss"] for result in results),
            "seeds": [result["seed"] for result in results],
            "results": results,
        }
        run_folder.write_json(run / run_folder.RESULT, summary)
    return results


def _take_test_file(cfg: TrainConfig, run: Path, folders: list[Path]) -> None:
    """Note in a resumed run's options the test file it was given; ValueError once it was tested."""
    there = run_folder.read_options(run, "resume")
    if cfg.test_file == there["test_file"]:
        return
    for folder in folders:
        if (folder / run_folder.RESULT).exists():
            raise ValueError(
                f"test_file: {folder} was tested already, with {there['test_file']}: "
                "--eval-only may be given another file"
            )
    run_folder.write_json(run / run_folder.CONFIG, {**there, "test_file": cfg.test_file})


def _outcome(results: list[dict[str, Any]], learns_number: bool) -> str:
    """The test's accuracy, or its mean squared error, over seeds."""

    def mean(name: str, digits: int, factor: float = 1) -> str:
        values = [factor * result[name] for result in results]
        spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    if learns_number:
        return f"test squared error {mean('test_loss', 5)}"
    return f"test accuracy {mean('test_accuracy', 2, 100)} %"


def _table(results: list[dict[str, Any]], learns_number: bool) -> str:
    """A line a seed, and their means, those of what was measured with deviations."""
    columns = [
        ("test loss", "test_loss", 1, 4), ("valid %", "valid_accuracy", 100, 2),
        ("best epoch", "best_epoch", 1, 0), ("seconds", "seconds", 1, 0),
    ]  # fmt: skip
    if not learns_number:
        columns.insert(0, ("test %", "test_accuracy", 100, 2))
    rows = [["seed", *(title for title, *_ in columns)]]
    for result in results:
        cells = (f"{factor * result[name]:.{digits}f}" for _, name, factor, digits in columns)
        rows.append([str(result["seed"]), *cells])
    last = ["mean"]
    for _, name, factor, digits in columns:
        values = [factor * result[name] for result in results]
        spread = f" +- {statistics.stdev(values):.{digits}f}" if digits else ""
        last.append(f"{statistics.mean(values):.{digits}f}{spread}")
    return aligned([*rows, last])


def _summary(
    cfg: TrainConfig, results: list[dict[str, Any]], run: Path, learns_number: bool
) -> str:
    """One line to paste into an appendix."""
    last = results[-1]
    return (
        f"{cfg.neuron} {'-'.join(map(str, cfg.hidden))}, T={cfg.time_bins}: "
        f"{_outcome(results, learns_number)} ({len(results)} seed"
        f"{'s' * (len(results) > 1)}), {last['parameters']} parameters, "
        f"{sum(r['seconds'] for r in results):.0f} s on {last['processes']} x {last['device']}, "
        f"commit {(last['commit'] or 'unknown')[:12]}, {run}"
    )
