"""Train a spiking network on events, choose the best epoch by validation and test it once.

python -m gpn_triton.train --amp
python -m gpn_triton.train --amp --preset shd-small --download
python -m gpn_triton.train --train-file my_train.h5 --test-file my_test.h5 --seed 1 2 3
python -m gpn_triton.train --resume auto
"""

from __future__ import annotations

import json
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import gpn_triton
from gpn_triton import checkpoint, config, ops
from gpn_triton.config import TrainConfig
from gpn_triton.curves import draw_curves
from gpn_triton.data import (
    Augmentation,
    BinningConfig,
    DeviceEvents,
    Splits,
    bin_batch,
    load_splits,
)
from gpn_triton.model import SpikingClassifier

# data are split with this seed whatever the training seed, so that seeds compare like with like
SPLIT_SEED = 0
LOG_SECONDS = 0.5


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is the first CUDA GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:K, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:K, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not here: {torch.cuda.device_count()} CUDA GPUs found")
    return device


def provenance(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: commit, versions, device, command."""
    root = Path(__file__).resolve().parent.parent
    commit = None
    if (root / ".git").exists():
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
        if head.returncode == 0:
            commit = head.stdout.strip() + ("-dirty" if dirty.stdout else "")
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = None
    cuda = device.type == "cuda"
    return {
        "commit": commit,
        "versions": {
            "gpn_triton": gpn_triton.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton_version,
            "cuda": torch.version.cuda if cuda else None,
        },
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def build_model(cfg: TrainConfig, channels: int, classes: int) -> SpikingClassifier:
    """The network a configuration asks for, for so many input channels and classes."""
    return SpikingClassifier(
        cfg.hidden,
        cfg.neuron,
        channels,
        classes,
        cfg.dropout,
        cfg.readout,
        cfg.time_bins,
        cfg.surrogate,
        cfg.alpha,
        cfg.backend,
        cfg.checkpoint_every,
    )


def build_schedule(cfg: TrainConfig, optimizer: torch.optim.Optimizer):
    """The learning rate by epoch, stepped once an epoch."""
    lr = torch.optim.lr_scheduler
    if cfg.schedule == "plateau":
        return lr.ReduceLROnPlateau(optimizer, factor=0.75, patience=3)
    warm = cfg.warmup_epochs
    if cfg.schedule == "cosine":
        main = lr.CosineAnnealingLR(optimizer, cfg.epochs - warm)
    else:
        main = lr.ConstantLR(optimizer, 1.0)
    if not warm:
        return main
    return lr.SequentialLR(
        optimizer, [lr.LinearLR(optimizer, 1 / (warm + 1), 1.0, warm), main], [warm]
    )


class Engine:
    """A network and what turns batches of sample numbers into its updates.

    Args:
        cfg: the configuration. model: on `device` already. device: where everything happens.
    """

    def __init__(self, cfg: TrainConfig, model: SpikingClassifier, device: torch.device):
        self.cfg, self.model, self.device = cfg, model, device
        self.amp = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.amp]
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True
        )
        self.schedule = build_schedule(cfg, self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
        self.binning = BinningConfig(
            time_bins=cfg.time_bins,
            max_time=cfg.max_time,
            channel_bin=cfg.channel_bin,
            overflow=cfg.overflow,
            style=cfg.binning,
            dtype=self.amp or torch.float32,
        )
        augmentation = Augmentation(
            channel_shift=cfg.channel_shift,
            time_stretch=cfg.time_stretch,
            time_jitter=cfg.time_jitter,
            drop=cfg.event_drop,
            noise=cfg.noise,
        )
        self.augmentation = augmentation if augmentation != Augmentation() else None

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and [loss * n, correct, n, activity * n ...] for the running totals."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits, activity = self.model(x)
        loss = F.cross_entropy(logits.float(), labels)
        n = len(labels)
        correct = (logits.argmax(1) == labels).sum()
        totals = torch.stack([loss.detach() * n, correct, torch.full_like(correct, n)])
        return loss, torch.cat([totals, activity * n])

    def train_step(self, events: DeviceEvents, indices: Tensor, key: Tensor) -> Tensor:
        """Update the network on one batch; returns its totals."""
        x = bin_batch(events, indices, self.binning, self.augmentation, key)
        loss, totals = self.forward(x, events.labels[indices])
        self.scaler.scale(loss).backward()
        if self.cfg.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return totals

    @torch.no_grad()
    def evaluate(self, events: DeviceEvents) -> dict[str, Any]:
        """Loss, accuracy and activity on a whole set, without dropout, noise or augmentation."""
        self.model.eval()
        totals = 0
        for indices in torch.arange(len(events), device=self.device).split(self.cfg.batch_size):
            x = bin_batch(events, indices, self.binning)
            totals = totals + self.forward(x, events.labels[indices])[1].double()
        self.model.train()
        return _means(totals)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while training, random states included."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device)
            if self.device.type == "cuda"
            else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def _means(totals: Tensor) -> dict[str, Any]:
    """Totals of Engine.forward as loss, accuracy and activity a sample."""
    loss, correct, n, *activity = totals.tolist()
    return {"loss": loss / n, "accuracy": correct / n, "activity": [a / n for a in activity]}


class Interruption:
    """Notes SIGTERM and Ctrl-C so that a step can be finished first; a second Ctrl-C stops."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def train(cfg: TrainConfig, seed: int, run: Path, splits: Splits, device: torch.device) -> dict:
    """Train one network and test it; writes the run's files into `run` and returns its result.

    Args:
        cfg: the configuration. seed: of the weights, the order and every random draw.
        run: an existing folder; where it holds checkpoints, training goes on from the newest.
        splits: the data. device: where to train.
    Returns:
        The contents of result.json.
    Raises:
        SystemExit: after SIGTERM or Ctrl-C, with everything needed to go on saved.
    """
    torch.manual_seed(seed)
    classes = len(splits.train.class_names)
    channels = -(-splits.train.num_channels // cfg.channel_bin)
    model = build_model(cfg, channels, classes).to(device)
    engine = Engine(cfg, model, device)
    parameters = sum(p.numel() for p in model.parameters())
    train_events = DeviceEvents(splits.train, device)
    valid_events = DeviceEvents(splits.valid, device)
    fingerprint = f"{splits.train.fingerprint()}-{splits.valid.fingerprint()}"
    progress = {
        "epoch": 0,
        "step": 0,
        "best_accuracy": -1.0,
        "best_loss": 0.0,
        "best_epoch": 0,
        "seconds": 0.0,
    }
    totals = torch.zeros(3 + len(cfg.hidden), dtype=torch.float64, device=device)
    epochs: list[dict[str, Any]] = []

    metrics = run / "metrics.jsonl"
    found = checkpoint.load_checkpoint(run)
    if found:
        state, path = found
        if state["fingerprint"] != fingerprint:
            raise ValueError(f"resume: the data have changed since {path} was written")
        engine.load_state_dict(state["engine"])
        progress, totals = state["progress"], state["totals"].to(device)
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        header, epochs = lines[0], lines[1 : 1 + progress["epoch"]]
        print(f"resumed from {path}")
    else:
        header = {"config": {**cfg.to_dict(), "seed": seed}, **provenance(device)}
    _write_lines(metrics, [header, *epochs])

    def save() -> Path:
        state = {
            "engine": engine.state_dict(),
            "progress": progress,
            "totals": totals.cpu(),
            "fingerprint": fingerprint,
        }
        return checkpoint.save_checkpoint(run, state, progress["epoch"], progress["step"])

    model.train()
    with Interruption() as interruption:
        for epoch in range(progress["epoch"], cfg.epochs):
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(train_events), generator=generator, device=device)
            batches = order.split(cfg.batch_size)
            key = torch.tensor([seed, epoch], device=device)
            lr = engine.optimizer.param_groups[0]["lr"]
            started, shown = time.perf_counter(), 0.0
            bar = tqdm(
                total=len(order), initial=progress["step"] * cfg.batch_size, unit=" samples",
                desc=f"epoch {epoch + 1}/{cfg.epochs}", leave=False, disable=None,
            )  # fmt: skip
            for indices in batches[progress["step"] :]:
                totals += engine.train_step(train_events, indices, key)
                progress["step"] += 1
                bar.update(len(indices))
                if not bar.disable and time.perf_counter() - shown > LOG_SECONDS:
                    # reading the totals waits for the device, so it is done rarely
                    bar.set_postfix_str(_describe(_means(totals)))
                    shown = time.perf_counter()
                if interruption.signal is not None:
                    bar.close()
                    progress["seconds"] += time.perf_counter() - started
                    print(f"interrupted: saved {save()}; go on with --resume {run}")
                    raise SystemExit(128 + interruption.signal)
            means = _means(totals)
            seconds = progress["seconds"] + time.perf_counter() - started
            bar.close()

            valid = engine.evaluate(valid_events)
            if cfg.schedule == "plateau":
                engine.schedule.step(means["loss"])
            else:
                engine.schedule.step()
            line = {
                "epoch": epoch + 1,
                "train_loss": means["loss"],
                "train_accuracy": means["accuracy"],
                "valid_loss": valid["loss"],
                "valid_accuracy": valid["accuracy"],
                "activity": means["activity"],
                "lr": lr,
                "seconds": seconds,
                "samples_per_second": len(order) / seconds,
            }
            epochs.append(line)
            # of equal accuracies, the lower loss
            best = (progress["best_accuracy"], -progress["best_loss"])
            if (valid["accuracy"], -valid["loss"]) > best:
                checkpoint.save_weights(run / "best.safetensors", model)
                progress |= {f"best_{key}": valid[key] for key in ("accuracy", "loss")}
                progress |= {"best_epoch": epoch + 1}
            progress |= {"epoch": epoch + 1, "step": 0, "seconds": 0.0}
            totals.zero_()
            with metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
            save()
            print(
                f"epoch {epoch + 1:3d}/{cfg.epochs}  {_describe(means)}  "
                f"valid {100 * valid['accuracy']:.1f} %  {line['samples_per_second']:.0f} samples/s"
            )

    checkpoint.load_weights(run / "best.safetensors", model)
    # the test set is read here for the first and only time
    test = engine.evaluate(DeviceEvents(splits.test, device))
    result = {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "valid_accuracy": progress["best_accuracy"],
        "best_epoch": progress["best_epoch"],
        "epochs": cfg.epochs,
        "parameters": parameters,
        "activity": test["activity"],
        "samples_per_second": statistics.median(line["samples_per_second"] for line in epochs),
        "seconds_per_epoch": statistics.median(line["seconds"] for line in epochs),
        "peak_memory_mib": _peak_memory_mib(device),
        "seed": seed,
        "device": header["device"],
        "commit": header["commit"],
    }
    _draw(run, epochs, f"{cfg.neuron} {'-'.join(map(str, cfg.hidden))} on {splits.description}")
    checkpoint.write_json(run / "result.json", result)
    return result


def _describe(means: dict[str, Any]) -> str:
    rates = " ".join(f"{a:.3f}" for a in means["activity"])
    return f"loss {means['loss']:.3f}  train {100 * means['accuracy']:.1f} %  rate {rates}"


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _draw(run: Path, epochs: list[dict[str, Any]], title: str) -> None:
    try:
        draw_curves(run / "curves.png", epochs, title)
    except ModuleNotFoundError:
        print("curves.png not drawn: matplotlib is missing (pip install 'gpn-triton[plot]')")


def make_run_folder(cfg: TrainConfig) -> Path:
    """A new folder under cfg.out, named after the time, the data and the neuron."""
    data = Path(cfg.train_file or cfg.dataset).stem
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{data}-{cfg.neuron}"
    for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
        run = Path(cfg.out, name + suffix)
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            if not Path(cfg.out).is_dir():
                raise ValueError(f"out: expected a folder, {cfg.out} is a file") from None
    raise ValueError(f"out: no free name for a run in {cfg.out}")


def load_data(cfg: TrainConfig) -> Splits:
    """The configuration's data, split; the test file is not read yet."""
    return load_splits(
        dataset=cfg.dataset,
        train_file=cfg.train_file,
        valid_file=cfg.valid_file,
        test_file=cfg.test_file,
        samples=cfg.samples,
        valid_split=cfg.valid_split,
        valid_fraction=cfg.valid_fraction,
        seed=SPLIT_SEED,
        data_dir=cfg.data_dir,
        cache_dir=cfg.cache_dir,
        download=cfg.download,
    )


def evaluate_run(cfg: TrainConfig, runs: list[Path], splits: Splits, device: torch.device) -> None:
    """Print the test accuracy of finished runs' best weights."""
    test = DeviceEvents(splits.test, device)
    channels = -(-splits.train.num_channels // cfg.channel_bin)
    for run in runs:
        model = build_model(cfg, channels, len(splits.train.class_names)).to(device)
        checkpoint.load_weights(run / "best.safetensors", model)
        means = Engine(cfg, model, device).evaluate(test)
        print(f"test accuracy {100 * means['accuracy']:.2f} %  loss {means['loss']:.4f}  {run}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        return _main(config.parse(argv))
    except (ValueError, OSError) as error:
        # a user's mistake or the machine's, named where it was found
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(cfg: TrainConfig) -> int:
    device = choose_device(cfg.device)
    if cfg.backend == "triton" and cfg.neuron.startswith("gpn"):
        reason = ops.triton_unavailable(torch.empty(1, device=device))
        if reason:
            raise ValueError(f"backend: triton cannot run: {reason}")
    splits = load_data(cfg)
    taken_up = cfg.eval_only or cfg.resume
    run = Path(taken_up) if taken_up else make_run_folder(cfg)
    runs = [run] if len(cfg.seed) == 1 else [run / f"seed-{seed}" for seed in cfg.seed]
    print(f"{splits.description}\n{splits.train.summary()}")
    if cfg.eval_only:
        evaluate_run(cfg, runs, splits, device)
        return 0
    if not cfg.resume:
        checkpoint.write_json(run / "config.json", cfg.to_dict())

    results = []
    for seed, folder in zip(cfg.seed, runs, strict=True):
        folder.mkdir(exist_ok=True)
        if (folder / "result.json").exists():
            print(f"{folder} is finished")
            results.append(json.loads((folder / "result.json").read_text()))
            continue
        if len(runs) > 1:
            print(f"seed {seed}")
        results.append(train(cfg, seed, folder, splits, device))
        print(f"test accuracy {100 * results[-1]['test_accuracy']:.2f} %  {folder}")
    if len(results) > 1:
        accuracies = [result["test_accuracy"] for result in results]
        summary = {
            "test_accuracy": statistics.mean(accuracies),
            "test_accuracy_deviation": statistics.stdev(accuracies),
            "seeds": [result["seed"] for result in results],
            "results": results,
        }
        checkpoint.write_json(run / "result.json", summary)
        print(
            f"test accuracy {100 * summary['test_accuracy']:.2f} +- "
            f"{100 * summary['test_accuracy_deviation']:.2f} % over {len(results)} seeds  {run}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
