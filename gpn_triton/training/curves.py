"""Draws a run's loss, accuracy and health over its epochs."""

from pathlib import Path

from gpn_triton.machine.figure import new_figure, save_figure
from gpn_triton.training.objective import SATURATED, Epoch

HEALTH = {
    "activity": "spikes a neuron and step",
    "dead": "neurons that never spike, %",
    "saturated": f"neurons that spike in {100 * SATURATED:.0f} % of steps, %",
    "gradient_norm": "gradient norm",
}


def draw_curves(path: Path, epochs: list[Epoch], best: int, title: str) -> None:
    """Write the curves of a run as a PNG.

    Args:
        path: the file. epochs: one or more. title: the line above the plot.
    Raises:
        ModuleNotFoundError: matplotlib, an extra (`plot`), is not installed.
    """
    figure, panels = new_figure(2, 3)
    loss, accuracy, *health = panels.flat
    for axes, key, scale, label in (
        (loss, "loss", 1, "loss"),
        (accuracy, "accuracy", 100, "accuracy, %"),
    ):
        for split in ("train", "valid"):
            values = [scale * getattr(epoch, f"{split}_{key}") for epoch in epochs]
            axes.plot([epoch.epoch for epoch in epochs], values, label=split)
        axes.set_ylabel(label)
    for axes, (name, label) in zip(health, HEALTH.items(), strict=True):
        # older runs do not know all
        known = [epoch for epoch in epochs if getattr(epoch, name)]
        scale = 100 if label.endswith("%") else 1
        by_layer = zip(*(getattr(epoch, name) for epoch in known), strict=True)
        for layer, values in enumerate(by_layer, 1):
            of = f"layer {layer}" if layer <= len(epochs[0].activity) else "readout"
            axes.plot([epoch.epoch for epoch in known], [scale * v for v in values], label=of)
        axes.set_ylabel(label)
    for axes in panels.flat:
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(frameon=False)
    accuracy.axvline(best, color="0.6", linewidth=0.8, linestyle=":")
    figure.suptitle(title, fontsize=10)
    save_figure(path, figure)
