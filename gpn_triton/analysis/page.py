"""The page of one run or several: an HTML file that opens without a network."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpn_triton.analysis.answers import Answers, View
from gpn_triton.analysis.plots import color_of, draw_confusion, draw_curves, draw_spent
from gpn_triton.analysis.record import Record, differing, spent
from gpn_triton.analysis.report import number
from gpn_triton.analysis.sample_plot import MOST_NEURONS, MOST_STEPS, draw_sample
from gpn_triton.data.dense import DenseStore
from gpn_triton.machine.provenance import VERSION

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; margin: 0; background: #f5f6f8; }
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem; }
section { background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; padding: 1rem 1.4rem;
  margin: 1.2rem 0; overflow-x: auto; }
h1 { font-size: 1.5rem; margin: 0.4rem 0; } h2 { font-size: 1.15rem; margin: 0.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0.2rem; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: right; padding: 0.25rem 0.7rem; border-bottom: 1px solid #e1e5ea;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: #5b6775; font-weight: 600; white-space: normal; overflow-wrap: anywhere; }
td:first-child, th:first-child { text-align: left; }
p, li { max-width: 60rem; } p { margin: 0.3rem 0; } .muted { color: #5b6775; font-size: 13px; }
.dot { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; }
pre { font-size: 11px; overflow-x: auto; } nav a { margin-right: 1rem; color: #0072b2; }
"""


@dataclass(frozen=True)
class Looked:
    """A run with its data: what it answers, and samples that are shown.

    views: none of a network that sees all bins at once. source: where the samples are from.
    """

    record: Record
    answers: Answers
    views: list[View]
    source: str


def build_page(records: Sequence[Record], looked: Sequence[Looked]) -> str:
    """The page's text.

    Args:
        records: the runs. looked: those whose data were at hand; empty: none.
    """
    from plotly.offline import get_plotlyjs

    several = len(records) > 1
    title = f"{len(records)} runs" if several else f"Run {records[0].label}"
    sections = [
        ("outcome", "Outcome", _outcome(records)),
        ("curves", "Curves", _curves(records)),
        ("options", "Options that differ", _options(records)),
        ("time", "Where the time went", _time(records)),
    ]
    if looked:
        sections[2:2] = [
            ("confusion", "What was taken for what", _confusions(looked)),
            ("samples", "Samples, bin by bin", _samples(looked)),
        ]
    links = "".join(f'<a href="#{name}">{_text(head)}</a>' for name, head, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{_text(head)}</h2>{content}</section>'
        for name, head, content in sections
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<script>{get_plotlyjs()}</script></head><body><main><h1>{_text(title)}</h1>"
        f'<nav>{links}</nav>{body}<p class="muted">gpn_triton {VERSION}</p></main></body></html>\n'
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _figure(figure: Any, name: str) -> str:
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config=config, auto_play=False
    )


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _named(records: Sequence[Record]) -> list[str]:
    """The runs' names with their colors."""
    return [
        f'<span class="dot" style="background:{color_of(k)}"></span> {_text(record.label)}'
        for k, record in enumerate(records)
    ]


def _learns_number(record: Record) -> bool:
    """Whether a run learned a number, which has one name in place of the classes'."""
    return len(record.header.get("class_names", ())) == 1


def _outcome(records: Sequence[Record]) -> str:
    titles = ("run", "network", "data", "T", "epochs", "best epoch", "validation", "test",
              "parameters", "device", "commit")  # fmt: skip
    rows = []
    for name, record in zip(_named(records), records, strict=True):
        options, result = record.options, record.result or {}
        best, is_number = record.best, _learns_number(record)
        valid, test = best and best.valid_accuracy, result.get("test_accuracy")
        how, scale = ".2f", 100
        if is_number:
            valid, test = best and best.valid_loss, result.get("test_loss")
            how, scale = ".5f", 1
        valid, test = (v if v is None else scale * v for v in (valid, test))
        data = Path(options["train_file"] or options["dataset"]).name
        rows.append([
            name, _text(f"{options['neuron']} {'-'.join(map(str, options['hidden']))}"),
            _text(data), str(options["time_bins"]), f"{len(record.epochs)} of {options['epochs']}",
            number(best and best.epoch, "d", "not finished"), number(valid, how),
            number(test, how), number(result.get("parameters"), ",d"),
            _text(record.header["device"] or ""), _text((record.header["commit"] or "")[:12]),
        ])  # fmt: skip
    unit = "squared error" if all(map(_learns_number, records)) else "%, or squared error"
    if not any(map(_learns_number, records)):
        unit = "%"
    return _table(titles, rows) + (
        f'<p class="muted">Validation and test: {unit}. The test set was read once, after the last '
        "epoch, by the weights of the best epoch on the validation data.</p>"
    )


def _curves(records: Sequence[Record]) -> str:
    figure = draw_curves(records, all(map(_learns_number, records)))
    return _figure(figure, "plot-curves") + (
        '<p class="muted">Of loss and accuracy the dotted line is the training, the solid one the '
        "validation data, and the star the epoch that was tested. Of several layers the first is "
        "solid, the next dashed, dotted, dash-dotted. A click on a run's name hides it.</p>"
    )


