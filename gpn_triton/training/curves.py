"""Draws a run's loss, accuracy and spike rate over its epochs."""

from pathlib import Path

from gpn_triton.machine.files import write_atomically
from gpn_triton.training.objective import Epoch


def draw_curves(path: Path, epochs: list[Epoch], best: int, title: str) -> None:
    """Write the curves of a run as a PNG.

    Args:
        path: the file. epochs: one or more. title: the line above the plot.
    Raises:
        ModuleNotFoundError: matplotlib, an extra (`plot`), is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    at = [epoch.epoch for epoch in epochs]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for axes, key, scale, label in (
        (left, "loss", 1, "loss"),
        (middle, "accuracy", 100, "accuracy, %"),
    ):
        for split in ("train", "valid"):
            values = [scale * getattr(epoch, f"{split}_{key}") for epoch in epochs]
            axes.plot(at, values, label=split)
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    for layer, values in enumerate(zip(*(epoch.activity for epoch in epochs), strict=True), 1):
        right.plot(at, values, label=f"layer {layer}")
    right.set_ylabel("spikes a neuron and step")
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    middle.axvline(best, color="0.6", linewidth=0.8, linestyle=":")
    figure.suptitle(title, fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
