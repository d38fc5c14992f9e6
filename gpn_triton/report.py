"""Make a page of one run or several: an HTML file that opens without a network.

python -m gpn_triton.report RUN
python -m gpn_triton.report RUN OTHER_RUN --out compared.html
python -m gpn_triton.report RUN --file test.h5 --sample 0 17

It shows the outcome, the curves, what was taken for what, samples bin by bin with a slider over
their time, the options that differ, and where the time went.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from gpn_triton.analysis.answers import answers, view
from gpn_triton.analysis.page import Looked, build_page
from gpn_triton.analysis.plots import check_plotly
from gpn_triton.analysis.record import Record, read_records
from gpn_triton.analysis.report import write_text
from gpn_triton.analysis.subject import run_samples
from gpn_triton.data.datasets import DENSE
from gpn_triton.machine import files
from gpn_triton.machine.command import answer
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training.parser import Parser
from gpn_triton.training.run_folder import load_run


def build_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m gpn_triton.report",
        description="Make a page of one run or several, an HTML file that opens without a network: "
        "outcome, curves, confusion matrix, samples bin by bin with a slider over their time, the "
        "options that differ, and where the time went.",
    )
    # fmt: off
    parser.add_argument("runs", nargs="+", metavar="RUN",
        help="Names runs; of several seeds the folder of all, or RUN/seed-K of one.")
    parser.add_argument("--out", metavar="FILE.html",
        help="Names the file to write; one that is there is replaced (default: report.html in the "
        "first run's folder).")
    parser.add_argument("--file", metavar="FILE.h5",
        help="Names the samples, in SHD's layout (default: each run's own validation data).")
    parser.add_argument("--samples", type=int, metavar="K",
        help="Takes so many samples at most, from the first (default: all).")
    parser.add_argument("--sample", nargs="+", type=int, metavar="K",
        help="Names the samples that are shown bin by bin (default: the surest right and the "
        "surest wrong answer of the first run on these data).")
    parser.add_argument("--no-data", action="store_true",
        help="Leaves out what needs the data: the confusion matrix and the samples.")
    # fmt: on
    return parser


def look(
    records: Sequence[Record], file: str | None, most: int | None, chosen: Sequence[int] | None
) -> list[Looked]:
    """What runs do with their validation data, or with a file's samples; says what it found.

    Args:
        file: in SHD's layout. most: so many samples at most. chosen: the numbers of those that are
            shown bin by bin; None: see Answers.surest, by the first run on the same data.
    Raises:
        ValueError, FileNotFoundError: no weights or no data, or such that do not fit.
    """
    looked, shown = [], {}
    for record in records:
        trained = load_run(record.folder)
        if file is not None and trained.config.made in DENSE:
            raise ValueError(
                f"file: {record.folder} learned {trained.config.made}, whose inputs are no events"
            )
        try:
            samples = run_samples(trained, file, most)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; --no-data makes the page without them") from None
        found = answers(trained, samples)
        data = found.samples.store.fingerprint()
        numbers = chosen if chosen is not None else shown.setdefault(data, found.surest())
        if chosen is None and NEURONS[trained.config.neuron].needs_time_bins:
            numbers = []
        views = [view(found, k) for k in dict.fromkeys(numbers)]
        source = Path(file).name if file else "validation data"
        looked.append(Looked(record, found, views, source))
        share = 100 * float(found.right.double().mean())
        how = "near enough" if found.learns_number else "right"
        print(f"{record.label}: {len(found.labels)} samples, {source}, {share:.2f} % {how}")
    return looked


def run(argv: list[str] | None) -> int:
    """Do what the command line asks for; returns the exit status."""
    args = build_parser().parse_args(argv)
    check_plotly()
    for name in ("file", "samples", "sample"):
        if args.no_data and getattr(args, name) is not None:
            raise ValueError(f"{name}: has no effect beside --no-data")
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"samples: expected at least 1, got {args.samples}")
    records = read_records(args.runs)
    out = Path(args.out or Path(args.runs[0], "report.html"))
    files.check_writable(out)
    looked = [] if args.no_data else look(records, args.file, args.samples, args.sample)
    write_text(out, build_page(records, looked))
    print(out)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return answer(
        lambda: run(argv),
        ValueError,
        OSError,
        MemoryError,
        ModuleNotFoundError,
        stopped="stopped at once: nothing was written",
    )


if __name__ == "__main__":
    sys.exit(main())
