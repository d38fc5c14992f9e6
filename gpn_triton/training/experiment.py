"""What a configuration asks for, from its data to its summary: one run a seed, or their test."""

import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from gpn_triton.data.datasets import DataSource, Splits, load_splits
from gpn_triton.data.feed import make_feed
from gpn_triton.machine.device import choose_device, thread_slowdown, unavailable
from gpn_triton.machine.distributed import World
from gpn_triton.neurons.gpn import compiles_first
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training import run_folder
from gpn_triton.training.build import amp_dtype, build_network
from gpn_triton.training.engine import Engine
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.run import Interrupted, Run
from gpn_triton.training.trackers import check_trackers

# threads that slow a product down so much wait for other work
WAITING = 2.0


def run_experiment(cfg: TrainConfig) -> None:
    """Train with every seed of a configuration, or evaluate what was trained; prints what it does.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C, with everything needed to go on saved.
        ValueError, OSError, MemoryError, NonFiniteError: one line says what is wrong.
    """
    device = choose_device(cfg.device)
    if not cfg.eval_only:
        check_trackers(cfg.track)
    is_gpn, example = NEURONS[cfg.neuron].is_gpn, torch.empty(1, device=device)
    if is_gpn and (reason := unavailable(cfg.backend, example)):
        raise ValueError(f"backend: {cfg.backend} cannot run: {reason}")
    if cfg.deterministic:
        # cuBLAS asks for this to be deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    source = DataSource(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(DataSource)})
    # split with the same seed whatever the training seed, so that seeds compare like with like
    splits = load_splits(source)
    with World.join(device) as world:
        world.say(f"{splits.description}\n{splits.train.summary()}")
        threads = torch.get_num_threads()
        asks = world.is_writer and device.type == "cpu" and threads > 1
        if asks and (slowdown := thread_slowdown()) > WAITING:
            world.say(
                f"warning: {threads} threads take {slowdown:.1f} times as long as one for a small "
                "product, since other work holds the cores: OMP_NUM_THREADS=1 would be faster"
            )
        if cfg.amp and not amp_dtype(cfg, device):
            world.say(
                f"--amp {cfg.amp}: this CPU has no arithmetic for it and would emulate it, several "
                "times as slow: computing in float32"
            )
        if is_gpn and compiles_first(cfg.backend, example):
            world.say("the first step compiles the kernels for this CPU, once: some 10 s")
        if cfg.eval_only:
            evaluate_run(cfg, Path(cfg.eval_only), splits, device, world)
            return
        shift = cfg.channel_shift and f"shifted by up to {cfg.channel_shift} channels"
        world.say(f"training samples are {shift or 'not shifted'} (--channel-shift)")
        made = str(run_folder.make_run_folder(cfg)) if world.is_writer and not cfg.resume else None
        run = Path(cfg.resume or world.share(made))
        try:
            results = train_seeds(cfg, run, splits, device, world)
        except Interrupted as stop:
            world.say(f"{stop}; go on with --resume {run}")
            raise
        except BaseException as error:
            removed = made and run_folder.remove_unused(run)
            if isinstance(error, KeyboardInterrupt) and not removed:
                raise KeyboardInterrupt(run_folder.how_to_go_on(run)) from None
            raise
        world.say(_summary(cfg, results, run))


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
        world.say(f"test accuracy {100 * found.accuracy:.2f} %  loss {found.loss:.4f}  {folder}")


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
    for seed, folder in zip(cfg.seed, folders, strict=True):
        path = folder / run_folder.RESULT
        if path.exists():
            world.say(f"{folder} is finished")
            try:
                results.append(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ValueError(f"resume: {path} cannot be read: {error}") from None
            continue
        if several:
            world.say(f"seed {seed}")
        results.append(Run(cfg, seed, folder, splits, device, world).train())
        if several:
            world.say(f"test accuracy {100 * results[-1]['test_accuracy']:.2f} %  {folder}")
    if several and world.is_writer:
        accuracies = [result["test_accuracy"] for result in results]
        summary = {
            "test_accuracy": statistics.mean(accuracies),
            "test_accuracy_deviation": statistics.stdev(accuracies),
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


def _summary(cfg: TrainConfig, results: list[dict[str, Any]], run: Path) -> str:
    """One line to paste into an appendix."""
    accuracies = [100 * result["test_accuracy"] for result in results]
    spread = f" +- {statistics.stdev(accuracies):.2f}" if len(results) > 1 else ""
    last = results[-1]
    return (
        f"{cfg.neuron} {'-'.join(map(str, cfg.hidden))}, T={cfg.time_bins}: test accuracy "
        f"{statistics.mean(accuracies):.2f}{spread} % ({len(results)} seed"
        f"{'s' * (len(results) > 1)}), {last['parameters']} parameters, "
        f"{sum(r['seconds'] for r in results):.0f} s on {last['processes']} x {last['device']}, "
        f"commit {(last['commit'] or 'unknown')[:12]}, {run}"
    )
