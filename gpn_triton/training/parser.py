"""The command line of the training command, and what the parsers of all commands have in common.

An option's value comes from, later ones winning: its default, what a long task by --dataset puts in
its place, the preset, the --config file, the flag.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpn_triton.data.datasets import DATASETS, MADE
from gpn_triton.machine.provenance import VERSION
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training.options import (
    NETWORK_OPTIONS,
    OPTIONS,
    TAKE_UP,
    TrainConfig,
    check_names,
    did_you_mean,
)
from gpn_triton.training.presets import MEASURED, PRESETS, TASKS
from gpn_triton.training.progress import aligned
from gpn_triton.training.run_folder import CONFIG, newest, read_options, read_seed_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# how argparse reads a field of a type
_READ: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "float": {"type": float},
    "str": {},
    "bool": {"action": "store_true"},
    "tuple[int, ...]": {"type": int, "nargs": "+"},
    "tuple[float, ...]": {"type": float, "nargs": "+"},
    "tuple[str, ...]": {"nargs": "+"},
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are a ValueError of one line; no flag may be shortened."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        if self.add_help:
            add_version(self)

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the options)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's; an unknown flag is named, with the one that was probably meant."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            wrong = next((text.split("=")[0] for text in rest if text.startswith("-")), None)
            if wrong is None:
                self.error(f"unexpected argument {rest[0]}")
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown option {wrong}{did_you_mean(wrong, flags)}")
        return found


def add_version(parser: Any) -> None:
    """Give a parser, or a group of one, the flag that tells the version and ends the command."""
    about = "Shows the version."
    version = f"gpn-triton {VERSION}"
    parser.add_argument("--version", action="version", version=version, help=about)


def build_parser(everything: bool = False) -> Parser:
    """The training command's parser; it stores only the flags that were given.

    Args:
        everything: whether its help shows every option, or those that a newcomer needs.
    """
    hidden = sum(not f.metadata["newcomer"] for f in OPTIONS)
    parser = Parser(
        prog="python -m gpn_triton.train",
        usage="%(prog)s [options]",
        description="Train a spiking network of Gated Parametric Neurons (or a baseline) on events,"
        " choose the best epoch by validation, and test it once.",
        epilog="example: python -m gpn_triton.train --amp --preset shd-small --download"
        + ("" if everything else f"; --help-all shows the other {hidden} options"),
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    about = parser.add_argument_group("Help")
    about.add_argument("-h", "--help", action=_Help, help="Shows the options needed first.")
    about.add_argument("--help-all", action=_Help, help="Shows all options.")
    about.add_argument("--list-presets", action=_Presets,
        help="Shows what each preset sets, and what was measured of it.")  # fmt: skip
    add_version(about)
    add_options(parser, everything)
    return parser


def add_options(parser: Parser, everything: bool, without: Sequence[str] = ()) -> None:
    """Give a parser the training options as flags, in groups.

    Args:
        parser: whose argument_default is argparse.SUPPRESS. everything: as build_parser.
        without: options that are left out.
    """
    group = None
    for f in OPTIONS:
        if f.name in without:
            continue
        about = f.metadata
        if group is None or group.title != about["group"]:
            group = parser.add_argument_group(about["group"])
        text = about["help"].replace("%", "%%")
        shown = about.get("shown")
        if not shown and f.default not in (None, ()) and f.default is not False:
            values = f.default if isinstance(f.default, tuple) else (f.default,)
            shown = " ".join(map(str, values))
        if shown:
            text += f" (default: {shown})"
        given = {k: about[k] for k in ("choices", "metavar", "nargs", "const") if k in about}
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            help=text if everything or about["newcomer"] else argparse.SUPPRESS,
            **{**_READ[f.type.split(" | ")[0]], **_words(about), **given},
        )


def _words(about: dict[str, Any]) -> dict[str, Any]:
    """How argparse reads a whole number that may be a word."""
    if not (words := about.get("words")):
        return {}

    def read(text: str) -> int | str:
        return text if text in words else int(text)

    # argparse names a mistake by it
    read.__name__ = " or ".join(("int", *words))
    return {"type": read}


class _Help(argparse.Action):
    """Prints the help for newcomers, or all of it for --help-all, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str, **_: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        build_parser(option_string == "--help-all").print_help()
        parser.exit()


def list_presets() -> str:
    """A table of the presets and of the command without one, with what is measured of them."""
    rows = [("preset", "data", "network", "bins", "batch", "epochs", "rate", "dropout", "measured")]
    for name in (None, *PRESETS):
        cfg = configuration({} if name is None else {"preset": name})
        numbers = (cfg.time_bins, cfg.batch_size, cfg.epochs, f"{cfg.lr:g}", cfg.dropout)
        rows.append((
            name or "(none)", cfg.dataset, f"{cfg.neuron} {'-'.join(map(str, cfg.hidden))}",
            *map(str, numbers), MEASURED.get(name, "not yet"),
        ))  # fmt: skip
    return aligned(rows) + (
        "\n\nThe small and wide set-ups are those of the authors' two implementations, paper the "
        "small ones at the\npaper's time bins, authors the small one with the habits of their data "
        "pipeline. Whose network gave the\npaper's 90.8 % (SHD) and 78.3 % (SSC) is not published; "
        "neither has been measured here. best is this\nproject's own, for spoken words of few "
        "speakers (docs/results/accuracy.md)."
    )


