"""Figures without a display, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpn_triton.machine.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(rows: int, columns: int, size: tuple[float, float] = (3.7, 3.0)) -> tuple[Any, Any]:
    """A figure of rows x columns axes, each of a size in inches: the figure, an array of the axes.

    Raises:
        ModuleNotFoundError: matplotlib, an extra (`plot`), is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "matplotlib is missing (pip install 'gpn-triton[plot]')"
        ) from None
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