def _options(records: Sequence[Record]) -> str:
    found = differing(records)
    titles = ["option", *_named(records)] if len(records) > 1 else ["option", "default", "this run"]
    if not found:
        return "<p>None.</p>"
    rows = [
        [f"--{name.replace('_', '-')}", *(_text(_value(value)) for value in values)]
        for name, values in found.items()
    ]
    return _table(titles, rows)


def _value(value: Any) -> str:
    """An option's value as one would type it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not given" if value is None else str(value)


def _time(records: Sequence[Record]) -> str:
    titles = ("run", "training, s", "s an epoch", "the floor, s an epoch", "share of the floor",
              "samples/s", "peak MiB", "profiled")  # fmt: skip
    rows, profiles = [], ""
    for k, (name, record) in enumerate(zip(_named(records), records, strict=True)):
        seconds, result = [epoch.seconds for epoch in record.epochs], record.result or {}
        rate = statistics.median(epoch.samples_per_second for epoch in record.epochs)
        rows.append([
            name, f"{sum(seconds):.1f}", f"{statistics.median(seconds):.3g}",
            number(result.get("floor_seconds_per_epoch"), ".3g"),
            number(result.get("fraction_of_floor"), ".2f"), f"{rate:.0f}",
            number(result.get("peak_memory_mib"), ".0f"), "yes" if record.profile else "no",
        ])  # fmt: skip
        if record.profile:
            about, longest = spent(record.profile)
            figure = _figure(draw_spent(longest), f"plot-time-{k}") if longest else ""
            profiles += (
                f"<h3>{name}</h3><p>{_text(about)}</p>{figure}<details><summary>The whole table"
                f"</summary><pre>{_text(record.profile)}</pre></details>"
            )
    if not profiles:
        profiles = (
            '<p class="muted">A run with --profile N also tells here, kernel by kernel or op by op,'
            " where the time of N of its steps went.</p>"
        )
    return _table(titles, rows) + (
        '<p class="muted">The floor is the least time that the counted operations and bytes allow '
        f"on the device. Validation and test are not counted.</p>{profiles}"
    )


def _confusions(looked: Sequence[Looked]) -> str:
    """A matrix for runs of the same classes, and which classes each takes for another most."""
    groups: dict[tuple[str, ...], list[Looked]] = {}
    for one in looked:
        groups.setdefault(one.answers.trained.class_names, []).append(one)
    parts = ["<ul>"]
    for one in looked:
        found = one.answers
        share = 100 * float(found.right.double().mean())
        parts.append(
            f"<li>{_text(one.record.label)}: {len(found.labels)} samples, {_text(one.source)}; "
            f"{share:.2f} % {'near enough' if found.learns_number else 'right'}"
            f"{_text(_most_confused(found))}</li>"
        )
    parts.append("</ul>")
    for k, group in enumerate(groups.values()):
        figure = draw_confusion({one.record.label: one.answers for one in group})
        parts.append(_figure(figure, f"plot-confusion-{k}"))
    return "".join(parts)


def _most_confused(found: Answers, most: int = 3) -> str:
    """The classes that are taken for another most often, in words."""
    if found.learns_number:
        return ""
    wrong, names = found.confusion().fill_diagonal_(0), found.trained.class_names
    counts, cells = wrong.flatten().topk(min(most, wrong.numel()))
    pairs = [
        f"{names[int(cell) // len(names)]} for {names[int(cell) % len(names)]} {count} times"
        for count, cell in zip(counts.tolist(), cells, strict=True) if count
    ]  # fmt: skip
    return f"; most often it took {', '.join(pairs)}" if pairs else ""


def _samples(looked: Sequence[Looked]) -> str:
    parts = [
        '<p class="muted">Move the slider, or play: the membranes and gates are those of the bin '
        f"that the orange line stands at. Of more than {MOST_STEPS} bins the slider stops at "
        f"{MOST_STEPS}; of more than {MOST_NEURONS} neurons of a layer {MOST_NEURONS} are shown, "
        "both evenly. Membranes far below the threshold are cut off.</p>"
    ]
    for k, one in enumerate(looked):
        found, cfg = one.answers, one.answers.trained.config
        names, dense = found.trained.class_names, isinstance(found.samples.store, DenseStore)
        bin, unit = (1.0, "steps") if dense else (cfg.max_time / cfg.time_bins, "s")
        if not one.views:
            parts.append(f"<p>{_text(one.record.label)}: a {cfg.neuron} sees all bins at once.</p>")
        for view in one.views:
            said = float(found.said[view.number])
            if found.learns_number:
                about = f"is {view.label:.3f}, said {said:.3f}"
            else:
                sure = 100 * float(view.said[-1].max())
                taken = "taken for" if said != view.label else "recognised as"
                about = f"{names[int(view.label)]}, {taken} {names[int(said)]}, {sure:.0f} %"
            parts.append(f"<h3>{_text(f'{one.record.label}, sample {view.number}: {about}')}</h3>")
            figure = draw_sample(view, names, bin, unit)
            parts.append(_figure(figure, f"plot-sample-{k}-{view.number}"))
    return "".join(parts)
