"""Classify the samples of a file, or recordings, with a trained network.

python -m gpn_triton.predict runs/20250131-120000-shd-gpn my_recordings.h5
python -m gpn_triton.predict RUN FILE.h5 --stream --out -
python -m gpn_triton.predict RUN FILE.wav --stream
python -m gpn_triton.predict RUN FILE.h5 --time-bins 250
"""

import copy
import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpn_triton.audio import recordings
from gpn_triton.audio.encoding import Encoding, encode_for_prediction, encoding_of
from gpn_triton.data.binning import bin_batch
from gpn_triton.data.datasets import DENSE, class_difference
from gpn_triton.data.events import DeviceEvents, EventStore
from gpn_triton.data.sources.hdf5 import read_events
from gpn_triton.machine import files, interrupt
from gpn_triton.machine.device import choose_device
from gpn_triton.training.build import build_binning
from gpn_triton.training.parser import Parser
from gpn_triton.training.run_folder import TrainedRun, load_run

# of a batch's counts in float64: sensors of many channels are taken fewer samples at a time
COUNTS_BYTES = 256 << 20


@torch.no_grad()
def predict(
    trained: TrainedRun, store: EventStore, device: torch.device | str = "cpu",
    batch_size: int = 64, stream: bool = False,
    follow: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Classify samples, in float64 throughout, whatever the run's precision.

    So the result is the same however samples are batched or streamed: products of other shapes
    differ in the last of 53 bits, and rounding the logits to 24 removes that.

    Args:
        trained: the run. store: samples of the run's channels; their labels do not count, and need
            not be known.
        device: where to compute. batch_size: samples at once, which bounds the memory; fewer where
            their counts would take more than COUNTS_BYTES.
        stream: feed the network bin by bin with its state carried. follow: is then called with the
            batch's first sample, the bin's number and the logits [B, classes] so far.
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
    sample_bytes = 8 * binning.time_bins * binning.columns(store.num_channels)
    batch_size = max(1, min(batch_size, COUNTS_BYTES // sample_bytes))
    for indices in torch.arange(len(events), device=device).split(batch_size):
        x = bin_batch(events, indices, binning).double()
        if stream:
            state = None
            for number, bin in enumerate(x.split(1)):
                found, state = model.stream(bin, state)
                if follow is not None:
                    follow(int(indices[0]), number, found)
        else:
            found = model(x)[0]
        logits.append(found.float().cpu())
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise ValueError("weights: expected finite logits, got some beyond float32")
    return logits


def predictions_csv(
    class_names: tuple[str, ...], logits: Tensor, samples: Sequence[object] | None = None
) -> str:
    """Predictions as CSV with a head line: the sample's name, or without names its number, the
    likeliest class's name, every probability with six digits; of logits [S, classes] float32 and
    one name a class."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sample", "label", *(f"p({name})" for name in class_names)])
    probabilities = logits.double().softmax(1).tolist()
    for k, (best, row) in enumerate(zip(logits.argmax(1).tolist(), probabilities, strict=True)):
        name = k if samples is None else samples[k]
        table.writerow([name, class_names[best], *(f"{p:.6g}" for p in row)])
    return text.getvalue()


def describe_agreement(class_names: tuple[str, ...], store: EventStore, logits: Tensor) -> str:
    """How many predictions agree with a file's labels, compared by the classes' names, in words;
    why that cannot be told where the file has no labels, or classes that the run does not know."""
    if not store.labelled:
        return "without labels"
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


def encode_as_the_run(
    trained: TrainedRun, source: Path, device: torch.device
) -> tuple[list[Path], EventStore]:
    """A recording, or every one in a folder, encoded as the run's training data were: the paths of
    those that can be read, and their samples. Where the training file is gone or does not say how
    it was encoded, that is said, and SHD's way is taken."""
    cfg, encoding = trained.config, None
    file = cfg.train_file or cfg.dataset
    if Path(file).is_file():
        encoding = encoding_of(file)
    if encoding is None:
        print(f"{file} does not say how it was encoded: taken as SHD was", file=sys.stderr)
        encoding = Encoding()
    paths = [source]
    if source.is_dir():
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in recordings.SUFFIXES)
        if not paths:
            raise ValueError(
                f"{source}: expected files ending in {', '.join(recordings.SUFFIXES)}, found none"
            )
    paths, store = encode_for_prediction(paths, encoding, device, trained.num_channels)
    if store.times.max(initial=0) >= cfg.max_time:
        print(
            f"the run hears the first {cfg.max_time:g} s of a recording: the rest has no effect",
            file=sys.stderr,
        )
    return paths, store


class Follower:
    """Says, as a recording's bins come, which class is the likeliest from when on."""

    def __init__(self, trained: TrainedRun, paths: Sequence[Path], out: io.TextIOBase):
        self.names, self.paths, self.out = trained.class_names, paths, out
        self.seconds = trained.config.max_time / trained.config.time_bins
        self.last = None

    def __call__(self, sample: int, bin: int, logits: Tensor) -> None:
        p, best = logits[0].softmax(0).max(0)
        if (sample, best) != self.last:
            self.last = sample, best
            print(
                f"{self.paths[sample]}, {(bin + 1) * self.seconds:.2f} s: "
                f"{self.names[best]} {p:.3f}", file=self.out, flush=True,
            )  # fmt: skip


def build_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m gpn_triton.predict",
        description="Classify the samples of a file, or recordings, with the best weights of a "
        "run. Recordings are encoded as the run's data were.",
        epilog="Everything is computed in float64 and the logits are rounded to float32, so that "
        "--stream, --batch-size and --device do not change a prediction. In float32 or bf16, as in "
        "training, a spike at the edge of its threshold may fall otherwise: an accuracy may differ "
        "from the run's by the odd sample.",
    )
    # fmt: off
    parser.add_argument("run", metavar="RUN", help="The run's folder (RUN/seed-K of several).")
    parser.add_argument("file", metavar="FILE",
        help="The samples: FILE.h5 in SHD's layout, labelled or not, a recording (WAV, FLAC, "
        "OGG) or a folder.")
    parser.add_argument("--out", default="predictions.csv", metavar="FILE.csv",
        help="Names the file to write, or - for the standard output; a file that is there is "
        "replaced (default: %(default)s).")
    parser.add_argument("--time-bins", type=int, metavar="T",
        help="Computes on T bins of the run's window instead of as many as in training: a GPN "
        "network's decays and gains are converted to the new time step.")
    parser.add_argument("--stream", action="store_true",
        help="Feeds the network bin by bin and carries its state from one to the next; of a "
        "recording it says at once when another class becomes the likeliest.")
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
        if trained.config.made in DENSE:
            raise ValueError(
                f"run: {args.run} learned {trained.config.made}, whose inputs are no events"
            )
        if args.time_bins is not None:
            trained, did = trained.at(args.time_bins, trained.config.max_time)
            print(f"{args.run}: {did}", file=sys.stderr)
        source, out = Path(args.file), sys.stdout if args.out != "-" else sys.stderr
        paths, follow, batch_size = None, None, args.batch_size
        if source.is_dir() or source.suffix.lower() in recordings.SUFFIXES:
            paths, store = encode_as_the_run(trained, source, device)
            if args.stream:
                # one recording after the other, as they sound
                follow, batch_size = Follower(trained, paths, out), 1
        else:
            store = read_events(
                source, num_channels=trained.num_channels, use_cache=False, labelled=False
            )
        logits = predict(trained, store, device, batch_size, args.stream, follow)
        text = predictions_csv(trained.class_names, logits, paths)
        if args.out == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
            return 0
        files.write_atomically(Path(args.out), lambda opened: opened.write(text.encode()))
        if paths is None:
            agreement = describe_agreement(trained.class_names, store, logits)
            print(f"{args.out}: {len(store)} samples, {agreement}")
            return 0
        for path, row in zip(paths, logits.double().softmax(1), strict=True):
            p, best = row.topk(min(3, len(row)))
            words = (f"{trained.class_names[k]} {q:.3f}" for q, k in zip(p, best, strict=True))
            print(f"{path}: {', '.join(words)}")
        print(f"{args.out}: {len(store)} recordings")
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
