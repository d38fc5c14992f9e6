"""The grid's outcomes as a table, a CSV file and a picture: every neuron beside GPN."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from gpn_triton.analysis.grid import Outcomes, at_best_rates, best_rates
from gpn_triton.analysis.report import markdown, number, write_csv, write_text
from gpn_triton.machine.figure import new_figure, save_figure
from gpn_triton.neurons.networks import NEURONS

MARKDOWN, CSV, PICTURE, SPEAKERS = "table.md", "table.csv", "accuracy.png", "speakers.md"
# whom the others are compared with
BASELINE = "gpn"


@dataclass(frozen=True)
class Row:
    """One neuron of the grid, at its best learning rate.

    test, deviation: accuracy on the test part over the seeds, %. valid: by validation, %.
    difference: of test to GPN's over the seeds that both have, points; p: of a paired t-test that
    it is 0, two-sided, one test a row. spike_rate: spikes a neuron and step, of spiking neurons.
    None: not there.
    """

    neuron: str
    lr: float | None = None
    seeds: int = 0
    test: float | None = None
    deviation: float | None = None
    valid: float | None = None
    difference: float | None = None
    p: float | None = None
    parameters: int | None = None
    seconds_per_epoch: float | None = None
    spike_rate: float | None = None


def rows_of(neurons: Sequence[str], outcomes: Outcomes) -> list[Row]:
    """A row for every neuron of a grid, in the order given."""
    best = best_rates(outcomes)
    kept: dict[str, dict[int, list[dict]]] = {name: {} for name in neurons}
    for cell, result in at_best_rates(outcomes):
        kept[cell.neuron].setdefault(cell.seed, []).append(result)
    # one result a seed, the mean over the speakers that were left out
    of = {
        name: {seed: _mean_result(some) for seed, some in seeds.items()}
        for name, seeds in kept.items()
    }
    return [_row(name, best.get(name), of[name], of.get(BASELINE, {})) for name in neurons]


def _mean_result(results: Sequence[dict]) -> dict:
    """One result of several: the mean of what the table shows."""
    means = {
        key: statistics.mean(result[key] for result in results)
        for key in ("test_accuracy", "valid_accuracy", "seconds_per_epoch")
    }
    rates = [statistics.mean(result["activity"]) for result in results if result["activity"]]
    return {**results[0], **means, "activity": [statistics.mean(rates)] if rates else []}


def speakers_table(neurons: Sequence[str], outcomes: Outcomes) -> str:
    """Test accuracy on each speaker that was left out, over the seeds, as a Markdown table.

    The mean over speakers has its 95 % confidence interval, by Student's t with speakers as draws.
    """
    found: dict[str, dict[int, list[float]]] = {name: {} for name in neurons}
    for cell, result in at_best_rates(outcomes):
        own = found[cell.neuron].setdefault(cell.speaker, [])
        own.append(100 * result["test_accuracy"])
    speakers = sorted({cell.speaker for cell in outcomes})
    lines = []
    for name in neurons:
        cells = [spread(found[name].get(speaker, [])) for speaker in speakers]
        means = [statistics.mean(accuracies) for accuracies in found[name].values()]
        lines.append((name, *cells, interval(means)))
    heads = [f"speaker {speaker}" for speaker in speakers]
    return markdown(("neuron", *heads, "mean, % (95 % interval over speakers)"), lines)


def spread(values: Sequence[float]) -> str:
    """Mean and deviation of some percentages; a dash of none."""
    mean = number(statistics.mean(values) if values else None, ".1f")
    return mean + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def interval(means: Sequence[float]) -> str:
    """The mean of some independent percentages, and its 95 % interval by Student's t.

    Raises:
        ModuleNotFoundError: scipy, in the extra `analysis`, is not installed.
    """
    if len(means) < 2:
        return spread(means)
    half = student_t(0.975, len(means) - 1) * statistics.stdev(means) / len(means) ** 0.5
    mean = statistics.mean(means)
    return f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f})"


def _row(neuron: str, lr: float | None, own: dict[int, dict], baseline: dict[int, dict]) -> Row:
    if not own:
        return Row(neuron)
    test = [100 * result["test_accuracy"] for result in own.values()]
    both = sorted(own.keys() & baseline.keys()) if neuron != BASELINE else []
    pairs = [[100 * of[seed]["test_accuracy"] for seed in both] for of in (own, baseline)]
    difference = statistics.mean(pairs[0]) - statistics.mean(pairs[1]) if both else None
    rates = [statistics.mean(result["activity"]) for result in own.values()]
    return Row(
        neuron,
        lr,
        len(test),
        statistics.mean(test),
        statistics.stdev(test) if len(test) > 1 else None,
        100 * statistics.mean(result["valid_accuracy"] for result in own.values()),
        difference,
        paired_p(*pairs),
        next(iter(own.values()))["parameters"],
        statistics.median(result["seconds_per_epoch"] for result in own.values()),
        statistics.mean(rates) if NEURONS[neuron].spiking else None,
    )


def paired_p(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The two-sided p of a paired t-test; None of fewer than two pairs or of equal differences.

    Raises:
        ModuleNotFoundError: scipy, in the extra `analysis`, is not installed.
    """
    if len({x - y for x, y in zip(a, b, strict=True)}) < 2:
        return None
    return float(_scipy_stats().ttest_rel(a, b).pvalue)


def student_t(quantile: float, freedom: int) -> float:
    """A quantile of Student's distribution; raises as paired_p."""
    return float(_scipy_stats().t.ppf(quantile, freedom))


def _scipy_stats():
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise ModuleNotFoundError("scipy is missing (pip install 'gpn-triton[analysis]')") from None
    return stats


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    titles = (
        "neuron", "test, %", "to GPN, points (p)", "valid, %", "lr", "seeds", "parameters",
        "s an epoch", "spike rate",
    )  # fmt: skip
    lines = []
    for row in rows:
        test = number(row.test, ".1f") + (f" ± {row.deviation:.1f}" if row.deviation else "")
        p = "" if row.p is None else f" ({row.p:.3f})" if row.p >= 0.001 else " (<0.001)"
        lines.append((
            row.neuron, test, number(row.difference, "+.1f") + p, number(row.valid, ".1f"),
            number(row.lr, "g"), str(row.seeds), number(row.parameters, ","),
            number(row.seconds_per_epoch, ".2f"), number(row.spike_rate, ".3f"),
        ))  # fmt: skip
    return markdown(titles, lines)


def write_table(out: Path, rows: Sequence[Row], title: str) -> None:
    """Write the rows into a folder, as table.md, table.csv and accuracy.png."""
    write_text(out / MARKDOWN, table(rows))
    write_csv(out / CSV, [f.name for f in fields(Row)], map(astuple, rows))
    drawn = [row for row in rows if row.test is not None]
    figure, ((axes,),) = new_figure(1, 1, (1.2 + 0.45 * len(rows), 3.4))
    axes.bar(
        [row.neuron for row in drawn],
        [row.test for row in drawn],
        yerr=[row.deviation or 0 for row in drawn],
        color=["C0" if row.neuron.startswith(BASELINE) else "0.6" for row in drawn],
        capsize=3,
    )
    axes.tick_params(axis="x", rotation=60)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(title, fontsize=9)
    save_figure(out / PICTURE, figure)
