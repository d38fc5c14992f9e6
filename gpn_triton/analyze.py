"""Look into neurons and trained networks.

python -m gpn_triton.analyze gradients RUN --time-bins 20 100 500
python -m gpn_triton.analyze gradients --neuron gpn lif lstm --width 64 256 --depth 1 2
python -m gpn_triton.analyze parameters RUN FILE.h5
python -m gpn_triton.analyze heterogeneity order-1 order-2 order-3 gap-0 gap-200 gap-400
python -m gpn_triton.analyze cost RUN OTHER_RUN ...

Everything runs on the CPU, step by step by the specification of the neurons.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpn_triton.analysis import distributions as spreads_of
from gpn_triton.analysis import energy, gradients, heterogeneity, pictures
from gpn_triton.analysis.grid import prepare
from gpn_triton.analysis.report import markdown, number, write_csv
from gpn_triton.analysis.subject import bin_samples, check_store, label_of, load_data, run_samples
from gpn_triton.analysis.tasks import TASKS
from gpn_triton.data.sources.hdf5 import read_events
from gpn_triton.data.sources.synthetic import synthetic_events
from gpn_triton.machine.command import answer
from gpn_triton.machine.figure import new_figure
from gpn_triton.neurons.networks import NEURONS, SpikingClassifier
from gpn_triton.training import run_folder
from gpn_triton.training.experiment import run_experiment
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.parser import Parser, add_options, configuration

# options of a training that heterogeneity sets itself, or that have no place in it
OWN = (
    "neuron", "dataset", "train_file", "valid_file", "test_file", "samples", "classes", "data_dir",
    "download", "resume", "eval_only", "out", "profile",
)  # fmt: skip
# the trainings of heterogeneity where no option says otherwise: 20 ms a bin
SMALL: dict[str, Any] = {
    "hidden": (64,), "time_bins": 35, "max_time": 0.7, "epochs": 15, "batch_size": 32, "lr": 5e-3,
    "dropout": 0.2,
}  # fmt: skip


def build_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m gpn_triton.analyze",
        description="Look into neurons and trained networks; every analysis leaves tables as CSV "
        "and pictures in a folder.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def kind(name: str, run: Any, help: str, **options: Any) -> Parser:
        made = kinds.add_parser(name, help=help, description=help, **options)
        made.set_defaults(run=run)
        made.add_argument("--out", metavar="DIR", help="Sets the folder for what is found.")
        return made

    sub = kind("gradients", _gradients, "Draws how far back the gradient of a loss reaches.")
    sub.add_argument("runs", nargs="*", metavar="RUN", help="Names trained runs; of each the kept "
                    "epochs (train --keep-epochs) and the best are looked at.")  # fmt: skip
    sub.add_argument("--neuron", nargs="+", choices=NEURONS, default=[], metavar="NAME",
                    help="Names neurons of which new networks are looked at.")  # fmt: skip
    sub.add_argument("--width", nargs="+", type=int, default=[128], metavar="N",
                    help="Sets the neurons a layer of new networks (default: 128).")  # fmt: skip
    sub.add_argument("--depth", nargs="+", type=int, default=[1], metavar="L",
                    help="Sets the hidden layers of new networks (default: 1).")  # fmt: skip
    sub.add_argument("--time-bins", nargs="+", type=int, default=[20, 100, 500], metavar="T",
                    help="Sets the numbers of time bins (default: 20 100 500).")  # fmt: skip
    sub.add_argument("--epochs", nargs="+", type=int, metavar="E",
                    help="Chooses among a run's kept epochs (default: all).")  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, metavar="S",
                    help="Sets the seed of new networks (default: 0).")  # fmt: skip
    _add_samples(sub, 32)

    sub = kind("parameters", _parameters, "Draws how a trained GPN's gates are spread over neurons "
              "and time, and what one sample does.")  # fmt: skip
    sub.add_argument("runs", nargs=1, metavar="RUN", help="Names a trained run of GPN.")
    sub.add_argument("file", nargs="?", metavar="FILE.h5", help="Names samples in SHD's layout "
                    "(default: the run's own validation data).")  # fmt: skip
    sub.add_argument("--sample", type=int, default=0, metavar="K",
                    help="Chooses the sample that is drawn (default: 0).")  # fmt: skip

    sub = kind("heterogeneity", _heterogeneity, "Trains GPN on tasks of growing temporal "
               "complexity and tells what frozen gates cost. The other options are those of "
               "python -m gpn_triton.train.", argument_default=argparse.SUPPRESS)  # fmt: skip
    sub.add_argument("tasks", nargs="+", metavar="TASK", help="Names tasks, a series in the order "
                    f"of its complexity: {', '.join(TASKS)}, or training files in SHD's layout."
                    )  # fmt: skip
    sub.add_argument("--samples", type=int, default=600, metavar="K",
                    help="Sets the training samples of a task (default: 600).")  # fmt: skip
    add_options(sub, everything=True, without=OWN)

    sub = kind("cost", _cost, "Tells operations, memory traffic, spikes and energy of trained "
               "runs, compared with the first.")  # fmt: skip
    sub.add_argument("runs", nargs="+", metavar="RUN", help="Names trained runs.")
    sub.add_argument("--constants", metavar="FILE.json", help="Names other constants of energy: "
                    "mac_pj, ac_pj, byte_pj, source.")  # fmt: skip
    _add_samples(sub, None)
    return parser


def _add_samples(parser: Parser, most: int | None) -> None:
    parser.add_argument("--file", metavar="FILE.h5", help="Names samples in SHD's layout (default: "
                        "a run's own validation data; for new networks synthetic ones)."
                        )  # fmt: skip
    parser.add_argument("--samples", type=int, default=most, metavar="K",
                        help=f"Takes so many samples at most (default: {most or 'all'})."
                        )  # fmt: skip


def _out(args: argparse.Namespace, default: str) -> Path:
    """The folder for what is found: asked for, or beside the run."""
    if getattr(args, "out", None):
        return Path(args.out)
    runs = getattr(args, "runs", [])
    return Path(runs[0]) / default if runs else Path("runs") / default


def _positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _gradients(args: argparse.Namespace) -> None:
    if not args.runs and not args.neuron:
        raise ValueError("gradients: expected a RUN, or --neuron NAME")
    for T, N, L in itertools.product(args.time_bins, args.width, args.depth):
        _positive(**{"time-bins": T, "width": N, "depth": L, "samples": args.samples})
    found, rows = {}, []
    for T in args.time_bins:
        for subject, model, x, labels in _subjects(args, T):
            # a readout that sees the membrane has weights of another shape
            own = model.readout
            for readout in [own] if own == "membrane" else ["last", "mean"]:
                model.readout = readout
                layers = gradients.decays(model, x, labels)
                found[subject, T, readout] = layers
                for d in layers:
                    for t, values in enumerate(zip(d.h, d.v, d.factor, strict=True), 1):
                        rows.append([subject, T, readout, d.layer, t, *map(float, values)])
    out = _out(args, "gradients")
    titles = ["subject", "T", "readout", "layer", "t", "g_h", "g_v", "factor"]
    write_csv(out / "gradients.csv", titles, rows)
    pictures.draw_decays(out / "gradients.png", found)
    table = [
        (subject, str(T), str(d.layer), number(d.half_life(), "d", "never"),
         number(d.gone(), "d", f"beyond {T - 2}"), f"{d.kept():.2g}", f"{float(d.factor[0]):.2g}")
        for (subject, T, readout), layers in found.items() if readout == "last" for d in layers
    ]  # fmt: skip
    titles = ("network", "T", "layer", "half-life, steps", f"under {gradients.GONE:g} after",
              "kept at t = 1", "diagonal's product")  # fmt: skip
    print(f"{markdown(titles, table)}loss at the last step; {out}/gradients.csv, .png")


def _subjects(
    args: argparse.Namespace, T: int
) -> Iterator[tuple[str, SpikingClassifier, torch.Tensor, torch.Tensor]]:
    """Every network to look at, with its name, and samples in T bins."""
    for run in args.runs:
        trained = run_folder.load_run(run)
        samples = run_samples(trained, args.file, args.samples, T)
        x, labels = torch.cat([*samples.batches], 1), torch.cat(samples.labels)
        kept = run_folder.kept_weights(run)
        for epoch in kept if args.epochs is None else args.epochs:
            if epoch not in kept:
                raise ValueError(f"epochs: {run} kept {list(kept) or 'none'}, got {epoch}")
            model = copy.deepcopy(trained.model)
            run_folder.load_weights(kept[epoch], model)
            yield f"{label_of(run)}, epoch {epoch}", model, x, labels
        yield f"{label_of(run)}, best", trained.model, x, labels
    if not args.neuron:
        return
    if args.file:
        store = read_events(args.file, use_cache=False)
        check_store(store, args.file)
    else:
        store = synthetic_events(args.samples, range(8), 0)
    samples = bin_samples(TrainConfig(time_bins=T), store, args.samples)
    x, labels = torch.cat([*samples.batches], 1), torch.cat(samples.labels)
    for name, N, L in itertools.product(args.neuron, args.width, args.depth):
        gradients.check_stepwise(name)
        torch.manual_seed(args.seed)
        classes = len(store.class_names)
        model = SpikingClassifier([N] * L, name, store.num_channels, classes, backend="torch")
        yield f"{name} {'-'.join([str(N)] * L)}", model.eval(), x, labels


def _parameters(args: argparse.Namespace) -> None:
    trained = run_folder.load_run(args.runs[0])
    model = trained.model
    spreads_of.check_gated(model)
    samples = run_samples(trained, args.file)
    sample = samples.sample(args.sample)
    spreads = spreads_of.spread(model, samples.batches)
    cfg, out = trained.config, _out(args, "parameters")
    bin_ms = 1000 * cfg.max_time / cfg.time_bins
    rows, table, lines = [], [], []
    for layer, gates in enumerate(spreads, 1):
        for name, of in gates.items():
            variances = of.variances()
            whole = sum(variances.values())
            shares = (f"{100 * v / whole:.0f} %" if whole else "" for v in variances.values())
            low, middle, high = spreads_of.percentiles(of.neuron_means)
            table.append((f"{layer} {name}", f"{low:.2f}", f"{middle:.2f}", f"{high:.2f}",
                          f"{whole:.4f}", *shares))  # fmt: skip
            rows += [[layer, name, n, float(mean)] for n, mean in enumerate(of.neuron_means)]
        if "f" in gates:
            tau = spreads_of.time_constants_ms(gates["f"].neuron_means, bin_ms)
            low, middle, high = spreads_of.percentiles(tau)
            of = spreads_of.MEMBRANE
            inside = 100 * spreads_of.share_inside(tau, of)
            lines.append(f"layer {layer}: time constants -dt / ln f of the neurons' mean f, 5th, "
                         f"50th, 95th percentile: {low:.0f}, {middle:.0f}, {high:.0f} ms at dt = "
                         f"{bin_ms:.3g} ms; {inside:.0f} % within the published {of.low} to "
                         f"{of.high} {of.unit}")  # fmt: skip
        if "theta" in gates:
            low, _, high = spreads_of.percentiles(gates["theta"].neuron_means)
            of = spreads_of.THRESHOLD
            lines.append(f"layer {layer}: thresholds have no volts; their 95th percentile is "
                         f"{high / low:.2f} times the 5th, the published {of.low} to {of.high} "
                         f"{of.unit} span {of.high / of.low:.2f}")  # fmt: skip
    write_csv(out / "parameters.csv", ["layer", "gate", "neuron", "mean"], rows)
    pictures.draw_spreads(out / "parameters.png", spreads)
    pictures.draw_traces(out / "traces.png", spreads_of.trace(model, sample))
    titles = ("layer, gate", "5 %", "neurons' median", "95 %", "variance", "between neurons",
              "between samples", "over time")  # fmt: skip
    print(markdown(titles, table) + "\n".join(lines))
    print(f"published: {spreads_of.CORTEX}; {out}/parameters.csv, .png, traces.png")


def _heterogeneity(args: argparse.Namespace) -> None:
    flags = vars(args).copy()
    out = _out(args, "heterogeneity")
    tasks, samples = list(dict.fromkeys(flags.pop("tasks"))), flags.pop("samples")
    options = {k: v for k, v in flags.items() if k not in ("run", "kind", "out")}
    found = []
    for task in tasks:
        folder = out / Path(task).stem
        files = heterogeneity.task_files(task, folder, samples)
        cfg = configuration({**SMALL, **options, **files, "neuron": "gpn", "out": str(folder)})
        run = folder / "run"
        prepare(run, cfg)
        run_experiment(dataclasses.replace(cfg, resume=str(run)))
        splits = load_data(cfg)
        training, test = bin_samples(cfg, splits.train), bin_samples(cfg, splits.test)
        for seed, path in zip(cfg.seed, run_folder.seed_folders(run, cfg.seed), strict=True):
            model = run_folder.load_run(path).model
            found.append(heterogeneity.losses(model, training, test, task, seed))
    hows = heterogeneity.FREEZINGS
    rows = [[x.task, x.seed, x.accuracy, *(x.lost[how] for how in hows)] for x in found]
    titles = ["task", "seed", "accuracy", *(f"lost_{how}" for how in hows)]
    write_csv(out / "heterogeneity.csv", titles, rows)
    pictures.draw_losses(out / "heterogeneity.png", heterogeneity.series_of(tasks), found)
    table = []
    for task in tasks:
        own = [row[2:] for row in rows if row[0] == task]
        means = [sum(column) / len(own) for column in zip(*own, strict=True)]
        table.append((task, *(f"{mean:.1f}" for mean in means)))
    titles = ("task", "test, %", *(f"lost, frozen over {how}" for how in hows))
    print(f"{markdown(titles, table)}{out}/heterogeneity.csv, .png")


def _cost(args: argparse.Namespace) -> None:
    _positive(samples=args.samples)
    constants = energy.Constants.read(args.constants) if args.constants else energy.Constants()
    costs = []
    for run in args.runs:
        trained, path = run_folder.load_run(run), Path(run) / run_folder.RESULT
        test = 100 * json.loads(path.read_text())["test_accuracy"] if path.exists() else None
        samples = run_samples(trained, args.file, args.samples)
        costs.append(energy.measure(trained, samples, test, constants))
    rows, table = [], []
    for run, (c, same, share) in zip(args.runs, energy.comparisons(costs), strict=True):
        op, size = c.operations, "-".join(map(str, c.hidden))
        rates = " ".join(f"{rate:.3f}" for rate in c.rates)
        rows.append([label_of(run), c.neuron, size, c.parameters, c.test, rates, c.events, c.spikes,
                     op.macs, op.acs, op.bytes, c.energy_nj, " ".join(same)])  # fmt: skip
        spiking = NEURONS[c.neuron].spiking
        table.append((
            f"{c.neuron} {size}", number(c.test, ".1f"), f"{c.parameters:,}",
            rates if spiking else "", f"{c.spikes:.0f}" if spiking else "", f"{op.macs / 1e3:,.0f}",
            f"{op.acs / 1e3:,.0f}", f"{op.bytes / 2**20:.2f}", f"{c.energy_nj / 1e3:.1f}",
            f"{share:.2f}", ", ".join(same),
        ))  # fmt: skip
    out = _out(args, "cost")
    titles = ["run", "neuron", "hidden", "parameters", "test", "rates", "events", "spikes", "macs",
              "acs", "bytes", "energy_nj", "equal_in"]  # fmt: skip
    write_csv(out / "cost.csv", titles, rows)
    pictures.draw_costs(out / "cost.png", costs)
    titles = ("network", "test, %", "parameters", "rate a layer", "spikes", "k MAC", "k additions",
              "MiB moved", "energy, uJ", "of the first's", "equal to the first in")  # fmt: skip
    print(f"{markdown(titles, table)}a sample; energy: {constants.source}; {out}/cost.csv, .png")


def run(argv: list[str] | None) -> int:
    """Do what the command line asks for; returns the exit status."""
    args = build_parser().parse_args(argv)
    # said before anything is computed
    new_figure(1, 1)
    args.run(args)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return answer(
        lambda: run(argv), ValueError, OSError, MemoryError, ModuleNotFoundError, ArithmeticError
    )


if __name__ == "__main__":
    sys.exit(main())
