"""The figure of one sample in a network, with a slider over its time bins, drawn by plotly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gpn_triton.analysis.answers import View
from gpn_triton.analysis.distributions import Trace
from gpn_triton.analysis.plots import color_of, grid, menu_of, words

# a slider's steps, a layer's neurons and a sample's classes that a page has room for
MOST_STEPS, MOST_NEURONS, MOST_CLASSES = 100, 128, 6
INK, CURSOR = [[0, "#ffffff"], [1, "#1d2733"]], "#d55e00"
COLORS = {"h": "#1d2733", "theta": "#d55e00", "f": "#0072b2", "i": "#009e73", "b": "#cc79a7"}
# the rows of the figure, from above
INPUT, SAID, SPIKES, MEMBRANE, GATES = range(1, 6)


def draw_sample(view: View, names: Sequence[str], bin: float, unit: str) -> Any:
    """One sample in a network: a plotly figure.

    From above: what the network sees, what it says from bin to bin, which neurons spike; and, at
    the bin that the slider names, every neuron's membrane and threshold, and its gates. Neurons
    stand in the order of their mean leak f, or of their rate where there is none.

    Args:
        view: the sample. names: of the classes. bin: its length. unit: of that.
    """
    return _SamplePlot(view, names, bin, unit).figure


class _SamplePlot:
    """The figure while it is drawn; `moving` are its traces that change with the bin, by number,
    each with what of it does."""

    def __init__(self, view: View, names: Sequence[str], bin: float, unit: str):
        layers, T = len(view.layers), len(view.inputs)
        gated = bool(set(view.layers[0].gates) - {"theta"})
        whole: list[Any] = [{"colspan": layers}, *[None] * (layers - 1)]
        titles = ["what it sees", "what it says" if len(names) > 1 else f"the {names[0]} it says"]
        for what in ("spikes", "membrane h and threshold", "gates")[: 2 + gated]:
            titles += [f"{what}, layer {k}" if layers > 1 else what for k in range(1, layers + 1)]
        self.figure = grid(
            4 + gated, layers, 900 + 160 * gated, subplot_titles=titles,
            specs=[whole, whole, *[[{}] * layers] * (2 + gated)], vertical_spacing=0.055,
            horizontal_spacing=0.06, row_heights=[1.1, 0.8, 1.0, 0.8, 0.8][: 4 + gated],
        )  # fmt: skip
        self.time, self.unit = (np.arange(T) + 0.5) * bin, unit
        self.moving: list[tuple[int, Callable[[int], dict[str, Any]]]] = []
        self.picture(INPUT, 1, view.inputs.numpy().T, "channel %{y}: %{z:g}")
        self.cursor(INPUT, 1, -0.5, view.inputs.shape[1] - 0.5)
        self.said(view.said.numpy(), names)
        for col, layer in enumerate(view.layers, 1):
            self.layer(col, layer, gated)
        for row in (INPUT, SAID, SPIKES):
            self.figure.update_xaxes(range=[0, T * bin], showticklabels=row == SPIKES, row=row)
        self.figure.update_xaxes(ticksuffix=f" {unit}", row=SPIKES)
        self.figure.update_yaxes(title_text="channel", row=INPUT, col=1)
        place = {"orientation": "v", "x": 1.01, "yanchor": "top"}
        self.figure.update_layout(legend={**place, "y": 0.78}, legend2={**place, "y": 0.32})
        self.slider()

    def add(
        self, row: int, col: int, move: Callable[[int], dict[str, Any]] | None = None, **trace: Any
    ) -> None:
        """Add a line or points."""
        if move is not None:
            self.moving.append((len(self.figure.data), move))
            trace |= move(0)
        self.figure.add_scatter(row=row, col=col, **{"showlegend": False, **trace})

    def cursor(self, row: int, col: int, low: float, high: float) -> None:
        """Add the line that stands at the slider's bin."""
        self.add(
            row, col, lambda t: {"x": [self.time[t]] * 2, "y": [low, high]}, mode="lines",
            line={"color": CURSOR, "width": 1.5}, hoverinfo="skip",
        )  # fmt: skip

    def picture(
        self, row: int, col: int, values: np.ndarray, about: str, numbers: np.ndarray | None = None
    ) -> None:
        """Add values [N, T] as shades, whose rows may have numbers."""
        whole = 0 <= values.min() <= values.max() <= 255 and (values == values.round()).all()
        self.figure.add_heatmap(
            z=values.astype(np.uint8) if whole else values.round(3), x=self.time, colorscale=INK,
            customdata=None if numbers is None else np.repeat(numbers[:, None], len(self.time), 1),
            hovertemplate=f"%{{x:.3g}} {self.unit}, {about}<extra></extra>", showscale=False,
            row=row, col=col,
        )  # fmt: skip

    def said(self, said: np.ndarray, names: Sequence[str]) -> None:
        """Add what the network says after each bin [T, classes]: the classes that are ever likely,
        or the number."""
        for color, k in enumerate(np.argsort(-said.max(0))[:MOST_CLASSES]):
            name = words(names[k])
            self.add(
                SAID, 1, x=self.time, y=said[:, k], mode="lines", name=name,
                showlegend=True, line={"color": color_of(color), "width": 1.5},
                hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
        low, high = (0.0, 1.0) if len(names) > 1 else (float(said.min()), float(said.max()))
        self.cursor(SAID, 1, low, high)

    def layer(self, col: int, layer: Trace, gated: bool) -> None:
        """Add a layer: its spikes over time, its membranes and gates at the slider's bin."""
        order = _order(layer.gates.get("f"), layer.spikes)
        self.picture(SPIKES, col, layer.spikes.numpy()[:, order].T, "neuron %{customdata}", order)
        self.cursor(SPIKES, col, -0.5, len(order) - 0.5)
        places = np.arange(len(order))
        for name, values in {"h": layer.h, **layer.gates}.items():
            # a number of four bytes is written in half the room
            at = values.numpy()[:, order].astype(np.float32)
            self.add(
                MEMBRANE if name in ("h", "theta") else GATES, col,
                lambda t, at=at: {"y": at[t]}, x=places, mode="markers", name=name,
                legend="legend2", showlegend=col == 1, customdata=order,
                marker={"color": COLORS[name], "size": 5,
                        "symbol": "line-ew-open" if name == "theta" else "circle"},
                hovertemplate=f"neuron %{{customdata}}, {name} = %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
        # about the threshold, which lies in 0..1; some membranes are far below
        low, high = np.quantile(layer.h.numpy(), [0.1, 0.99])
        low, high = max(min(low, -0.2), -2.0), min(max(high, 1.2), 3.0)
        self.figure.update_yaxes(range=[low, high], row=MEMBRANE, col=col)
        if gated:
            self.figure.update_yaxes(range=[-1.2, 1.2], row=GATES, col=col)
        by = "mean f" if "f" in layer.gates else "rate"
        last = GATES if gated else MEMBRANE
        self.figure.update_xaxes(title_text=f"neurons, by {by}", row=last, col=col)

    def slider(self) -> None:
        """Add the slider over the bins, of too many evenly some, and a button that plays."""
        import plotly.graph_objects as go

        time, last = self.time, len(self.time) - 1
        bins = np.linspace(0, last, min(last + 1, MOST_STEPS)).round().astype(int)
        self.figure.frames = [
            go.Frame(
                name=str(t), traces=[k for k, _ in self.moving],
                data=[{"type": "scatter", **move(t)} for _, move in self.moving],
            )
            for t in bins
        ]  # fmt: skip
        # without a redraw plotly hides every panel's shades
        at_once = {
            "mode": "immediate", "frame": {"duration": 0, "redraw": True},
            "transition": {"duration": 0},
        }  # fmt: skip
        steps = [
            {"label": f"{time[t]:.3g}", "method": "animate", "args": [[str(t)], at_once]}
            for t in bins
        ]
        played = {**at_once, "fromcurrent": True, "frame": {"duration": 120, "redraw": True}}
        buttons = [
            {"label": "play", "method": "animate", "args": [None, played]},
            {"label": "stop", "method": "animate", "args": [[None], at_once]},
        ]
        slider = {
            "steps": steps, "active": 0, "x": 0.1, "len": 0.9, "pad": {"t": 45},
            "currentvalue": {"prefix": "at ", "suffix": f" {self.unit}"},
        }  # fmt: skip
        menu = {**menu_of(buttons, "buttons", 0, 0), "pad": {"t": 60}}
        self.figure.update_layout(sliders=[slider], updatemenus=[menu])


def _order(f: Tensor | None, spikes: Tensor) -> np.ndarray:
    """The neurons that are shown, by their mean leak or rate; of too many evenly some."""
    by = (spikes if f is None else f).mean(0).argsort().numpy()
    return by[np.linspace(0, len(by) - 1, min(len(by), MOST_NEURONS)).round().astype(int)]
