"""The training command's options: one frozen dataclass, its argparse parser and the presets.

A value comes from, later ones winning: the default here, the preset, the --config file, the flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpn_triton.device import BACKENDS
from gpn_triton.model import NEURONS, READOUTS
from gpn_triton.surrogate import SURROGATES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATASETS = ("synthetic", "shd", "ssc")

# the authors' two published set-ups (small and wide) and the time bins the paper itself names
_PLAIN = {"max_time": 1.0, "channel_shift": 0}
_SMALL = {**_PLAIN, "dropout": 0.5, "lr": 5e-4, "schedule": "cosine"}
_WIDE = {**_PLAIN, "dropout": 0.25, "schedule": "plateau"}
_SHD_SMALL = {**_SMALL, "dataset": "shd", "hidden": (128,), "batch_size": 32, "epochs": 150}
_SSC_SMALL = {
    **_SMALL,
    "dataset": "ssc",
    "hidden": (512, 256, 128),
    "lr": 1e-3,
    "weight_decay": 5e-4,
    "batch_size": 256,
    "epochs": 300,
}
PRESETS: dict[str, dict[str, Any]] = {
    "shd-small": {**_SHD_SMALL, "time_bins": 20},
    "shd-paper": {**_SHD_SMALL, "time_bins": 40},
    "shd-wide": {
        **_WIDE,
        "dataset": "shd",
        "hidden": (1024,),
        "time_bins": 20,
        "lr": 5e-4,
        "batch_size": 128,
        "epochs": 150,
    },
    "ssc-small": {**_SSC_SMALL, "time_bins": 50},
    "ssc-paper": {**_SSC_SMALL, "time_bins": 60},
    "ssc-wide": {
        **_WIDE,
        "dataset": "ssc",
        "hidden": (1024, 1024, 1024),
        "time_bins": 60,
        "lr": 1e-3,
        "batch_size": 1024,
        "epochs": 150,
    },
}


def _option(group: str, default: Any, help: str, **argparse_options: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **argparse_options})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run; each field is the flag of the same name."""

    preset: str | None = _option(
        "Run", None, "start from a published set-up; flags given beside it win", choices=PRESETS
    )
    config: str | None = _option(
        "Run", None, "read options from a TOML file (keys as the flags)", metavar="FILE.toml"
    )
    out: str = _option("Run", "runs", "a folder under which each run makes its own", metavar="DIR")
    seed: tuple[int, ...] = _option(
        "Run", (0,), "seed; several give mean and deviation", type=int, nargs="+", metavar="S"
    )
    resume: str | None = _option(
        "Run", None, "go on with an interrupted run; auto: the newest under --out", metavar="RUN"
    )
    eval_only: str | None = _option(
        "Run", None, "evaluate a finished run's best weights on the test set", metavar="RUN"
    )
    device: str = _option("Run", "auto", "auto, cpu, cuda or cuda:K; auto is cuda where there is")
    no_graph: bool = _option(
        "Run", False, "on a GPU, do not capture the training step as a CUDA graph: the same "
        "losses, slower", action="store_true",
    )  # fmt: skip
    profile: int | None = _option(
        "Run", None, "record N training steps: where their time goes, as a table and a Chrome "
        "trace in the run's folder", type=int, metavar="N",
    )  # fmt: skip
    backend: str = _option(
        "Run", "auto", "what computes GPN; auto is triton on CUDA, torch on a CPU", choices=BACKENDS
    )
    amp: str | None = _option(
        "Run", None, "mixed precision; bf16 if no type is named", choices=("bf16", "fp16"),
        nargs="?", const="bf16",
    )  # fmt: skip

    deterministic: bool = _option(
        "Run", False, "use deterministic algorithms only, at some cost in time",
        action="store_true",
    )  # fmt: skip
    skip_nonfinite: bool = _option(
        "Run", False, "leave out and count steps whose loss or gradient is not finite, instead of "
        "stopping", action="store_true",
    )  # fmt: skip
    track: tuple[str, ...] = _option(
        "Run", (), "also log every epoch there (extras of the same names)",
        nargs="+", choices=("tensorboard", "wandb"),
    )  # fmt: skip

    dataset: str = _option(
        "Data", "synthetic", f"{', '.join(DATASETS)} or FILE.h5 in SHD's layout", metavar="NAME"
    )
    train_file: str | None = _option("Data", None, "own training data", metavar="FILE.h5")
    valid_file: str | None = _option(
        "Data", None, "own validation data; default: split off the training data", metavar="FILE.h5"
    )
    test_file: str | None = _option(
        "Data", None, "own test data, read once at the end; default: split off", metavar="FILE.h5"
    )
    data_dir: str = _option("Data", "data", "where shd and ssc lie", metavar="DIR")
    cache_dir: str | None = _option(
        "Data", None, "where parsed files are cached; default: beside each file", metavar="DIR"
    )
    download: bool = _option("Data", False, "fetch shd or ssc if missing", action="store_true")
    samples: int = _option("Data", 2000, "training samples of synthetic", type=int, metavar="K")
    classes: int = _option("Data", 20, "words of synthetic, 2 to 1980", type=int, metavar="K")
    event_mib: int | None = _option(
        "Data", None, "device memory for a set's events, MiB; a larger set is streamed from the "
        "host (default: half of what is free on a GPU)", type=int, metavar="MIB",
    )  # fmt: skip
    valid_split: str = _option(
        "Data", "auto", "how validation data are split off: whole speakers, or at random with "
        "equal classes; auto: speakers where that costs at most 15 %% of the data",
        choices=("auto", "speakers", "stratified"),
    )  # fmt: skip
    valid_fraction: float = _option("Data", 0.1, "share to split off", type=float, metavar="F")

    time_bins: int = _option("Binning", 25, "time bins T of a sequence", type=int, metavar="T")
    max_time: float = _option(
        "Binning", 1.0, "window from the sample's start, seconds", type=float, metavar="SECONDS"
    )
    overflow: str = _option("Binning", "drop", "events past the window", choices=("drop", "clip"))
    channel_bin: int = _option(
        "Binning", 1, "input channels summed into one; 5 gives 140", type=int, metavar="K"
    )
    binning: str = _option(
        "Binning", "counts", "authors: with the habits of the authors' pipeline",
        choices=("counts", "authors"),
    )  # fmt: skip

    channel_shift: int = _option(
        "Augmentation",
        10,
        "shift a sample by up to so many channels; 0 in the presets",
        type=int,
        metavar="K",
    )
    time_stretch: float = _option(
        "Augmentation", 0.0, "stretch a sample's time by up to this share", type=float, metavar="F"
    )
    time_jitter: float = _option(
        "Augmentation", 0.0, "move each event, deviation in seconds", type=float, metavar="SECONDS"
    )
    event_drop: float = _option(
        "Augmentation", 0.0, "drop each event with this probability", type=float, metavar="P"
    )
    noise: float = _option(
        "Augmentation", 0.0, "add events at random, as a share of the sample's", type=float,
        metavar="F",
    )  # fmt: skip

    hidden: tuple[int, ...] = _option(
        "Network", (128,), "neurons of each hidden layer", type=int, nargs="+", metavar="N"
    )
    neuron: str = _option("Network", "gpn", "kind of neuron", choices=NEURONS)
    dropout: float = _option(
        "Network", 0.5, "share silenced in training, mask held over time", type=float, metavar="P"
    )
    readout: str = _option("Network", "mean", "logits over time", choices=READOUTS)
    surrogate: str = _option("Network", "atan", "surrogate gradient", choices=SURROGATES)
    alpha: float = _option("Network", 2.0, "its width, larger is narrower", type=float)
    checkpoint_every: int | None = _option(
        "Network", None, "save the membrane every K steps only: less memory, more time",
        type=int, metavar="K",
    )  # fmt: skip

    epochs: int = _option("Optimisation", 20, "epochs", type=int, metavar="E")
    batch_size: int = _option("Optimisation", 64, "samples a step", type=int, metavar="B")
    accumulate: int = _option(
        "Optimisation", 1, "parts a batch is worked off in, one after the other: less memory",
        type=int, metavar="K",
    )  # fmt: skip
    lr: float = _option("Optimisation", 1e-3, "Adam's learning rate", type=float)
    lr_batch_size: int | None = _option(
        "Optimisation", None, "batch size that --lr is meant for: the rate is multiplied by the "
        "square root of batch size / B", type=int, metavar="B",
    )  # fmt: skip
    weight_decay: float = _option("Optimisation", 0.0, "Adam's L2 penalty", type=float)
    schedule: str = _option(
        "Optimisation", "cosine", "learning rate by epoch: cosine to 0, constant, or x 0.75 after "
        "3 epochs without a lower training loss (plateau)",
        choices=("cosine", "plateau", "constant"),
    )  # fmt: skip
    warmup_epochs: int = _option(
        "Optimisation", 0, "epochs over which the rate rises, step by step", type=int, metavar="E"
    )
    clip_grad: float | None = _option(
        "Optimisation", None, "clip the gradient's norm", type=float, metavar="NORM"
    )

    def __post_init__(self):
        for name in ("seed", "hidden", "track"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif _is_int(value):
                object.__setattr__(self, name, (value,))
        for f in dataclasses.fields(self):
            _check_type(f, getattr(self, f.name))
        if len(set(self.seed)) < len(self.seed):
            raise ValueError(f"seed: expected different seeds, got {list(self.seed)}")
        for names, test, expected in (
            (("hidden",), lambda v: all(n >= 1 for n in v), "sizes of at least 1"),
            (("seed",), lambda v: all(n >= 0 for n in v), "0 or more"),
            (
                ("time_bins", "channel_bin", "epochs", "batch_size", "samples", "accumulate"),
                lambda v: v >= 1,
                "at least 1",
            ),
            (("max_time", "lr", "alpha"), lambda v: v > 0, "more than 0"),
            (("classes",), lambda v: 2 <= v <= 1980, "2 to 1980"),
            (
                ("checkpoint_every", "profile", "event_mib", "lr_batch_size"),
                lambda v: v is None or v >= 1,
                "at least 1",
            ),
            (("clip_grad",), lambda v: v is None or v > 0, "more than 0"),
            (("dropout", "event_drop", "time_stretch"), lambda v: 0 <= v < 1, "0 <= value < 1"),
            (("valid_fraction",), lambda v: 0 < v < 1, "0 < value < 1"),
            (
                ("channel_shift", "time_jitter", "noise", "weight_decay", "warmup_epochs"),
                lambda v: v >= 0,
                "0 or more",
            ),
        ):
            for name in names:
                value = getattr(self, name)
                if not test(value):
                    raise ValueError(f"{name}: expected {expected}, got {_plain(value)}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: expected at most batch_size ({self.batch_size}), "
                f"got {self.accumulate}"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected fewer than epochs ({self.epochs}), "
                f"got {self.warmup_epochs}"
            )
        if self.dataset not in DATASETS and not self.dataset.endswith((".h5", ".hdf5")):
            raise ValueError(
                f"dataset: expected {', '.join(DATASETS)} or a file ending in .h5, "
                f"got {_short(self.dataset)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values."""
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items()}


def _is_int(value: Any) -> bool:
    """Whether a value is a whole number of a size that sizes, counts and seeds have."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_type(f: dataclasses.Field, value: Any) -> None:
    """Raise ValueError unless a value, from a file or a caller, is of the field's type."""
    if value is None and "None" in f.type:
        return
    choices = f.metadata.get("choices")
    values = value if isinstance(value, tuple) else (value,)
    # a list of them, since a value that cannot be hashed cannot be looked up in a dict
    if choices is not None and not all(v in list(choices) for v in values):
        raise ValueError(f"{f.name}: expected one of {', '.join(choices)}, got {_short(value)}")
    kind = f.type.split(" | ")[0]
    fits = {
        "int": _is_int(value),
        "float": _is_int(value) or (isinstance(value, float) and math.isfinite(value)),
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "tuple[int, ...]": isinstance(value, tuple) and value and all(map(_is_int, value)),
        "tuple[str, ...]": isinstance(value, tuple) and all(isinstance(v, str) for v in value),
    }[kind]
    if not fits:
        kind = "whole numbers" if kind == "tuple[int, ...]" else kind
        raise ValueError(f"{f.name}: expected {kind}, got {_short(value)}")


def _short(value: Any) -> str:
    text = repr(_plain(value))
    return text if len(text) <= 60 else text[:57] + "..."


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; it stores only the flags that were given."""
    parser = argparse.ArgumentParser(
        prog="python -m gpn_triton.train",
        description="Train a spiking network of Gated Parametric Neurons (or a baseline) on events,"
        " choose the best epoch by validation, and test it once.",
        epilog="example: python -m gpn_triton.train --amp --preset shd-small --download",
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(TrainConfig):
        options = dict(f.metadata)
        title = options.pop("group")
        group = groups.setdefault(title, parser.add_argument_group(title))
        if f.default not in (None, False, ()):
            shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            options["help"] += f" (default: {shown})"
        group.add_argument("--" + f.name.replace("_", "-"), **options)
    return parser


def parse(argv: list[str] | None = None) -> TrainConfig:
    """Read a configuration from command-line arguments.

    Args:
        argv: arguments without the program's name; None: the process's own.
    Returns:
        The configuration, with preset, file and flags merged in that order.
    Raises:
        ValueError: a value or a key that does not fit. FileNotFoundError: no such --config file.
        SystemExit: from argparse, for --help and unknown flags.
    """
    flags = vars(build_parser().parse_args(argv))
    for source in ("resume", "eval_only"):
        if source in flags:
            return _of_run(flags, source)
    values = _read_toml(flags["config"]) if "config" in flags else {}
    preset = flags.get("preset", values.get("preset"))
    if preset is not None and preset not in list(PRESETS):
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {_short(preset)}")
    given = {**values, **flags}
    if "train_file" in given and "dataset" in given:
        raise ValueError("dataset: expected either --dataset or --train-file, got both")
    for name in ("valid_file", "test_file"):
        if name in given and "train_file" not in given:
            raise ValueError(f"{name}: expected --train-file beside it")
    return TrainConfig(**{**PRESETS.get(preset, {}), **given})


# what may change when a run is taken up again: where things are and in which parts they are worked
# off, never what is computed
_PLACES = {"device", "data_dir", "cache_dir", "download"}
_PLACES |= {"no_graph", "event_mib", "accumulate"}


def _of_run(flags: dict[str, Any], source: str) -> TrainConfig:
    """The configuration a run folder holds, with the places given as flags."""
    run = newest_unfinished(flags.get("out", "runs")) if flags[source] == "auto" else flags[source]
    allowed = _PLACES | {source} | ({"out"} if flags[source] == "auto" else set())
    allowed |= {"profile"} if source == "resume" else set()
    extra = sorted(set(flags) - allowed)
    if extra:
        raise ValueError(
            f"{source}: takes its options from {run}/config.json: remove "
            + ", ".join("--" + name.replace("_", "-") for name in extra)
        )
    path = Path(run, "config.json")
    values = read_run_options(path, run, source)
    return from_dict({**values, **flags, source: str(run)}, str(path))


def read_run_options(path: Path, run: Path | str, argument: str) -> dict[str, Any]:
    """The options in a run's config.json; errors name the argument that named the run."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{argument}: {run} is not a run folder: no config.json") from None
    # a file of brackets is too deep for the parser
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{argument}: {path}: expected an object, got {type(values).__name__}")
    return values


def newest_unfinished(out: str) -> str:
    """The newest run folder under `out` without a result.json."""
    runs = [p.parent for p in Path(out).glob("*/config.json")]
    runs = [p for p in runs if not (p / "result.json").exists()]
    if not runs:
        raise FileNotFoundError(f"resume: no unfinished run under {out}")
    return str(max(runs, key=lambda p: (p / "config.json").stat().st_mtime))


def from_dict(values: dict[str, Any], where: str) -> TrainConfig:
    """A configuration from a mapping of field names; `where` names it in errors."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown option {', '.join(unknown)}")
    return TrainConfig(**values)


def _read_toml(path: str) -> dict[str, Any]:
    """Keys of a TOML file as field names."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"config: no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config: {path} is not valid TOML: {error}") from None
    values = {k.replace("-", "_"): v for k, v in values.items()}
    from_dict(values, f"config {path}")
    return values
