"""Tell what is in a file of events and what is wrong with it, or make one of other files.

python -m gpn_triton.data info my_train.h5
python -m gpn_triton.data check my_train.h5
python -m gpn_triton.data convert events.csv my_train.h5 --time-unit us --sensor-size 34 34 2

A file that train, predict and the others read is HDF5 in SHD's layout:

    spikes/times    [S] rows of variable length, float16 or float32: seconds
    spikes/units    [S] rows of variable length, integer: input channel, from 0
    labels          [S] integer: class, from 0; predict does without
    extra/speaker   [S] integer or string, optional: who spoke
    extra/keys      [classes] string, optional: the classes' names

with the attributes num_channels (1 to 65536) and, of a 2-D sensor, sensor_size (width, height,
polarities), both optional; its event at x, y has the unit (polarity height + y) width + x.
"""

import argparse
import sys

import numpy as np

from gpn_triton.data.inspection import inspect
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.data.sources.tables import SUFFIXES, TIME_UNITS, read_table
from gpn_triton.machine import files
from gpn_triton.machine.command import answer
from gpn_triton.training.parser import Parser

TIMES = {"float32": np.float32, "float16": np.float16}


def build_parser() -> Parser:
    """The command's parser."""
    layout = __doc__.partition("\n\n")[2].partition("\n\n")[2]
    parser = Parser(
        prog="python -m gpn_triton.data",
        description="Tell what is in a file of events and what is wrong with it, or make one.",
        epilog=layout,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    # fmt: off
    info = actions.add_parser("info", help="Tells what is in a file.",
        description="Tell what is in a file in SHD's layout.")
    check = actions.add_parser("check", help="Tells all that is wrong with a file.",
        description="Tell all that is wrong with a file, and what its user may want to know; the "
        "exit status is 1 where no command could read it.")
    convert = actions.add_parser("convert", help="Makes a file in SHD's layout.",
        description="Make a file in SHD's layout of a table of events (.csv: sample, time, unit or "
        "x, y, polarity, and label, speaker where known), of arrays of those names or of counts "
        "[samples, bins, channels] (.npz), or of one whose times are no seconds or that does not "
        "say its channels (.h5).")
    for command in (info, check):
        command.add_argument("file", metavar="FILE.h5", help="The file.")
    convert.add_argument("source", metavar="SOURCE",
        help=f"What to convert: a file ending in {', '.join(SUFFIXES)}.")
    convert.add_argument("out", metavar="OUT.h5",
        help="The file to write; one that is there is replaced.")
    for command in (check, convert):
        command.add_argument("--channels", type=int, metavar="C",
            help="Sets how many input channels there are.")
    check.add_argument("--max-time", type=float, default=1.0, metavar="SECONDS",
        help="Sets the window of which events must lie within (default: %(default)s).")
    convert.add_argument("--sensor-size", type=int, nargs=3, metavar=("W", "H", "P"),
        help="Sets the width, height and polarities of a 2-D sensor.")
    convert.add_argument("--time-unit", choices=TIME_UNITS, default="s",
        help="Sets the unit of the times in SOURCE (default: %(default)s).")
    convert.add_argument("--bin-seconds", type=float, metavar="SECONDS",
        help="Sets the length of a bin of counts.")
    convert.add_argument("--times", choices=TIMES, default="float32",
        help="Sets how times are stored; float16 is exact to 0.5 ms at 0.5 s (default: "
        "%(default)s).")
    # fmt: on
    return parser


def run(argv: list[str] | None) -> int:
    """Do what the command line asks for; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.action == "convert":
        files.check_writable(args.out)
        size = args.sensor_size and tuple(args.sensor_size)
        store = read_table(args.source, args.channels, size, args.time_unit, args.bin_seconds)
        write_events(args.out, store, TIMES[args.times])
        print(f"{args.out}: {store.summary()}")
        return 0
    asked = (args.channels, args.max_time) if args.action == "check" else ()
    found = inspect(args.file, *asked)
    if args.action == "info":
        if found.mistakes and not found.facts:
            raise ValueError(f"{args.file}: {found.mistakes[0]}")
        print(*(f"{name:9} {fact}" for name, fact in found.facts.items()), sep="\n")
        return 0
    for word, lines in (("wrong", found.mistakes), ("note", found.remarks)):
        for line in lines:
            print(f"{word}: {line}")
    print(f"{args.file}: {len(found.mistakes) or 'nothing'} wrong")
    return int(bool(found.mistakes))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return answer(lambda: run(argv), ValueError, OSError, MemoryError)


if __name__ == "__main__":
    sys.exit(main())
