"""Draws a run's loss, accuracy and spike rate over its epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpn_triton.files import write_atomically


def draw_curves(path: Path, epochs: list[dict[str, Any]], title: str) -> None:
    """Write the curves of a run as a PNG.

    Args:
        path: the file. title: the line above the plot.
        epochs: the epoch lines of metrics.jsonl: epoch, train_loss, valid_loss, train_accuracy,
            valid_accuracy (0..1), activity (mean output of each hidden layer).
    Raises:
        ModuleNotFoundError: matplotlib, an extra (`plot`), is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    at = [line["epoch"] for line in epochs]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for axes, key, scale, label in (
        (left, "loss", 1, "cross-entropy"),
        (middle, "accuracy", 100, "accuracy, %"),
    ):
        for split in ("train", "valid"):
            axes.plot(at, [scale * line[f"{split}_{key}"] for line in epochs], label=split)
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    for layer in range(len(epochs[0]["activity"])):
        right.plot(at, [line["activity"][layer] for line in epochs], label=f"layer {layer + 1}")
    right.set_ylabel("spikes a neuron and step")
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    best = max(epochs, key=lambda line: (line["valid_accuracy"], -line["valid_loss"]))
    middle.axvline(best["epoch"], color="0.6", linewidth=0.8, linestyle=":")
    figure.suptitle(title, fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
