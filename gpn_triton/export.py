"""Write a run's network as files that other programs read.

python -m gpn_triton.export runs/20250131-120000-shd-gpn
python -m gpn_triton.export RUN --out DIR

DIR then holds model.safetensors (weights), model.json (the network, its classes and how events are
binned for it) and, for GPN networks, authors.safetensors: the same weights under the names and in
the layout of the authors' published implementation, fc1, sn1.ln, fc2 and so on, whose
sn1.ln.weight [4 N, 2 N] has the columns of v, then those of x. SpikingClassifier.from_pretrained
reads the first two back, from_authors the third. What the first does is no more than this:

    import json
    from pathlib import Path
    from safetensors.torch import load_file
    from gpn_triton import SpikingClassifier

    def load(folder):
        about = json.loads(Path(folder, "model.json").read_text())
        model = SpikingClassifier(**about["network"])
        model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return model.eval(), about
"""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save

from gpn_triton.data.binning import BinningConfig
from gpn_triton.machine import files
from gpn_triton.machine.command import answer
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.neurons.pretrained import authors_weights
from gpn_triton.training.parser import Parser
from gpn_triton.training.run_folder import TrainedRun, load_run


def describe(trained: TrainedRun) -> dict[str, Any]:
    """What model.json says beside the network, as JSON values.

    Returns:
        class_names; binning: how events become its input [time_bins, B, inputs]: num_channels,
        channel_bin (channels summed into one), max_time (seconds), overflow and style, as
        data.binning.BinningConfig; of a 2-D sensor sensor_size: (width, height, polarities), see
        data.events for the order of its channels.
    """
    binning = trained.config.settings(BinningConfig)
    # the network has it already
    del binning["time_bins"]
    size = {} if trained.sensor_size is None else {"sensor_size": trained.sensor_size}
    return {
        **size,
        "class_names": trained.class_names,
        "binning": {"num_channels": trained.num_channels, **binning},
    }


def export(run: str | Path, out: str | Path) -> list[Path]:
    """Write a run's network into a folder, each file whole or not at all.

    Args:
        run: a run folder, see run_folder.load_run. out: the folder, made if missing; its files of
            these names are replaced.
    Returns:
        the files written.
    Raises:
        FileNotFoundError, ValueError: as load_run. OSError: the folder cannot be written.
    """
    trained, out = load_run(run), Path(out)
    # other programs know Linear alone
    trained.model.fold()
    written = trained.model.save_pretrained(out, describe(trained))
    if NEURONS[trained.config.neuron].is_gpn:
        written.append(out / "authors.safetensors")
        content = save(authors_weights(trained.model))
        files.write_atomically(written[2], lambda file: file.write(content))
    return written


def build_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m gpn_triton.export",
        description="Write a run's network as safetensors and JSON, and for GPN networks in the "
        "authors' layout, too.",
    )
    parser.add_argument("run", metavar="RUN", help="The run's folder (RUN/seed-K of several).")
    about = "Names the folder to write into (default: RUN/export)."
    parser.add_argument("--out", metavar="DIR", help=about)
    return parser


def run(argv: list[str] | None) -> int:
    """Do what the command line asks for; returns the exit status."""
    args = build_parser().parse_args(argv)
    print(*export(args.run, args.out or Path(args.run, "export")), sep="\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return answer(lambda: run(argv), ValueError, OSError)


if __name__ == "__main__":
    sys.exit(main())
