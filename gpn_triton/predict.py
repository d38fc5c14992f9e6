"""Classify the samples of a file with a trained network.

python -m gpn_triton.predict runs/20250131-120000-shd-gpn my_recordings.h5
python -m gpn_triton.predict RUN FILE.h5 --stream --out -
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import io
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpn_triton import checkpoint, config, files
from gpn_triton.build import build_binning, build_model
from gpn_triton.config import TrainConfig
from gpn_triton.data.binning import bin_batch
from gpn_triton.data.events import DeviceEvents, EventStore
from gpn_triton.data.hdf5 import read_events
from gpn_triton.device import choose_device
from gpn_triton.model import SpikingClassifier

# of the files in SHD's layout that the training command reads
NUM_CHANNELS = 700


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run folder read back.

    config: as it was trained. model: with the best epoch's weights, float32, in evaluation mode, on
    the CPU. class_names: as the training data named them, else the classes' numbers.
    """

    config: TrainConfig
    model: SpikingClassifier
    class_names: tuple[str, ...]


def load_run(run: str | Path) -> TrainedRun:
    """Read a run folder's configuration, best weights and class names.

    Args:
        run: a folder as the training command leaves it, or of a run of several seeds the folder of
            one seed.
    Returns:
        the run; its model computes with the torch backend.
    Raises:
        FileNotFoundError: no config.json or no weights there.
        ValueError: a file that cannot be read, weights that do not fit the configuration or are not
            finite, or a run of several seeds.
    """
    run = Path(run)
    weights = run / "best.safetensors"
    cfg = _read_config(run)
    seeds = sorted(run.glob("seed-*/best.safetensors"))
    if seeds and not weights.exists():
        raise ValueError(f"run: {run} holds {len(seeds)} seeds: name one, as {seeds[0].parent}")
    if not weights.is_file():
        raise FileNotFoundError(f"run: {run} has no best.safetensors: no epoch was finished")
    try:
        with safe_open(weights, "pt") as file:
            classes = file.get_slice("output.weight").get_shape()[0]
    except (SafetensorError, OSError, IndexError) as error:
        raise ValueError(f"weights: {weights} cannot be read: {error}") from None
    # what is computed is the same with every backend
    cfg = dataclasses.replace(cfg, backend="torch")
    model = build_model(cfg, build_binning(cfg).columns(NUM_CHANNELS), classes)
    checkpoint.load_weights(weights, model)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"weights: {weights}: {name} holds values that are not finite")
    return TrainedRun(cfg, model.eval(), _class_names(run, classes))


def _read_config(run: Path) -> TrainConfig:
    """The configuration in the run's folder, or for one seed's folder in the one above."""
    path = run / "config.json"
    if not path.exists() and run.name.startswith("seed-"):
        path = run.parent / "config.json"
    values = config.read_run_options(path, run, "run")
    return config.from_dict(values, str(path))


def _class_names(run: Path, classes: int) -> tuple[str, ...]:
    """The names in the first line of metrics.jsonl; numbers where it holds none."""
    try:
        with (run / "metrics.jsonl").open(encoding="utf-8") as file:
            names = json.loads(file.readline())["class_names"]
    except (FileNotFoundError, KeyError):
        return tuple(map(str, range(classes)))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"run: {run}/metrics.jsonl: no header in its first line: {error}"
        ) from None
    if not isinstance(names, list) or len(names) != classes:
        raise ValueError(f"run: {run}/metrics.jsonl: class_names: expected {classes} names")
    return tuple(map(str, names))


@torch.no_grad()
def predict(
    trained: TrainedRun,
    store: EventStore,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    stream: bool = False,
) -> Tensor:
    """Classify samples, in float64 throughout, whatever the run's precision.

    float64 makes the result the same however the samples are batched and whether a sample comes
    whole or bin by bin: products of other shapes differ in the last of 53 bits, and rounding the
    logits to 24 removes that.

    Args:
        trained: the run. store: samples with 700 channels; their labels do not count.
        device: where to compute. batch_size: samples at once, which bounds the memory.
        stream: feed the network bin by bin with its state carried.
    Returns:
        logits [S, classes] float32, on the CPU.
    Raises:
        ValueError: batch_size below 1, streaming a cnn, or logits beyond float32.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    model = copy.deepcopy(trained.model).to(device, torch.float64)
    binning = dataclasses.replace(build_binning(trained.config), dtype=torch.float32)
    events = DeviceEvents(store, device)
    logits = []
    for indices in torch.arange(len(events), device=device).split(batch_size):
        x = bin_batch(events, indices, binning).double()
        logits.append((_streamed(model, x) if stream else model(x)[0]).float().cpu())
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise ValueError("weights: expected finite logits, got some beyond float32")
    return logits


def _streamed(model: SpikingClassifier, x: Tensor) -> Tensor:
    """The logits of x [T, B, C] after its last bin, fed bin by bin."""
    state = None
    for bin in x.split(1):
        logits, state = model.stream(bin, state)
    return logits


def predictions_csv(class_names: tuple[str, ...], logits: Tensor) -> str:
    """Predictions as CSV: the sample's number, the likeliest class's name, every probability.

    Args:
        class_names: one name a class. logits [S, classes] float32.
    Returns:
        the text, with a head line; probabilities with six digits.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sample", "label", *(f"p({name})" for name in class_names)])
    probabilities = logits.double().softmax(1).tolist()
    for k, (best, row) in enumerate(zip(logits.argmax(1).tolist(), probabilities, strict=True)):
        table.writerow([k, class_names[best], *(f"{p:.6g}" for p in row)])
    return text.getvalue()


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m gpn_triton.predict",
        description="Classify the samples of a file with the best weights of a run.",
        epilog="Everything is computed in float64 and the logits are rounded to float32, so that "
        "--stream, --batch-size and --device do not change a prediction. In float32 or bf16, as in "
        "training, a spike at the edge of its threshold may fall otherwise: an accuracy may differ "
        "from the run's by the odd sample.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder (of several seeds: RUN/seed-K)")
    parser.add_argument("file", metavar="FILE.h5", help="samples in SHD's layout")
    parser.add_argument(
        "--out", default="predictions.csv", metavar="FILE.csv",
        help="where to write, replacing it; - is the standard output (default: predictions.csv)",
    )  # fmt: skip
    parser.add_argument(
        "--stream", action="store_true", help="feed the network bin by bin, its state carried"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:K")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="samples at once (default: 64)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return _main(**vars(arguments))
    # RuntimeError is torch's own, where memory does not suffice
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        print(f"error: {reason[0]}", file=sys.stderr)
        return 2


def _main(run: str, file: str, out: str, stream: bool, device: str, batch_size: int) -> int:
    where = choose_device(device)
    trained = load_run(run)
    store = read_events(file, num_channels=NUM_CHANNELS, use_cache=False)
    logits = predict(trained, store, where, batch_size, stream)
    text = predictions_csv(trained.class_names, logits)
    if out == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return 0
    files.write_atomically(Path(out), lambda opened: opened.write(text.encode()))
    agree = (logits.argmax(1) == torch.from_numpy(store.labels)).double().mean().item()
    print(f"{out}: {len(store)} samples, {100 * agree:.2f} % as the file labels them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
