"""A search's trials as a table, a CSV file and a picture, and the best one as a file of options."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpn_triton.analysis.report import markdown, number, write_csv, write_text
from gpn_triton.analysis.search import BEST_EPOCHS, LOSS, REASON, SECONDS, Search
from gpn_triton.machine.figure import new_figure, save_figure

MARKDOWN, CSV, PICTURE, BEST = "table.md", "table.csv", "search.png", "best.toml"
COLUMNS = 4
# what became of a trial, in the order of the table
FINISHED, PRUNED, UNFINISHED, FAILED = OUTCOMES = ("finished", "pruned", "unfinished", "failed")


@dataclass(frozen=True)
class Row:
    """One trial.

    outcome: one of OUTCOMES. value: by validation, %, or the squared error of numbers to learn; of
    a trial that has not finished its best epoch's. loss: of validation. best_epochs: a seed each.
    epochs: trained, of the first seed. seconds: of training steps. options: what it drew of the
    space, by name. reason: why it ended early. None: not there.
    """

    trial: int
    outcome: str
    value: float | None
    loss: float | None
    best_epochs: str
    epochs: int
    seconds: float | None
    options: dict[str, Any]
    reason: str


def rows_of(search: Search) -> list[Row]:
    """A row for every trial, the best first."""
    state = search.optuna.trial.TrialState
    names = {state.COMPLETE: FINISHED, state.PRUNED: PRUNED, state.FAIL: FAILED}
    rows = []
    for trial in sorted(search.trials(), key=search.rank):
        value, known = search.value_of(trial), trial.user_attrs
        rows.append(Row(
            trial.number,
            names.get(trial.state, UNFINISHED),
            value if value is None or search.learns_number else 100 * value,
            known.get(LOSS),
            " ".join(map(str, known.get(BEST_EPOCHS, []))),
            trial.last_step or 0,
            known.get(SECONDS),
            search.options_of(trial),
            known.get(REASON, ""),
        ))  # fmt: skip
    return sorted(rows, key=lambda row: OUTCOMES.index(row.outcome))


def measured(search: Search) -> str:
    """What trials are judged by, with its unit."""
    return "valid error" if search.learns_number else "valid, %"


def table(search: Search, rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    names = [searched.name for searched in search.space]
    form = ".5f" if search.learns_number else ".2f"
    lines = [
        (
            str(row.trial), row.outcome, number(row.value, form), number(row.loss, ".4f"),
            row.best_epochs, str(row.epochs), number(row.seconds, ".0f"),
            *(shown(row.options.get(name)) for name in names),
        )
        for row in rows
    ]  # fmt: skip
    titles = ("trial", "outcome", measured(search), "valid loss", "best epoch", "epochs", "s")
    return markdown((*titles, *names), lines)


def shown(value: Any) -> str:
    """An option's value in a table or a line."""
    if isinstance(value, tuple):
        return "-".join(map(shown, value))
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def described(search: Search, row: Row) -> str:
    """A row in a line."""
    value = "" if row.value is None else (
        f" {row.value:.5f} squared error" if search.learns_number else f" {row.value:.2f} %"
    )  # fmt: skip
    drawn = "  ".join(f"{name} {shown(v)}" for name, v in row.options.items())
    why = f": {row.reason}" if row.reason else ""
    epochs = f"{row.epochs} epoch{'s' * (row.epochs != 1)}"
    return f"trial {row.trial} {row.outcome}{value} after {epochs}  {drawn}{why}"


def write_tables(search: Search) -> list[Row]:
    """Write table.md, table.csv and, of a finished trial, best.toml into a search's folder."""
    rows = rows_of(search)
    write_text(search.folder / MARKDOWN, table(search, rows))
    names = [searched.name for searched in search.space]
    value = "error" if search.learns_number else "valid"
    write_csv(
        search.folder / CSV,
        ("trial", "outcome", value, "loss", "best_epochs", "epochs", "seconds", *names, "reason"),
        (
            (
                row.trial, row.outcome, row.value, row.loss, row.best_epochs, row.epochs,
                row.seconds, *(_cell(row.options.get(name)) for name in names), row.reason,
            )
            for row in rows
        ),
    )  # fmt: skip
    if (best := search.best()) is not None:
        row = next(row for row in rows if row.trial == best.number)
        options = {**search.given, **search.options_of(best)}
        text = f"# {search.splits.description}\n# {described(search, row)}\n"
        write_text(search.folder / BEST, text + toml_of(options))
    return rows


def _cell(value: Any) -> Any:
    return "-".join(map(str, value)) if isinstance(value, tuple) else value


def toml_of(options: dict[str, Any]) -> str:
    """Options as a TOML file that --config takes."""
    # JSON's strings, numbers, truth values and lists are TOML's
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())


def importances(search: Search) -> dict[str, float]:
    """How much each searched option has to do with which trials are the best, as shares of 1.

    Empty until two trials have finished. Source: PED-ANOVA, Watanabe et al., arXiv 2304.10255.
    """
    complete = search.optuna.trial.TrialState.COMPLETE
    if sum(trial.state == complete for trial in search.trials()) < 2:
        return {}
    evaluator = search.optuna.importance.PedAnovaImportanceEvaluator()
    return search.optuna.importance.get_param_importances(search.study, evaluator=evaluator)


def draw_picture(search: Search, rows: Sequence[Row]) -> None:
    """Write search.png: trials as they came, what mattered, and the value over each option."""
    names = [searched.name for searched in search.space]
    lines = -(-(2 + len(names)) // COLUMNS)
    figure, panels = new_figure(lines, COLUMNS)
    history, mattered, *slices = panels.flat
    by_trial = sorted((row for row in rows if row.value is not None), key=lambda row: row.trial)
    better = min if search.learns_number else max
    for outcome, mark in ((FINISHED, "C0o"), (PRUNED, "x"), (UNFINISHED, "+")):
        some = [row for row in by_trial if row.outcome == outcome]
        if not some:
            continue
        color = {} if outcome == FINISHED else {"color": "0.6"}
        places = [row.trial for row in some]
        history.plot(places, [row.value for row in some], mark, label=outcome, **color)
    finished = [row for row in by_trial if row.outcome == FINISHED]
    best = [better(row.value for row in finished[: k + 1]) for k in range(len(finished))]
    history.step([row.trial for row in finished], best, "C1", where="post", label="best")
    history.set(xlabel="trial", ylabel=measured(search))
    history.locator_params(axis="x", integer=True)
    history.legend(frameon=False, fontsize=7)
    shares = importances(search)
    mattered.barh(list(shares)[::-1], list(shares.values())[::-1], color="C0")
    mattered.set_xlabel("importance (PED-ANOVA)")
    for axes, searched in zip(slices, search.space, strict=False):
        values = [row.options[searched.name] for row in finished]
        ends = list(searched.values.values())
        if searched.is_log:
            axes.set_xscale("log")
            ends.insert(1, math.sqrt(ends[0] * ends[1]))
            axes.minorticks_off()
        if searched.is_range:
            axes.set_xlim(ends[0], ends[-1])
            axes.set_xticks(ends, [shown(float(end)) for end in ends])
        else:
            # every value of a list has its place, also one that no trial drew
            axes.set_xticks(range(len(ends)), list(searched.values))
            values = [ends.index(value) for value in values]
        axes.plot(values, [row.value for row in finished], "C0o", clip_on=False)
        axes.set(xlabel=searched.name, ylabel=measured(search))
    for axes in slices[len(names) :]:
        axes.set_axis_off()
    figure.suptitle(search.splits.description, fontsize=8)
    save_figure(search.folder / PICTURE, figure)
