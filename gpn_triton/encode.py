"""Encode recordings as the spikes of an inner ear, in SHD's layout.

python -m gpn_triton.encode recordings/ --out speech.h5
python -m gpn_triton.encode speech_commands/ --out speech.h5 --copies 2
python -m gpn_triton.encode --plot yes/ab12_nohash_0.wav --out yes.png
"""

import sys
from dataclasses import fields

from gpn_triton.audio import recordings
from gpn_triton.audio.encoding import Encoding, encode
from gpn_triton.audio.picture import plot_recording
from gpn_triton.audio.recordings import Variation
from gpn_triton.machine import files, interrupt
from gpn_triton.machine.device import choose_device
from gpn_triton.training.parser import Parser


def build_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m gpn_triton.encode",
        description="Encode recordings (WAV, FLAC, OGG) as SHD was: 700 places of a basilar "
        "membrane, hair cells, bushy cells. SOURCE is a folder of one folder a class (with Speech "
        "Commands' validation_list.txt and testing_list.txt, if there), a folder of files named "
        "LABEL_SPEAKER_INDEX.wav, or a CSV file with the columns path, label, speaker, split. Of "
        "several parts, OUT_train.h5, OUT_valid.h5 and OUT_test.h5 are written. What was "
        "interrupted goes on where it was.",
    )
    # fmt: off
    parser.add_argument("source", metavar="SOURCE",
        help="The recordings; beside --plot, one of them.")
    parser.add_argument("--out", required=True, metavar="FILE",
        help="Names the file to write: .h5, or .png beside --plot; one that is there is replaced.")
    parser.add_argument("--plot", action="store_true",
        help="Draws one recording's wave, membrane and spikes (the extra plot) instead.")
    parser.add_argument("--channels", type=int, default=700, metavar="C",
        help="Sets how many places along the membrane are heard (default: %(default)s).")
    parser.add_argument("--max-seconds", type=float, default=10.0, metavar="SECONDS",
        help="Leaves out recordings that are longer (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
        help="Sets the seed of the fibres' and the copies' draws (default: %(default)s).")
    parser.add_argument("--copies", type=int, default=0, metavar="K",
        help="Adds K changed copies of each training recording (default: %(default)s).")
    parser.add_argument("--speed", type=float, default=None, metavar="F",
        help="Plays copies faster or slower by up to this share, which moves their pitch likewise "
        f"(default: {Variation.speed}).")
    parser.add_argument("--snr", type=float, default=None, metavar="DB",
        help="Adds white noise to copies, so many to 20 dB more below them; 0 adds none (default: "
        f"{Variation.snr:g}).")
    parser.add_argument("--gain", type=float, default=None, metavar="DB",
        help="Makes copies up to so many dB too loud and clips them; the ear levels all else "
        f"(default: {Variation.gain:g}).")
    parser.add_argument("--device", default="auto",
        help="Chooses where to compute: cpu, cuda or cuda:K; auto takes a GPU that is there "
        "(default: %(default)s).")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        interrupt.started()
        args = build_parser().parse_args(argv)
        change = {f.name: getattr(args, f.name) for f in fields(Variation)}
        change = {name: value for name, value in change.items() if value is not None}
        if change and not args.copies:
            raise ValueError(f"{next(iter(change))}: has no effect without --copies")
        if not args.out.endswith(".png" if args.plot else ".h5"):
            raise ValueError(
                f"out: expected a name ending in {'.png' if args.plot else '.h5'}, got {args.out!r}"
            )
        encoding = Encoding(
            args.channels, args.seed, args.max_seconds, args.copies, Variation(**change)
        )
        device = choose_device(args.device)
        files.check_writable(args.out)
        if args.plot:
            if args.copies:
                raise ValueError("copies: has no effect beside --plot")
            plot_recording(args.source, args.out, encoding, device)
            print(args.out)
        else:
            encode(recordings.find(args.source), args.out, encoding, device)
        return 0
    except KeyboardInterrupt:
        print("stopped at once: the same command goes on where it was", file=sys.stderr)
        return 130
    # RuntimeError is torch's own, where memory does not suffice, or names a missing extra
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        print(f"error: {reason[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