class _Presets(argparse.Action):
    """Prints the presets and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str, **_: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(list_presets())
        parser.exit()


def parse(argv: list[str] | None = None) -> TrainConfig:
    """Read a configuration from command-line arguments.

    Args:
        argv: arguments without the program's name; None: the process's own.
    Returns:
        The configuration, with preset, file and flags merged in that order.
    Raises:
        ValueError: an unknown flag, or a value or a key that does not fit. FileNotFoundError: no
            such --config file or run folder. SystemExit: from argparse, for --help.
    """
    flags = vars(build_parser().parse_args(argv))
    for source in TAKE_UP:
        if source in flags:
            return _of_run(flags, source)
    return configuration(flags)


def given_options(flags: dict[str, Any]) -> dict[str, Any]:
    """The options that flags give, and under them those of the file that --config names."""
    return (_read_toml(flags["config"]) if "config" in flags else {}) | flags


def configuration(flags: dict[str, Any]) -> TrainConfig:
    """The configuration that flags ask for, with what --preset and --config name under them.

    Args:
        flags: options by name, those alone that were given.
    Raises:
        ValueError, FileNotFoundError: as parse.
    """
    given = given_options(flags)
    preset = dict(PRESETS.get(str(given.get("preset")), {}))
    if "train_file" in given and "dataset" in given:
        raise ValueError("dataset: expected either --dataset or --train-file, got both")
    for name in ("valid_file", "test_file"):
        if name in given and "train_file" not in given:
            raise ValueError(f"{name}: expected --train-file beside it")
    if "init_from" in given:
        there = read_seed_options(given["init_from"], "init_from")
        preset |= {name: there[name] for name in NETWORK_OPTIONS}
    cfg = TrainConfig(**{**_task(preset | given), **preset, **given})
    if _own_file(cfg) and "channel_shift" not in preset | given:
        cfg = dataclasses.replace(cfg, channel_shift=0)
    _refuse_ignored(cfg, given)
    return cfg


def _task(given: dict[str, Any]) -> dict[str, Any]:
    """What a long task puts in place of the options' defaults."""
    values = TASKS.get(str(given.get("dataset")), {})
    neuron = NEURONS.get(str(given.get("neuron", "gpn")))
    if values.get("readout") == "membrane" and neuron and neuron.membrane is None:
        values = {**values, "readout": "last"}
    return values


def _own_file(cfg: TrainConfig) -> bool:
    """Whether the data are a file of the user's own."""
    return cfg.train_file is not None or cfg.dataset not in DATASETS


def _refuse_ignored(cfg: TrainConfig, given: dict[str, Any]) -> None:
    """Raise ValueError if an option was given that has no effect beside the others."""
    data = "a file of your own" if _own_file(cfg) else f"--dataset {cfg.dataset}"
    without = f"--neuron {cfg.neuron}"
    ignored = {}
    if not NEURONS[cfg.neuron].is_gpn:
        ignored |= dict.fromkeys(("surrogate", "alpha", "checkpoint_every"), without)
        if cfg.backend not in NEURONS[cfg.neuron].backends:
            ignored["backend"] = without
        if cfg.neuron != "lstm":
            ignored["time_constants"] = without
    if cfg.init == "paper":
        ignored["time_constants"] = "--init paper"
    if cfg.init_from is not None:
        ignored |= dict.fromkeys(("init", "time_constants"), "--init-from")
    if not _own_file(cfg):
        ignored["channels"] = data
    if cfg.made not in MADE:
        ignored["samples"] = data
    if cfg.made not in ("synthetic", "recall"):
        ignored["classes"] = data
    if _own_file(cfg) or cfg.made in (*MADE, "digits"):
        ignored["download"] = data
    for name in ignored:
        if given.get(name):
            raise ValueError(
                f"{name}: has no effect beside {ignored[name]}: remove --{name.replace('_', '-')}"
            )


def _of_run(flags: dict[str, Any], source: str) -> TrainConfig:
    """The configuration a run folder holds, with what may be given anew beside it."""
    auto = flags[source] == "auto"
    run = flags[source]
    if auto:
        run = str(newest(flags.get("out", "runs"), source == "eval_only", source))
    allowed = {source, "out" if auto else source}
    allowed |= {f.name for f in OPTIONS if source in f.metadata["beside"]}
    if extra := ["--" + name.replace("_", "-") for name in sorted(set(flags) - allowed)]:
        raise ValueError(
            f"{source}: takes its options from {run}/{CONFIG}: remove {', '.join(extra)}"
        )
    cfg = TrainConfig(**{**read_options(run, source), **flags, source: run})
    if "test_file" in flags and cfg.train_file is None:
        raise ValueError(f"test_file: expected a run of --train-file, {run} is none")
    _refuse_ignored(cfg, flags)
    return cfg


def _read_toml(path: str) -> dict[str, Any]:
    """Options in a TOML file, by field name."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"config: no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config: {path} is not valid TOML: {error}") from None
    values = {k.replace("-", "_"): v for k, v in values.items()}
    for name in ("config", *TAKE_UP):
        if name in values:
            raise ValueError(f"{name}: is a flag only: remove it from {path}")
    if isinstance(values.get("amp"), bool):
        values["amp"] = "bf16" if values["amp"] else None
    check_names(values, f"config {path}")
    return values
