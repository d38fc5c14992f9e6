"""Classify the samples of a file with a trained network.

python -m gpn_triton.predict runs/20250131-120000-shd-gpn my_recordings.h5
python -m gpn_triton.predict RUN FILE.h5 --stream --out -
python -m gpn_triton.predict RUN FILE.h5 --time-bins 250
"""

import copy
import csv
import io
import sys
from pathlib import Path

import torch
from torch import Tensor

from gpn_triton.data.binning import bin_batch
from gpn_triton.data.datasets import class_difference
from gpn_triton.data.events import DeviceEvents, EventStore
from gpn_triton.data.sources.hdf5 import read_events
from gpn_triton.machine import files, interrupt
from gpn_triton.machine.device import choose_device
from gpn_triton.training.build import build_binning
from gpn_triton.training.parser import Parser
from gpn_triton.training.run_folder import NUM_CHANNELS, TrainedRun, load_run


@torch.no_grad()
def predict(
    trained: TrainedRun, store: EventStore, device: torch.device | str = "cpu",
    batch_size: int = 64, stream: bool = False,
) -> Tensor:  # fmt: skip
    """Classify samples, in float64 throughout, whatever the run's precision.

    So the result is the same however samples are batched or streamed: products of other shapes
    differ in the last of 53 bits, and rounding the logits to 24 removes that.

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
    binning = build_binning(trained.config)
    events = DeviceEvents(store, device)
    logits = []
    for indices in torch.arange(len(events), device=device).split(batch_size):
        x = bin_batch(events, indices, binning).double()
        if stream:
            state = None
            for bin in x.split(1):
                found, state = model.stream(bin, state)
        else:
            found = model(x)[0]
        logits.append(found.float().cpu())
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise ValueError("weights: expected finite logits, got some beyond float32")
    return logits


def predictions_csv(class_names: tuple[str, ...], logits: Tensor) -> str:
    """Predictions as CSV with a head line: the sample's number, the likeliest class's name, every
    probability with six digits; of logits [S, classes] float32 and one name a class."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sample", "label", *(f"p({name})" for name in class_names)])
    probabilities = logits.double().softmax(1).tolist()
    for k, (best, row) in enumerate(zip(logits.argmax(1).tolist(), probabilities, strict=True)):
        table.writerow([k, class_names[best], *(f"{p:.6g}" for p in row)])
    return text.getvalue()


def describe_agreement(class_names: tuple[str, ...], store: EventStore, logits: Tensor) -> str:
    """How many predictions agree with a file's labels, compared by the classes' names, in words;
    why that cannot be told where the file has classes that the run does not know."""
    labels, names = torch.from_numpy(store.labels), store.class_names
    if sorted(names) == sorted(class_names) and len(set(names)) == len(names):
        labels = torch.tensor([class_names.index(name) for name in names])[labels]
    elif difference := class_difference(class_names, names):
        return f"labels not compared: extra/keys: the run has {difference}"
    elif labels.max() >= len(class_names):
        top = int(labels.max())
        return f"labels not compared: the run has {len(class_names)} classes, a label is {top}"
    agree = (logits.argmax(1) == labels).double().mean().item()
    return f"{100 * agree:.2f} % as the file labels them"


def build_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m gpn_triton.predict",
        description="Classify the samples of a file with the best weights of a run.",
        epilog="Everything is computed in float64 and the logits are rounded to float32, so that "
        "--stream, --batch-size and --device do not change a prediction. In float32 or bf16, as in "
        "training, a spike at the edge of its threshold may fall otherwise: an accuracy may differ "
        "from the run's by the odd sample.",
    )
    # fmt: off
    parser.add_argument("run", metavar="RUN", help="The run's folder (RUN/seed-K of several).")
    parser.add_argument("file", metavar="FILE.h5", help="The samples, in SHD's layout.")
    parser.add_argument("--out", default="predictions.csv", metavar="FILE.csv",
        help="Names the file to write, or - for the standard output; a file that is there is "
        "replaced (default: %(default)s).")
    parser.add_argument("--time-bins", type=int, metavar="T",
        help="Computes on T bins of the run's window instead of as many as in training: a GPN "
        "network's decays and gains are converted to the new time step.")
    parser.add_argument("--stream", action="store_true",
        help="Feeds the network bin by bin and carries its state from one to the next.")
    parser.add_argument("--device", default="auto",
        help="Chooses where to compute: cpu, cuda or cuda:K; auto takes a GPU that is there "
        "(default: %(default)s).")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B",
        help="Sets how many samples are computed at once (default: %(default)s).")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        interrupt.started()
        args = build_parser().parse_args(argv)
        if args.out != "-":
            files.check_writable(args.out)
        device, trained = choose_device(args.device), load_run(args.run)
        if args.time_bins is not None:
            trained, did = trained.at(args.time_bins, trained.config.max_time)
            print(f"{args.run}: {did}", file=sys.stderr)
        store = read_events(args.file, num_channels=NUM_CHANNELS, use_cache=False)
        logits = predict(trained, store, device, args.batch_size, args.stream)
        text = predictions_csv(trained.class_names, logits)
        if args.out == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
            return 0
        files.write_atomically(Path(args.out), lambda opened: opened.write(text.encode()))
        agreement = describe_agreement(trained.class_names, store, logits)
        print(f"{args.out}: {len(store)} samples, {agreement}")
        return 0
    except KeyboardInterrupt:
        print("stopped at once: nothing was written", file=sys.stderr)
        return 130
    # RuntimeError is torch's own, where memory does not suffice
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        print(f"error: {reason[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
