"""Draws a run's loss, accuracy and spike rate over its epochs."""

from pathlib import Path

from gpn_triton.machine.figure import new_figure, save_figure
from gpn_triton.training.objective import Epoch


def draw_curves(path: Path, epochs: list[Epoch], title: str) -> None:
    """Write the curves of a run as a PNG.

    Args:
        path: the file. epochs: one or more. title: the line above the plot.
    Raises:
        ModuleNotFoundError: matplotlib, an extra (`plot`), is not installed.
    """
    at = [epoch.epoch for epoch in epochs]
    figure, ((left, middle, right),) = new_figure(1, 3, (3.7, 3.4))
    for axes, key, scale, label in (
        (left, "loss", 1, "cross-entropy"),
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
    best = max(epochs, key=lambda epoch: (epoch.valid_accuracy, -epoch.valid_loss))
    middle.axvline(best.epoch, color="0.6", linewidth=0.8, linestyle=":")
    figure.suptitle(title, fontsize=10)
    save_figure(path, figure)
