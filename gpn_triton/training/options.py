"""The training command's options: one frozen dataclass, and what is known of each of its fields.

A field's metadata say how the command offers the option (group, help, whether a newcomer needs it),
what may be asked for (choices, check), and two things that a run folder depends on: whether a
result depends on the option, and whether it may be given anew when a run is taken up again.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from gpn_triton.data.binning import OVERFLOWS, STYLES, Augmentation, BinningConfig
from gpn_triton.data.hold_out import METHODS
from gpn_triton.data.sources.download import PARTS
from gpn_triton.machine.device import BACKENDS
from gpn_triton.neurons.networks import NEURONS, READOUTS
from gpn_triton.neurons.surrogate import SURROGATES
from gpn_triton.training.presets import PRESETS

DATASETS = ("synthetic", *PARTS)
AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
# the options that name a run to take up again, which then brings its own options
TAKE_UP = ("resume", "eval_only")


class Check(NamedTuple):
    """What a number must be, as a test and in words."""

    test: Callable[[float], bool]
    expected: str


FROM_0 = Check(lambda v: v >= 0, "0 or more")
FROM_1 = Check(lambda v: v >= 1, "at least 1")
SIZES = Check(lambda v: v >= 1, "sizes of at least 1")
ABOVE_0 = Check(lambda v: v > 0, "more than 0")
SHARE = Check(lambda v: 0 <= v < 1, "0 <= value < 1")
PART = Check(lambda v: 0 < v < 1, "0 < value < 1")
WORDS = Check(lambda v: 2 <= v <= 1980, "2 to 1980")


def option(group: str, default: Any, help: str, **more: Any) -> Any:
    """A field of TrainConfig.

    Args:
        group: the heading under which --help lists it. default: its value where none is given.
        help: a sentence for the command line; the default is added to it.
        more: newcomer: --help shows it, not --help-all alone. result=False: no result depends on
            it, or only by the order of float sums. beside: those of TAKE_UP beside which it may be
            given. before: the value that runs had before there was the option, if not the default.
            choices, check: what fits. sets: the field of BinningConfig or Augmentation that it
            sets, as (class, name). metavar, nargs, const: as argparse.
    """
    known = {"newcomer": False, "result": True, "beside": (), "before": default}
    return field(default=default, metadata={"group": group, "help": help, **known, **more})


def _sets(kind: type, name: str, group: str, help: str, **more: Any) -> Any:
    """A field of TrainConfig that sets one of BinningConfig or Augmentation, with its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    return option(group, more.pop("default", defaults[name]), help, sets=(kind, name), **more)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run; each field is the flag of the same name.

    Raises:
        ValueError: a value of another type or out of range, or values that exclude each other; the
            message begins with the option's name.
    """

    # fmt: off
    preset: str | None = option(
        "Run", None, f"Starts from a published set-up ({', '.join(PRESETS)}); options given beside "
        "it win.", newcomer=True, result=False, choices=PRESETS, metavar="NAME",
    )
    config: str | None = option(
        "Run", None, "Reads options from a TOML file whose keys are named as the flags; flags win "
        "over the file, the file wins over --preset.", result=False, metavar="FILE.toml",
    )
    out: str = option(
        "Run", "runs", "Sets the folder under which each run makes a folder of its own.",
        result=False, metavar="DIR",
    )
    seed: tuple[int, ...] = option(
        "Run", (0,), "Sets the seed of weights, order and every random draw; several seeds train "
        "one network each and give mean and deviation.", newcomer=True, check=FROM_0, metavar="S",
    )
    resume: str | None = option(
        "Run", None, "Goes on with an interrupted run, to the same bits; 'auto' takes the newest "
        "unfinished one under --out.", newcomer=True, result=False, metavar="RUN",
    )
    eval_only: str | None = option(
        "Run", None, "Trains nothing and evaluates a run's best weights on its test set.",
        result=False, metavar="RUN",
    )
    device: str = option(
        "Run", "auto", "Chooses where to compute: cpu, cuda or cuda:K; auto takes the GPU where "
        "there is one.", result=False, beside=TAKE_UP, metavar="DEVICE",
    )
    no_graph: bool = option(
        "Run", False, "Runs each training step on a GPU by itself, instead of capturing it as a "
        "CUDA graph: the losses are the same, the steps slower.", result=False, beside=TAKE_UP,
    )
    profile: int | None = option(
        "Run", None, "Records N training steps and leaves in the run's folder where their time "
        "goes, as a table and as a Chrome trace.", result=False, beside=("resume",), check=FROM_1,
        metavar="N",
    )
    backend: str = option(
        "Run", "auto", "Chooses what computes the GPN neurons; auto takes triton on a CUDA device "
        "and torch on a CPU.", result=False, choices=BACKENDS,
    )
    amp: str | None = option(
        "Run", None, "Computes in mixed precision: in bf16, or in fp16 where that is named.",
        newcomer=True, choices=tuple(filter(None, AMP)), nargs="?", const="bf16",
    )
    deterministic: bool = option(
        "Run", False, "Lets torch use deterministic algorithms only, which costs time."
    )
    skip_nonfinite: bool = option(
        "Run", False, "Leaves out and counts steps whose loss or gradient is not finite; without "
        "it such a step ends the run.",
    )
    track: tuple[str, ...] = option(
        "Run", (), "Logs every epoch to these trackers, too; each is an extra of the same name to "
        "install.", result=False, choices=("tensorboard", "wandb"),
    )

    dataset: str = option(
        "Data", "synthetic", f"Chooses the data: {', '.join(DATASETS)} or FILE.h5 in SHD's layout.",
        newcomer=True, result=False, metavar="NAME",
    )
    train_file: str | None = option(
        "Data", None, "Trains on a file of your own, in SHD's layout, instead of --dataset.",
        newcomer=True, result=False, metavar="FILE.h5",
    )
    valid_file: str | None = option(
        "Data", None, "Names the validation data that belong to --train-file; without it a part of "
        "the training data is held out.", result=False, metavar="FILE.h5",
    )
    test_file: str | None = option(
        "Data", None, "Names the test data that belong to --train-file, read once at the end; "
        "without it a part of the training data is held out.", newcomer=True, result=False,
        metavar="FILE.h5",
    )
    data_dir: str = option(
        "Data", "data", "Names the folder where the files of shd and ssc lie.", result=False,
        beside=TAKE_UP, metavar="DIR",
    )
    cache_dir: str | None = option(
        "Data", None, "Names the folder where parsed files are cached; without it each cache lies "
        "beside its file.", result=False, beside=TAKE_UP, metavar="DIR",
    )
    download: bool = option(
        "Data", False, "Downloads the files of shd or ssc that are missing.", newcomer=True,
        result=False, beside=TAKE_UP,
    )
    samples: int = option(
        "Data", 2000, "Sets how many training samples are made for --dataset synthetic.",
        check=FROM_1, metavar="K",
    )
    classes: int = option(
        "Data", 20, "Sets how many words --dataset synthetic has, from 2 to 1980.", check=WORDS,
        metavar="K",
    )
    event_mib: int | None = option(
        "Data", None, "Limits the device memory for a set's events, in MiB; a larger set is "
        "streamed from the host. Without it the limit on a GPU is half of what is free.",
        result=False, beside=TAKE_UP, check=FROM_1, metavar="MIB",
    )
    valid_split: str = option(
        "Data", "auto", "Chooses how data are held out: whole speakers, or stratified, which is at "
        "random with equal classes; auto takes speakers where that costs at most 15 % of the data.",
        choices=METHODS,
    )
    valid_fraction: float = option(
        "Data", 0.1, "Sets the share of the training data that is held out.", check=PART,
        metavar="F",
    )

    time_bins: int = _sets(
        BinningConfig, "time_bins", "Binning", "Sets the number T of time bins of a sequence.",
        default=25, metavar="T",
    )
    max_time: float = _sets(
        BinningConfig, "max_time", "Binning", "Sets how much of each sample is used, in seconds "
        "from its start.", metavar="SECONDS",
    )
    overflow: str = _sets(
        BinningConfig, "overflow", "Binning", "Chooses what becomes of events later than "
        "--max-time: they are dropped, or counted in the last bin (clip).", choices=OVERFLOWS,
    )
    channel_bin: int = _sets(
        BinningConfig, "channel_bin", "Binning", "Sums so many neighbouring input channels into "
        "one; 5 makes 140 of 700.", metavar="K",
    )
    binning: str = _sets(
        BinningConfig, "style", "Binning", "Chooses how events are counted: each in its bin "
        "(counts), or with the habits of the authors' pipeline, which loses the last bin and one "
        "channel (authors).", choices=STYLES,
    )

    channel_shift: int = _sets(
        Augmentation, "channel_shift", "Augmentation", "Shifts each training sample by up to so "
        "many channels either way; the presets do not.", default=10, metavar="K",
    )
    time_stretch: float = _sets(
        Augmentation, "time_stretch", "Augmentation", "Stretches or shrinks each training sample's "
        "time by up to this share.", metavar="F",
    )
    time_jitter: float = _sets(
        Augmentation, "time_jitter", "Augmentation", "Moves each training event in time, with this "
        "standard deviation in seconds.", metavar="SECONDS",
    )
    event_drop: float = _sets(
        Augmentation, "drop", "Augmentation", "Drops each training event with this probability.",
        metavar="P",
    )
    noise: float = _sets(
        Augmentation, "noise", "Augmentation", "Adds events at random to each training sample, as "
        "a share of its own.", metavar="F",
    )

    hidden: tuple[int, ...] = option(
        "Network", (128,), "Sets the number of neurons of each hidden layer.", newcomer=True,
        check=SIZES, metavar="N",
    )
    neuron: str = option(
        "Network", "gpn", f"Chooses the kind of neuron: {', '.join(NEURONS)}.", newcomer=True,
        choices=NEURONS, metavar="NAME",
    )
    dropout: float = option(
        "Network", 0.5, "Silences this share of each hidden layer in training; which neurons is "
        "drawn once for each sample and held over its time.", check=SHARE, metavar="P",
    )
    readout: str = option(
        "Network", "mean", "Chooses the logits that classify a sample: their mean over time, or "
        "those of the last bin.", choices=READOUTS,
    )
    surrogate: str = option(
        "Network", "atan", "Chooses the surrogate gradient, which stands in for the derivative of "
        "a spike.", choices=SURROGATES,
    )
    alpha: float = option(
        "Network", 2.0, "Sets how narrow the surrogate gradient is about the threshold; a larger "
        "value is narrower and steeper.", check=ABOVE_0, metavar="A",
    )
    checkpoint_every: int | None = option(
        "Network", None, "Saves the membrane potential of every K-th step only and recomputes the "
        "others in the backward pass: less memory, more time.", check=FROM_1, metavar="K",
    )

    epochs: int = option(
        "Optimisation", 20, "Sets how often training goes through the data.", newcomer=True,
        check=FROM_1, metavar="E",
    )
    batch_size: int = option(
        "Optimisation", 64, "Sets how many samples a training step takes.", check=FROM_1,
        metavar="B",
    )
    accumulate: int = option(
        "Optimisation", 1, "Works each batch off in K parts, one after the other, which takes less "
        "memory.", result=False, beside=TAKE_UP, check=FROM_1, metavar="K",
    )
    lr: float = option(
        "Optimisation", 1e-3, "Sets Adam's learning rate.", newcomer=True, check=ABOVE_0,
        metavar="RATE",
    )
    lr_batch_size: int | None = option(
        "Optimisation", None, "Names the batch size that --lr is meant for: the rate is multiplied "
        "by the square root of --batch-size / B.", check=FROM_1, metavar="B",
    )
    weight_decay: float = option(
        "Optimisation", 0.0, "Sets Adam's L2 penalty on the weights.", check=FROM_0, metavar="W"
    )
    schedule: str = option(
        "Optimisation", "cosine", "Chooses how the learning rate changes from epoch to epoch: "
        "along a cosine to 0, not at all (constant), or times 0.75 after 3 epochs without a lower "
        "training loss (plateau).", choices=("cosine", "plateau", "constant"),
    )
    warmup_epochs: int = option(
        "Optimisation", 0, "Lets the learning rate rise step by step over the first E epochs.",
        check=FROM_0, metavar="E",
    )
    clip_grad: float | None = option(
        "Optimisation", None, "Scales the gradient down where its norm is larger than this.",
        check=ABOVE_0, metavar="NORM",
    )
    # fmt: on

    def __post_init__(self):
        for f in OPTIONS:
            value = getattr(self, f.name)
            if f.type.startswith("tuple") and (_is_int(value) or isinstance(value, list)):
                value = tuple(value) if isinstance(value, list) else (value,)
                object.__setattr__(self, f.name, value)
            _check_value(f, value)
        if len(set(self.seed)) < len(self.seed):
            raise ValueError(f"seed: expected different seeds, got {list(self.seed)}")
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
        for kind in (BinningConfig, Augmentation):
            self._check_settings(kind)

    def _check_settings(self, kind: type) -> None:
        """Raise what `kind` raises for the values it is given here, by the option's name."""
        try:
            kind(**self.settings(kind))
        except ValueError as error:
            part, _, rest = str(error).partition(": ")
            names = {f.metadata["sets"][1]: f.name for f in OPTIONS if "sets" in f.metadata}
            raise ValueError(f"{names.get(part, part)}: {rest}") from None

    def settings(self, kind: type) -> dict[str, Any]:
        """The arguments of BinningConfig or Augmentation that options set."""
        sets = {f.name: f.metadata["sets"] for f in OPTIONS if "sets" in f.metadata}
        return {part: getattr(self, name) for name, (of, part) in sets.items() if of is kind}

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values."""
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items()}


OPTIONS: tuple[dataclasses.Field, ...] = dataclasses.fields(TrainConfig)
RESULT_OPTIONS = tuple(f.name for f in OPTIONS if f.metadata["result"])


def from_dict(values: dict[str, Any], where: str) -> TrainConfig:
    """A configuration from a mapping of field names; `where` names it in errors."""
    check_names(values, where)
    return TrainConfig(**values)


def check_names(values: Iterable[str], where: str) -> None:
    """Raise ValueError if there is no option of one of these names."""
    names = [f.name for f in OPTIONS]
    for name in sorted(set(values) - set(names)):
        raise ValueError(f"{where}: unknown option {_short(name)}{did_you_mean(name, names)}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error about a misspelt name: the one that was probably meant, or nothing."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


def completed(
    values: dict[str, Any], fields: Iterable[dataclasses.Field] = OPTIONS
) -> dict[str, Any]:
    """A run's options as JSON values, with those that came after it as runs were made before."""
    return {f.name: _plain(f.metadata["before"]) for f in fields} | values


def difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """In which option that a result depends on two runs differ, in words; None: in none.

    Args:
        there, here: options as JSON values; either may lack those that came after it.
    """
    there, here = completed(there), completed(here)
    for name in RESULT_OPTIONS:
        if there[name] != here[name]:
            return f"{name} {_short(there[name])} there, {_short(here[name])} here"
    return None


def value_type(f: dataclasses.Field) -> str:
    """A field's type without None."""
    return f.type.split(" | ")[0]


def _check_value(f: dataclasses.Field, value: Any) -> None:
    """Raise ValueError unless a value, from a file or a caller, fits a field."""
    if value is None and "None" in f.type:
        return
    choices, check = f.metadata.get("choices"), f.metadata.get("check")
    values = value if isinstance(value, tuple) else (value,)
    # a list of them, since a value that cannot be hashed cannot be looked up in a dict
    if choices is not None and not all(v in list(choices) for v in values):
        raise ValueError(f"{f.name}: expected one of {', '.join(choices)}, got {_short(value)}")
    kind = value_type(f)
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
    if check is not None and not all(map(check.test, values)):
        raise ValueError(f"{f.name}: expected {check.expected}, got {_short(value)}")


def _is_int(value: Any) -> bool:
    """Whether a value is a whole number of a size that sizes, counts and seeds have."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = repr(_plain(value))
    return text if len(text) <= 60 else text[:57] + "..."
