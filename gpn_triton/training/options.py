"""The training command's options: one frozen dataclass, and what is known of each of its fields."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from gpn_triton.data.binning import OVERFLOWS, SCALES, STYLES, Augmentation, BinningConfig
from gpn_triton.data.datasets import DATASETS, DENSE, MADE
from gpn_triton.data.events import MAX_CHANNELS
from gpn_triton.data.hold_out import METHODS
from gpn_triton.data.sources.images import PIXELS
from gpn_triton.machine.device import BACKENDS
from gpn_triton.neurons.networks import NEURONS, READOUTS
from gpn_triton.neurons.surrogate import SURROGATES
from gpn_triton.training.presets import PRESETS

AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
# the options that name a run to take up again, which then brings its own options
TAKE_UP = ("resume", "eval_only")


INITS = ("quiet", "paper")

# what a number must be, as a test and in words
FROM_0 = (lambda v: v >= 0), "0 or more"
FROM_1 = (lambda v: v >= 1), "at least 1"
SIZES = (lambda v: v >= 1), "sizes of at least 1"
ABOVE_0 = (lambda v: v > 0), "more than 0"
SHARE = (lambda v: 0 <= v < 1), "0 <= value < 1"
PART = (lambda v: 0 < v < 1), "0 < value < 1"
WORDS = (lambda v: 2 <= v <= 1980), "2 to 1980"
CHANNELS = (lambda v: 1 <= v <= MAX_CHANNELS), f"1 to {MAX_CHANNELS}"


def option(group: str, default: Any, help: str, **more: Any) -> Any:
    """A field of TrainConfig.

    Args:
        group: the heading under which --help lists it. default: its value where none is given.
        help: a sentence for the command line; the default is added to it.
        more: newcomer: --help shows it, not --help-all alone. result=False: no result depends on
            it, or only by the order of float sums. beside: those of TAKE_UP beside which it may be
            given. before: the value that runs had before there was the option, if not the default.
            choices, check: what fits. words: what fits beside numbers. shown: the default in words,
            where it is no single one.
            sets: the field of BinningConfig or Augmentation that it sets, as (class, name).
            metavar, nargs, const: as argparse.
    """
    known = {"newcomer": False, "result": True, "beside": (), "before": default}
    return field(default=default, metadata={"group": group, "help": help, **known, **more})


def _sets(kind: type, name: str, **more: Any) -> Any:
    """A field of TrainConfig that sets one of BinningConfig or Augmentation, with its default."""
    group = kind.__name__.removesuffix("Config")
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    return option(group, more.pop("default", defaults[name]), sets=(kind, name), **more)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run; each field is the flag of the same name.

    Raises:
        ValueError: a value of another type or out of range, or values that exclude each other; the
            message begins with the option's name.
    """

    # fmt: off
    preset: str | None = option("Run", None, newcomer=True, result=False, choices=PRESETS,
        metavar="NAME",
        help=f"Starts from a set-up ({', '.join(PRESETS)}); options given beside it win.")
    config: str | None = option("Run", None, result=False, metavar="FILE.toml",
        help="Reads options from a TOML file whose keys are named as the flags; flags win over the "
        "file, the file wins over --preset.")
    out: str = option("Run", "runs", result=False, metavar="DIR",
        help="Sets the folder under which each run makes a folder of its own.")
    seed: tuple[int, ...] = option("Run", (0,), newcomer=True, check=FROM_0, metavar="S",
        help="Sets the seed of weights, order and every random draw; several seeds train one "
        "network each and give mean and deviation.")
    resume: str | None = option("Run", None, newcomer=True, result=False, metavar="RUN",
        help="Goes on with an interrupted run, to the same bits; 'auto' takes the newest "
        "unfinished one under --out.")
    init_from: str | None = option("Run", None, metavar="RUN",
        help="Starts from a finished run's best weights instead of drawing them, with its network "
        "and its binning; on other bins (--time-bins, --max-time) its decays are converted to the "
        "new time step, so that training goes on at fine bins where it began at coarse ones.")
    eval_only: str | None = option("Run", None, result=False, metavar="RUN",
        help="Trains nothing and evaluates a run's best weights on its test set; 'auto' takes the "
        "newest finished run under --out.")
    device: str = option("Run", "auto", result=False, beside=TAKE_UP, metavar="DEVICE",
        help="Chooses where to compute: cpu, cuda or cuda:K; auto takes a GPU that is there.")
    no_graph: bool = option("Run", False, result=False, beside=TAKE_UP,
        help="Runs each training step on a GPU by itself, instead of capturing it as a CUDA graph: "
        "the losses are the same, the steps slower.")
    profile: int | None = option("Run", None, result=False, beside=TAKE_UP[:1], check=FROM_1,
        metavar="N",
        help="Records N training steps and leaves in the run's folder where their time goes, as a "
        "table and as a Chrome trace.")
    backend: str = option("Run", "auto", result=False, choices=BACKENDS,
        help="Chooses what computes the spiking neurons; auto takes triton on a GPU, on a CPU cpu ("
        "kernels that Numba compiles), elsewhere torch, a loop.")
    amp: str | None = option("Run", None, newcomer=True, choices=tuple(filter(None, AMP)),
        nargs="?", const="bf16",
        help="Computes in mixed precision: in bf16, or in fp16 where that is named.")
    deterministic: bool = option("Run", False,
        help="Lets torch use deterministic algorithms only, which costs time.")
    skip_nonfinite: bool = option("Run", False,
        help="Leaves out and counts steps whose loss or gradient is not finite; without it such a "
        "step ends the run.")
    keep_epochs: tuple[int, ...] | None = option("Run", None, result=False, check=FROM_0,
        metavar="E",
        help="Keeps the weights after these epochs, too, for python -m gpn_triton.analyze; 0 is "
        "the network before training.")
    quiet: bool = option("Run", False, result=False, beside=TAKE_UP,
        help="Prints warnings and the outcome alone; metrics.jsonl tells the rest.")
    track: tuple[str, ...] = option("Run", (), result=False, choices=("tensorboard", "wandb"),
        help="Logs every epoch to these trackers, too; each is an extra of that name to install.")

    dataset: str = option("Data", "synthetic", newcomer=True, result=False, metavar="NAME",
        help=f"Chooses the data: {', '.join(DATASETS)}, FILE.h5 in SHD's layout, or a folder of "
        "recordings, which the ear encodes once into --cache-dir.")
    train_file: str | None = option("Data", None, newcomer=True, result=False, metavar="FILE.h5",
        help="Trains on a file of your own, in SHD's layout, instead of --dataset; python -m "
        "gpn_triton.data --help explains the layout, and makes such files.")
    valid_file: str | None = option("Data", None, result=False, metavar="FILE.h5",
        help="Names the validation data that belong to --train-file; without it a part of the "
        "training data is held out.")
    test_file: str | None = option("Data", None, newcomer=True, result=False, beside=TAKE_UP,
        metavar="FILE.h5",
        help="Names the test data that belong to --train-file, read once at the end; without it a "
        "part of the training data is held out. An unfinished run may be given another.")
    channels: int | None = option("Data", None, result=False, check=CHANNELS, before=700,
        metavar="C", shown="what the files say, else as far as their units reach",
        help="Sets how many input channels the files have; a run keeps it for predict and export.")
    data_dir: str = option("Data", "data", result=False, beside=TAKE_UP, metavar="DIR",
        help="Names the folder where the files of shd, ssc and mnist lie.")
    cache_dir: str | None = option("Data", None, result=False, beside=TAKE_UP, metavar="DIR",
        help="Names the folder where parsed files are cached; without it each cache lies beside "
        "its file.")
    download: bool = option("Data", False, newcomer=True, result=False, beside=TAKE_UP,
        help="Downloads the files of shd, ssc or mnist that are missing.")
    samples: int = option("Data", 2000, check=FROM_1, metavar="K",
        help=f"Sets how many training samples are made for --dataset {', '.join(MADE)}.")
    classes: int = option("Data", 20, check=WORDS, metavar="K",
        shown="20; 10 for recall",
        help="Sets how many words --dataset synthetic has, or symbols recall, from 2 to 1980.")
    permuted: bool = option("Data", False,
        help=f"Puts the pixels of {', '.join(PIXELS)} in one random order.")
    add_pairs: bool = option("Data", False,
        help="Puts each sample and another one in sequence, each in half of --max-time, and has "
        "the sum of their labels learned; of events of any source.")
    event_mib: int | None = option("Data", None, result=False, beside=TAKE_UP, check=FROM_1,
        metavar="MIB",
        help="Limits the device memory for a set's events, in MiB; a larger set is streamed from "
        "the host. Without it the limit on a GPU is half of what is free.")
    valid_split: str = option("Data", "auto", choices=METHODS,
        help="Chooses how data are held out: whole speakers, or stratified, which is at random "
        "with equal classes; auto takes speakers where that costs at most 15 % of the data.")
    valid_fraction: float = option("Data", 0.1, check=PART, metavar="F",
        help="Sets the share of the training data that is held out.")
    test_speaker: int | None = option("Data", None, check=FROM_0, metavar="S",
        help="Tests on all samples of this speaker, who is left out of training and validation, "
        "of data without a test file.")

    time_bins: int = _sets(BinningConfig, "time_bins", default=25, metavar="T",
        shown="25; 64 for digits, 784 for mnist, 100 for recall and adding",
        help="Sets the number T of time bins of a sequence.")
    max_time: float = _sets(BinningConfig, "max_time", metavar="SECONDS",
        help="Sets how much of each sample is used, in seconds from its start.")
    overflow: str = _sets(BinningConfig, "overflow", choices=OVERFLOWS,
        help="Chooses what becomes of events later than --max-time: they are dropped, or counted "
        "in the last bin (clip).")
    channel_bin: int = _sets(BinningConfig, "channel_bin", metavar="K",
        help="Sums so many neighbouring input channels into one; 5 makes 140 of 700.")
    scale: str = _sets(BinningConfig, "scale", choices=SCALES,
        help="Chooses what the network sees of a bin's count n: n itself (counts), or log(1 + n / "
        "m), m being the sample's mean count, which does not change with loudness but is known "
        "only when the sample is over (log).")
    binning: str = _sets(BinningConfig, "style", choices=STYLES,
        help="Chooses how events are counted: each in its bin (counts), or with the habits of the "
        "authors' pipeline, which loses the last bin and one channel (authors).")

    channel_shift: int = _sets(Augmentation, "channel_shift", default=10, metavar="K",
        shown="10 for synthetic, shd and ssc; 0 for other data and beside a preset",
        help="Shifts each training sample by up to so many channels either way, which helps where "
        "channels are places on a membrane, and does harm where each means something of its own.")
    channel_stretch: float = _sets(Augmentation, "channel_stretch", metavar="F",
        help="Multiplies each training sample's channels by 1 plus or minus up to this share, as a "
        "vocal tract of another length does where channels are places on a membrane.")
    channel_gain: float = _sets(Augmentation, "channel_gain", metavar="F",
        help="Drops each training sample's events with a probability between 0 and this, which "
        "goes smoothly along the channels, as another microphone or voice does.")
    time_stretch: float = _sets(Augmentation, "time_stretch", metavar="F",
        help="Stretches or shrinks each training sample's time by up to this share.")
    time_jitter: float = _sets(Augmentation, "time_jitter", metavar="SECONDS",
        help="Moves each training event in time, with this standard deviation in seconds.")
    event_drop: float = _sets(Augmentation, "drop", metavar="P",
        help="Drops each training event with this probability.")
    noise: float = _sets(Augmentation, "noise", metavar="F",
        help="Adds events at random to each training sample, as a share of its own.")

    hidden: tuple[int, ...] = option("Network", (128,), newcomer=True, check=SIZES, metavar="N",
        help="Sets the number of neurons of each hidden layer.")
    neuron: str = option("Network", "gpn", newcomer=True, choices=NEURONS, metavar="NAME",
        help=f"Chooses the kind of neuron: {', '.join(NEURONS)}.")
    dropout: float = option("Network", 0.5, check=SHARE, metavar="P",
        shown="0.5; 0 for the long tasks",
        help="Silences this share of each hidden layer in training; which neurons is drawn once "
        "for each sample and held over its time.")
    readout: str = option("Network", "mean", choices=READOUTS,
        shown="mean; last for recall; membrane for adding",
        help="Chooses the logits that classify a sample: their mean over time, those of the last "
        "bin, or those that see the spikes' mean over time and the last bin's membrane.")
    surrogate: str = option("Network", "atan", choices=SURROGATES,
        help="Chooses the surrogate gradient, which stands in for the derivative of a spike.")
    alpha: float = option("Network", 2.0, check=ABOVE_0, metavar="A",
        help="Sets how narrow the surrogate gradient is about the threshold; a larger value is "
        "narrower and steeper.")
    init: str = option("Network", "quiet", choices=INITS, before="paper",
        help="Chooses how the weights start: quiet, which learns long sequences and fine bins (GPN "
        "neurons as leaky integrators, and currents normalised to the data), or as the paper's "
        "(paper).")
    time_constants: tuple[float, ...] | None = option("Network", None, check=ABOVE_0,
        metavar="SECONDS", shown="1/80 of --max-time, but half a bin at least, to half of it",
        help="Sets the shortest and the longest time constant that the neurons of --init quiet "
        "start with, in seconds, spread evenly over the logarithm; an LSTM gets chrono biases.")
    checkpoint_every: int | str | None = option("Network", None, check=FROM_1, metavar="K",
        words=("auto",),
        help="Saves the membrane potential of every K-th step only and recomputes the others in "
        "the backward pass: less memory, more time; auto takes the square root of T, which saves "
        "and recomputes the fewest at once.")

    epochs: int = option("Optimisation", 20, newcomer=True, check=FROM_1, metavar="E",
        help="Sets how often training goes through the data.")
    batch_size: int = option("Optimisation", 64, check=FROM_1, metavar="B",
        help="Sets how many samples a training step takes.")
    accumulate: int = option("Optimisation", 1, result=False, beside=TAKE_UP, check=FROM_1,
        metavar="K",
        help="Works each batch off in K parts, one after the other, which takes less memory.")
    tbptt: int | None = option("Optimisation", None, check=FROM_1, metavar="K",
        help="Truncates backpropagation through time: takes sequences K bins at a time, carries "
        "the state from each piece to the next, and updates the weights after each by what the "
        "network says by then. Memory goes with K, not T; on a GPU steps are not captured.")
    lr: float = option("Optimisation", 1e-3, newcomer=True, check=ABOVE_0, metavar="RATE",
        help="Sets Adam's learning rate.")
    lr_batch_size: int | None = option("Optimisation", None, check=FROM_1, metavar="B",
        help="Names the batch size that --lr is meant for: the rate is multiplied by the square "
        "root of --batch-size / B.")
    weight_decay: float = option("Optimisation", 0.0, check=FROM_0, metavar="W",
        help="Sets Adam's L2 penalty on the weights.")
    schedule: str = option("Optimisation", "cosine", choices=("cosine", "plateau", "constant"),
        help="Chooses how the learning rate changes from epoch to epoch: along a cosine to 0, not "
        "at all (constant), or times 0.75 after 3 epochs without a lower training loss (plateau).")
    warmup_epochs: int = option("Optimisation", 0, check=FROM_0, metavar="E",
        help="Lets the learning rate rise step by step over the first E epochs.")
    clip_grad: float | None = option("Optimisation", None, check=FROM_0, metavar="NORM",
        shown="0.5 with --init quiet, 0 with paper",
        help="Scales the gradient down where its norm is larger than this; 0 never does.")
    # fmt: on

    def __post_init__(self):
        for f in OPTIONS:
            value = getattr(self, f.name)
            if f.type.startswith("tuple") and (_is_int(value) or isinstance(value, list)):
                value = tuple(value) if isinstance(value, list) else (value,)
                object.__setattr__(self, f.name, value)
            _check_value(f, value)
        batch, epochs = self.batch_size, self.epochs
        named = self.dataset in DATASETS or self.dataset.endswith((".h5", ".hdf5"))
        named = named or os.path.isdir(self.dataset) or self.train_file is not None
        for name, fits, expected in (
            ("seed", len(set(self.seed)) == len(self.seed), "different seeds"),
            ("accumulate", self.accumulate <= batch, f"at most batch_size ({batch})"),
            ("warmup_epochs", self.warmup_epochs < epochs, f"fewer than epochs ({epochs})"),
            ("dataset", named, f"{', '.join(DATASETS)} or a file ending in .h5, or a folder"),
            ("permuted", not self.permuted or self.made in PIXELS, f"one of {', '.join(PIXELS)}"),
            ("add_pairs", not self.add_pairs or self.made in (None, "synthetic"), "events"),
            ("test_speaker", self.test_speaker is None or not (self.made or self.test_file),
             "events from a file, and no test file"),
            ("tbptt", not (self.tbptt and NEURONS[self.neuron].needs_time_bins),
             f"a neuron that streams, {self.neuron} sees all bins at once"),
            ("time_constants", _is_range(self.time_constants), "the shortest and the longest"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {_short(getattr(self, name))}")
        if self.made in DENSE:
            for f in OPTIONS:
                kind, part = f.metadata.get("sets", (None, "time_bins"))
                if part != "time_bins" and getattr(self, f.name) != getattr(kind, part):
                    raise ValueError(
                        f"{f.name}: has no effect on the real-valued inputs of {self.made}: "
                        f"expected {getattr(kind, part)}, got {_short(getattr(self, f.name))}"
                    )
        for kind in (BinningConfig, Augmentation):
            try:
                kind(**self.settings(kind))
            except ValueError as error:
                # it names its own argument
                part, _, rest = str(error).partition(": ")
                names = {f.metadata.get("sets"): f.name for f in OPTIONS}
                raise ValueError(f"{names.get((kind, part), part)}: {rest}") from None

    @property
    def made(self) -> str | None:
        """The --dataset where that is neither a file nor shd or ssc; None where it is."""
        named = self.train_file is None and self.dataset in (*MADE, *PIXELS)
        return self.dataset if named else None

    def settings(self, kind: type) -> dict[str, Any]:
        """The arguments of BinningConfig or Augmentation that options set."""
        sets = {f.name: f.metadata["sets"] for f in OPTIONS if "sets" in f.metadata}
        return {part: getattr(self, name) for name, (of, part) in sets.items() if of is kind}

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values."""
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items()}


OPTIONS: tuple[dataclasses.Field, ...] = dataclasses.fields(TrainConfig)
# what a run that starts from another one's weights takes over from it
NETWORK_OPTIONS = tuple(
    f.name for f in OPTIONS
    if f.metadata["group"] == "Network" or f.metadata.get("sets", (None,))[0] is BinningConfig
)  # fmt: skip
RESULT_OPTIONS = tuple(f.name for f in OPTIONS if f.metadata["result"])


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
    """In which option that a result depends on two runs' options differ, in words, if in any."""
    there, here = completed(there), completed(here)
    for name in RESULT_OPTIONS:
        if there[name] != here[name]:
            return f"{name} {_short(there[name])} there, {_short(here[name])} here"
    return None


def _check_value(f: dataclasses.Field, value: Any) -> None:
    """Raise ValueError unless a value, from a file or a caller, fits a field."""
    if (value is None and "None" in f.type) or value in f.metadata.get("words", ()):
        return
    choices, (test, expected) = f.metadata.get("choices"), f.metadata.get("check", (bool, None))
    values = value if isinstance(value, tuple) else (value,)
    # a list of them, since a value that cannot be hashed cannot be looked up in a dict
    if choices is not None and not all(v in list(choices) for v in values):
        raise ValueError(f"{f.name}: expected one of {', '.join(choices)}, got {_short(value)}")
    kind = f.type.split(" | ")[0]
    fits = {
        "int": _is_int(value),
        "float": _is_number(value),
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "tuple[int, ...]": isinstance(value, tuple) and value and all(map(_is_int, value)),
        "tuple[float, ...]": isinstance(value, tuple) and all(map(_is_number, value)),
        "tuple[str, ...]": isinstance(value, tuple) and all(isinstance(v, str) for v in value),
    }[kind]
    if not fits:
        kind = {"tuple[int, ...]": "whole numbers", "tuple[float, ...]": "numbers"}.get(kind, kind)
        raise ValueError(f"{f.name}: expected {kind}, got {_short(value)}")
    if expected and not all(map(test, values)):
        raise ValueError(f"{f.name}: expected {expected}, got {_short(value)}")


def _is_range(values: tuple[float, ...] | None) -> bool:
    """Whether values are two, the first not the larger; or None."""
    return values is None or (len(values) == 2 and values[0] <= values[1])


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_int(value: Any) -> bool:
    """Whether a value is a whole number of a size that sizes, counts and seeds have."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = repr(_plain(value))
    return text if len(text) <= 60 else text[:57] + "..."
