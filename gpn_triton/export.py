"""Write a run's network as files that other programs read.

python -m gpn_triton.export runs/20250131-120000-shd-gpn
python -m gpn_triton.export RUN --out DIR

DIR then holds model.safetensors (weights), model.json (the network, its classes and how events are
binned for it) and, for GPN networks, authors.safetensors: the same weights under the names and in
the layout of the authors' published implementation, fc1, sn1.ln, fc2 and so on, whose
sn1.ln.weight [4 N, 2 N] has the columns of v, then those of x. This reads the first two back:

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

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from gpn_triton import checkpoint, files
from gpn_triton.build import build_binning
from gpn_triton.layers import GPN
from gpn_triton.model import NEURONS, SpikingClassifier
from gpn_triton.predict import NUM_CHANNELS, TrainedRun, load_run

# raised when what the files hold changes
FORMAT = 1


def describe(trained: TrainedRun) -> dict[str, Any]:
    """A network as JSON values.

    Args:
        trained: the run.
    Returns:
        format; network: the arguments of SpikingClassifier; class_names; binning: how events become
        its input [time_bins, B, inputs]: num_channels, channel_bin (channels summed into one),
        max_time (seconds), overflow and style, as data.binning.BinningConfig.
    """
    cfg = trained.config
    return {
        "format": FORMAT,
        "network": {
            "hidden": list(cfg.hidden),
            "neuron": cfg.neuron,
            "inputs": build_binning(cfg).columns(NUM_CHANNELS),
            "classes": len(trained.class_names),
            "dropout": cfg.dropout,
            "readout": cfg.readout,
            "time_bins": cfg.time_bins,
            "surrogate": cfg.surrogate,
            "alpha": cfg.alpha,
        },
        "class_names": list(trained.class_names),
        "binning": {
            "num_channels": NUM_CHANNELS,
            "channel_bin": cfg.channel_bin,
            "max_time": cfg.max_time,
            "overflow": cfg.overflow,
            "style": cfg.binning,
        },
    }


def authors_weights(model: SpikingClassifier) -> dict[str, Tensor]:
    """The weights of a GPN network under the authors' names.

    Args:
        model: of L hidden layers.
    Returns:
        fc1..fc{L + 1}.weight and .bias, the last one the readout; sn1..snL.ln.weight [G N, 2 N],
        columns of v, then of x, and .bias [G N], rows in the order f, i, b, theta. A layer of the
        variant no-fitb has no sn weights.
    Raises:
        ValueError: not a GPN network.
    Source: the authors' implementation of arXiv 2412.01087.
    """
    tensors = {}
    for k, linear in enumerate([*model.inputs, model.output], 1):
        if k <= len(model.neurons):
            neuron = model.neurons[k - 1]
            if not isinstance(neuron, GPN):
                raise ValueError(f"neuron: expected a GPN network, got {model.neuron}")
            if neuron.bias is not None:
                weight, bias = neuron.authors_weights()
                tensors |= {f"sn{k}.ln.weight": weight, f"sn{k}.ln.bias": bias}
        tensors |= {f"fc{k}.{name}": tensor.detach() for name, tensor in linear.named_parameters()}
    return tensors


def export(run: str | Path, out: str | Path) -> list[Path]:
    """Write a run's network into a folder, each file whole or not at all.

    Args:
        run: a run folder, see predict.load_run. out: the folder, made if missing; its files of
            these names are replaced.
    Returns:
        the files written.
    Raises:
        FileNotFoundError, ValueError: as predict.load_run. OSError: the folder cannot be written.
    """
    trained, out = load_run(run), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save_weights(out / "model.safetensors", trained.model)
    checkpoint.write_json(out / "model.json", describe(trained))
    written = [out / "model.safetensors", out / "model.json"]
    if NEURONS[trained.config.neuron].is_gpn:
        content = save(authors_weights(trained.model))
        files.write_atomically(out / "authors.safetensors", lambda file: file.write(content))
        written.append(out / "authors.safetensors")
    return written


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gpn_triton.export",
        description="Write a run's network as safetensors and JSON, and for GPN networks in the "
        "authors' layout, too.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder (of several seeds: RUN/seed-K)")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: RUN/export)")
    arguments = parser.parse_args(argv)
    try:
        for path in export(arguments.run, arguments.out or Path(arguments.run, "export")):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
