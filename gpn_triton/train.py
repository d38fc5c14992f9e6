"""Train a spiking network on events, choose the best epoch by validation and test it once.

python -m gpn_triton.train --amp
python -m gpn_triton.train --amp --preset shd-small --download
python -m gpn_triton.train --train-file my_train.h5 --test-file my_test.h5 --seed 1 2 3
python -m gpn_triton.train --resume auto
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from gpn_triton import parser, run_folder
from gpn_triton.build import build_network
from gpn_triton.data.datasets import DataSource, Splits, load_splits
from gpn_triton.data.feed import make_feed
from gpn_triton.device import choose_device, is_out_of_memory, triton_unavailable
from gpn_triton.distributed import World
from gpn_triton.engine import Engine, NonFiniteError
from gpn_triton.model import NEURONS
from gpn_triton.options import TrainConfig
from gpn_triton.run import Run

# data are split with this seed whatever the training seed, so that seeds compare like with like
SPLIT_SEED = 0


def load_data(cfg: TrainConfig) -> Splits:
    """The configuration's data, split; the test file is not read yet."""
    source = DataSource(
        dataset=cfg.dataset,
        train_file=cfg.train_file,
        valid_file=cfg.valid_file,
        test_file=cfg.test_file,
        samples=cfg.samples,
        classes=cfg.classes,
        valid_split=cfg.valid_split,
        valid_fraction=cfg.valid_fraction,
        data_dir=cfg.data_dir,
        cache_dir=cfg.cache_dir,
        download=cfg.download,
    )
    return load_splits(source, SPLIT_SEED)


def evaluate_run(cfg: TrainConfig, runs: list[Path], splits: Splits, device: torch.device) -> None:
    """Print the test accuracy of finished runs' best weights."""
    test, decision = make_feed(splits.test, device, cfg.event_mib)
    print(f"test {decision}")
    for run in runs:
        model = build_network(cfg, splits).to(device)
        run_folder.load_weights(run / "best.safetensors", model)
        result = Engine(cfg, model, device).evaluate(test)
        print(f"test accuracy {100 * result['accuracy']:.2f} %  loss {result['loss']:.4f}  {run}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        return _main(parser.parse(argv))
    except (ValueError, OSError, MemoryError, NonFiniteError) as error:
        # a user's mistake or the machine's, named where it was found
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except RuntimeError as error:
        # where memory does not suffice before or after the training
        if not is_out_of_memory(error):
            raise
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2


def _main(cfg: TrainConfig) -> int:
    device = choose_device(cfg.device)
    if cfg.backend == "triton" and NEURONS[cfg.neuron].is_gpn:
        reason = triton_unavailable(torch.empty(1, device=device))
        if reason:
            raise ValueError(f"backend: triton cannot run: {reason}")
    if cfg.deterministic:
        # what cuBLAS asks for to be deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    splits = load_data(cfg)
    world = World(device)
    say = print if world.is_writer else lambda *_: None
    taken_up = cfg.eval_only or cfg.resume
    run = taken_up or world.share(str(run_folder.make_run_folder(cfg)) if world.is_writer else None)
    runs = run_folder.seed_folders(run, cfg.seed)
    say(f"{splits.description}\n{splits.train.summary()}")
    if cfg.eval_only:
        evaluate_run(cfg, runs, splits, device)
        return 0
    if world.is_writer:
        if not cfg.resume:
            run_folder.write_json(Path(run, "config.json"), cfg.to_dict())
        for folder in runs:
            folder.mkdir(exist_ok=True)
    world.barrier()

    results = []
    for seed, folder in zip(cfg.seed, runs, strict=True):
        if (folder / "result.json").exists():
            say(f"{folder} is finished")
            results.append(json.loads((folder / "result.json").read_text()))
            continue
        if len(runs) > 1:
            say(f"seed {seed}")
        results.append(Run(cfg, seed, folder, splits, device, world).train())
        if len(runs) > 1:
            say(f"test accuracy {100 * results[-1]['test_accuracy']:.2f} %  {folder}")
    accuracies = [result["test_accuracy"] for result in results]
    if len(results) > 1 and world.is_writer:
        summary = {
            "test_accuracy": statistics.mean(accuracies),
            "test_accuracy_deviation": statistics.stdev(accuracies),
            "seeds": [result["seed"] for result in results],
            "results": results,
        }
        run_folder.write_json(Path(run, "result.json"), summary)
    say(_summary(cfg, results, run))
    world.close()
    return 0


def _summary(cfg: TrainConfig, results: list[dict[str, Any]], run: str) -> str:
    """One line to paste into an appendix."""
    accuracies = [100 * result["test_accuracy"] for result in results]
    spread = ""
    if len(results) > 1:
        spread = f" +- {statistics.stdev(accuracies):.2f}"
    last = results[-1]
    return (
        f"{cfg.neuron} {'-'.join(map(str, cfg.hidden))}, T={cfg.time_bins}: test accuracy "
        f"{statistics.mean(accuracies):.2f}{spread} % ({len(results)} seed"
        f"{'s' * (len(results) > 1)}), {last['parameters']} parameters, "
        f"{sum(r['seconds'] for r in results):.0f} s on {last['processes']} x {last['device']}, "
        f"commit {(last['commit'] or 'unknown')[:12]}, {run}"
    )


if __name__ == "__main__":
    sys.exit(main())
