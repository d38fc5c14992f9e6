"""The pictures of the analyses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from gpn_triton.analysis.distributions import BINS, RANGES, Spreads, Trace
from gpn_triton.analysis.energy import Cost
from gpn_triton.analysis.gradients import Decay
from gpn_triton.analysis.heterogeneity import FREEZINGS, Loss
from gpn_triton.machine.figure import new_figure, save_figure

# a measured gradient below this is not drawn
LOWEST = 1e-14


def draw_decays(path: Path, found: dict[tuple[str, int, str], list[Decay]]) -> None:
    """The first layer's dL/dv against time: a row a readout, a column a T, a line a subject.

    Args:
        path: the PNG. found: by subject, T and readout, the decays of the layers.
    """
    from matplotlib import colormaps

    times, readouts = (list(dict.fromkeys(key[k] for key in found)) for k in (1, 2))
    subjects = list(dict.fromkeys(key[0] for key in found))
    figure, panels = new_figure(len(readouts), len(times))
    for (subject, T, readout), layers in found.items():
        axes, at = panels[readouts.index(readout), times.index(T)], subjects.index(subject)
        color = f"C{at}" if len(subjects) <= 10 else colormaps["turbo"](at / len(subjects))
        decay = layers[0]
        steps, end = range(1, T), float(decay.v[-1])
        measured = [max(float(v) / end, LOWEST) if end else LOWEST for v in decay.v]
        axes.semilogy(steps, measured, color=color, label=subject, linewidth=1)
        if readout == "last":
            factor = [max(float(f), LOWEST) for f in decay.factor]
            axes.semilogy(steps, factor, color=color, linestyle=":", linewidth=1)
        axes.set_title(f"T = {T}, {'last step' if readout == 'last' else 'mean'}", fontsize=9)
        axes.set_xlabel("t")
    panels[0, 0].set_ylabel("|dL/dv[t]| / |dL/dv[T-1]|")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    save_figure(path, figure)


def draw_spreads(path: Path, spreads: Spreads) -> None:
    """Each gate's histogram over everything, and its neurons' means; a row a layer."""
    figure, panels = new_figure(len(spreads), len(spreads[0]))
    for row, layer in zip(panels, spreads, strict=True):
        for axes, (name, of) in zip(row, layer.items(), strict=True):
            low, high = RANGES[name]
            at = [low + (k + 0.5) * (high - low) / BINS for k in range(BINS)]
            share = of.histogram / of.histogram.sum()
            axes.fill_between(at, share.tolist(), step="mid", color="0.8", label="all values")
            means = of.neuron_means.tolist()
            weights = [1 / len(means)] * len(means)
            axes.hist(means, BINS, range=(low, high), weights=weights, color="C0", alpha=0.7,
                      label="neurons' means")  # fmt: skip
            axes.set_title(name)
    panels[0, 0].legend(frameon=False, fontsize=7)
    panels[0, 0].set_ylabel("share")
    save_figure(path, figure)


def draw_traces(path: Path, traces: Sequence[Trace], neurons: int = 5) -> None:
    """One sample: the first layer's raster, and its busiest neurons' membranes and gates."""
    trace = traces[0]
    figure, panels = new_figure(2 + len(trace.gates), 1, (7.0, 1.6))
    raster, membrane, *gates = panels[:, 0]
    t, n = trace.spikes.nonzero(as_tuple=True)
    raster.plot(t.tolist(), n.tolist(), "|", color="0.2", markersize=2)
    raster.set_ylabel("neuron")
    chosen = trace.spikes.sum(0).argsort(descending=True)[:neurons].tolist()
    for axes, name, values in (
        (membrane, "h", trace.h),
        *((axes, *gate) for axes, gate in zip(gates, trace.gates.items(), strict=True)),
    ):
        axes.plot(values[:, chosen].numpy(), linewidth=0.8)
        axes.set_ylabel(name)
    panels[-1, 0].set_xlabel("t")
    save_figure(path, figure)


def draw_losses(path: Path, series: dict[str, list[str]], losses: Sequence[Loss]) -> None:
    """Accuracy lost by each freezing against the task's complexity; a panel a series."""
    figure, panels = new_figure(1, len(series))
    for axes, (name, tasks) in zip(panels[0], series.items(), strict=True):
        for how in FREEZINGS:
            lost = [[x.lost[how] for x in losses if x.task == task] for task in tasks]
            means = [statistics.mean(points) for points in lost]
            spread = [statistics.stdev(points) if len(points) > 1 else 0.0 for points in lost]
            axes.errorbar(range(len(tasks)), means, spread, capsize=2, label=f"frozen over {how}")
        labels = [Path(task).stem.removeprefix(f"{name}-") for task in tasks]
        axes.set_xticks(range(len(tasks)), labels)
        axes.set_xlabel(name)
        axes.axhline(0, color="0.8", linewidth=0.8)
    panels[0, 0].set_ylabel("accuracy lost, points")
    panels[0, 0].legend(frameon=False, fontsize=7)
    save_figure(path, figure)


def draw_costs(path: Path, costs: Sequence[Cost]) -> None:
    """Test accuracy against energy, a point a network."""
    figure, ((axes,),) = new_figure(1, 1, (5.0, 3.6))
    for c in costs:
        if c.test is not None:
            axes.plot(c.energy_nj, c.test, "o", color="C0" if c.neuron.startswith("gpn") else "0.5")
            label = f"{c.neuron} {'-'.join(map(str, c.hidden))}"
            axes.annotate(label, (c.energy_nj, c.test), fontsize=7, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("energy a sample, nJ (counted)")
    axes.set_ylabel("test accuracy, %")
    save_figure(path, figure)
