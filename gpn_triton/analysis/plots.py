"""The figures of a run's page that plotly draws: curves, confusion, where the time went."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpn_triton.analysis.answers import Answers
from gpn_triton.analysis.record import Record, Spent
from gpn_triton.training.curves import HEALTH

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# of many classes the matrix shows no numbers, they stand on hover
NUMBERED_CLASSES = 20
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#a0522d")
DASHES = ("solid", "dash", "dot", "dashdot")
SHADES = [[0, "#ffffff"], [1, "#0072b2"]]


def check_plotly() -> None:
    """Raise ModuleNotFoundError unless plotly, an extra (`report`), is installed."""
    try:
        import plotly.graph_objects  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plotly is missing (pip install 'gpn-triton[report]')") from None


def color_of(k: int) -> str:
    """The color of the k-th run, of a text or a line."""
    return COLORS[k % len(COLORS)]


def words(text: object) -> str:
    """A text that plotly shall not take for markup."""
    return html.escape(str(text), quote=False)


def grid(rows: int, columns: int, height: int, **more: Any) -> Figure:
    """A figure of rows x columns panels, of a height in pixels and as wide as the page."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=rows, cols=columns, **more)
    figure.update_layout(
        height=height, template="plotly_white", margin={"l": 60, "r": 20, "t": 50, "b": 50},
        font={"size": 12, "family": "system-ui, sans-serif"}, hovermode="closest",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.06, "x": 0},
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    return figure


def draw_curves(records: Sequence[Record], learns_number: bool) -> Figure:
    """Loss, accuracy, rate and each layer's health over the epochs, a color a run."""
    accuracy = "share near enough, %" if learns_number else "accuracy, %"
    panels: list[tuple[str, list[str], float]] = [
        ("loss", ["valid_loss", "train_loss"], 1),
        (accuracy, ["valid_accuracy", "train_accuracy"], 100),
        ("learning rate", ["lr"], 1),
        *((label, [name], 100 if label.endswith("%") else 1) for name, label in HEALTH.items()),
        ("training, s an epoch", ["seconds"], 1),
    ]
    figure = grid(2, 4, 640, subplot_titles=[title for title, _, _ in panels],
                   horizontal_spacing=0.05, vertical_spacing=0.14)  # fmt: skip
    for k, record in enumerate(records):
        shown = True
        for at, (_, names, scale) in enumerate(panels):
            for label, dash, x, y in _lines(record, names, scale):
                figure.add_scatter(
                    x=x, y=y, name=words(record.label), legendgroup=str(k), showlegend=shown,
                    mode="lines" if len(x) > 1 else "markers", line={"color": color_of(k),
                    "dash": dash, "width": 1.5}, marker={"color": color_of(k), "size": 6},
                    hovertemplate=f"{words(record.label)}<br>epoch %{{x}}, {label}: %{{y:.4g}}"
                    "<extra></extra>", row=1 + at // 4, col=1 + at % 4,
                )  # fmt: skip
                shown = False
        if best := record.best:
            figure.add_scatter(
                x=[best.epoch], y=[100 * best.valid_accuracy], mode="markers", showlegend=False,
                legendgroup=str(k), marker={"symbol": "star", "size": 11, "color": color_of(k)},
                hovertemplate="the epoch that was tested: %{x}, %{y:.2f} %<extra></extra>",
                row=1, col=2,
            )  # fmt: skip
    figure.update_xaxes(title_text="epoch", row=2)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=len(records) > 1)
    return figure


def _lines(
    record: Record, names: Sequence[str], scale: float
) -> list[tuple[str, str, list[int], list[float]]]:
    """The lines of a panel: label, dash, epochs and values; of a list's name a line a layer."""
    lines = []
    for k, name in enumerate(names):
        # older runs do not know all
        known = [epoch for epoch in record.epochs if getattr(epoch, name) != []]
        x = [epoch.epoch for epoch in known]
        if name in HEALTH:
            layers = len(record.options["hidden"])
            columns = zip(*(getattr(epoch, name) for epoch in known), strict=True)
            for layer, column in enumerate(columns, 1):
                label = f"layer {layer}" if layer <= layers else "readout"
                dash = DASHES[(layer - 1) % len(DASHES)]
                lines.append((label, dash, x, [scale * value for value in column]))
        else:
            # training is dotted beside validation
            dash = "dot" if k else "solid"
            values = [scale * getattr(epoch, name) for epoch in known]
            lines.append((name.replace("_", " "), dash, x, values))
    return lines


def draw_confusion(of_run: dict[str, Answers]) -> Figure:
    """What samples of each class were taken for, a matrix a run, one shown at a time; of a number
    to learn what was said against what it is."""
    import plotly.graph_objects as go

    figure = grid(1, 1, 560)
    for k, (label, found) in enumerate(of_run.items()):
        names = [words(name) for name in found.trained.class_names]
        if found.learns_number:
            figure.add_scatter(
                x=found.labels.tolist(), y=found.said.tolist(), mode="markers", visible=k == 0,
                marker={"size": 5, "color": color_of(k), "opacity": 0.6}, name=words(label),
                hovertemplate="is %{x:.3f}, said %{y:.3f}<extra></extra>", showlegend=False,
            )  # fmt: skip
            continue
        counts = found.confusion().numpy()
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        figure.add_trace(go.Heatmap(
            z=100 * share, x=names, y=names, text=counts, visible=k == 0, zmin=0, zmax=100,
            colorscale=SHADES, xgap=1, ygap=1, name=words(label),
            texttemplate="%{text}" if len(names) <= NUMBERED_CLASSES else None,
            colorbar={"title": "% of the row", "thickness": 12},
            hovertemplate="%{y} taken for %{x}: %{text} (%{z:.1f} %)<extra></extra>",
        ))  # fmt: skip
    first = next(iter(of_run.values()))
    if first.learns_number:
        low, high = float(first.labels.min()), float(first.labels.max())
        figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high,
                         line={"color": "#999", "dash": "dot"})  # fmt: skip
        figure.update_layout(xaxis_title="is", yaxis_title="said")
    else:
        figure.update_layout(xaxis_title="taken for", yaxis_title="is")
        figure.update_xaxes(type="category", showgrid=False)
        figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    if len(of_run) > 1:
        buttons = [
            {"label": words(label), "method": "restyle",
             "args": [{"visible": [j == k for j in range(len(of_run))]}]}
            for k, label in enumerate(of_run)
        ]  # fmt: skip
        figure.update_layout(updatemenus=[menu_of(buttons, "dropdown", 0, 1.12)])
    return figure


def menu_of(buttons: list[dict[str, Any]], kind: str, x: float, y: float) -> dict[str, Any]:
    """A menu of buttons or a dropdown, by its left upper corner in shares of the figure."""
    return {"buttons": buttons, "type": kind, "direction": "right" if kind == "buttons" else "down",
            "x": x, "y": y, "xanchor": "left", "yanchor": "top", "showactive": kind == "dropdown",
            "bgcolor": "#ffffff", "pad": {"t": 0, "r": 8}}  # fmt: skip


def draw_spent(rows: Sequence[Spent]) -> Figure:
    """The longest kernels or ops of profiled steps."""
    figure = grid(1, 1, 120 + 24 * len(rows))
    rows = rows[::-1]
    figure.add_bar(
        x=[row.ms for row in rows], y=[words(row.name) for row in rows], orientation="h",
        marker_color=COLORS[0], hovertemplate="%{y}: %{x:.3g} ms<extra></extra>",
    )  # fmt: skip
    figure.update_layout(xaxis_title="own time, ms", margin={"l": 330, "t": 10})
    return figure
