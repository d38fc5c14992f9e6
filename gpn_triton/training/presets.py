"""Set-ups by name: what --preset puts in place of the options' defaults; and what a
long task by --dataset puts there.

small and wide are the networks of the authors' two implementations, paper the small ones at the
time bins that the paper names, authors the small one with the habits of the authors' data pipeline.
All of these start as the paper does. best is not published: it is what docs/results/accuracy.md
found for spoken words of few speakers, on whatever data.
"""

from typing import Any

_PLAIN = {"max_time": 1.0, "channel_shift": 0, "init": "paper"}
_SMALL = {**_PLAIN, "dropout": 0.5, "schedule": "cosine"}
_WIDE = {**_PLAIN, "dropout": 0.25, "schedule": "plateau", "epochs": 150}
_SHD = {"dataset": "shd", "lr": 5e-4, "epochs": 150}
_SHD_SMALL = {**_SMALL, **_SHD, "hidden": (128,), "batch_size": 32}
_SSC = {"dataset": "ssc", "lr": 1e-3}
_SSC_SMALL = {
    **_SMALL, **_SSC, "hidden": (512, 256, 128), "weight_decay": 5e-4, "batch_size": 256,
    "epochs": 300,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "shd-small": {**_SHD_SMALL, "time_bins": 20},
    "shd-authors": {**_SHD_SMALL, "time_bins": 20, "binning": "authors"},
    "shd-paper": {**_SHD_SMALL, "time_bins": 40},
    "shd-wide": {**_WIDE, **_SHD, "hidden": (1024,), "time_bins": 20, "batch_size": 128},
    "ssc-small": {**_SSC_SMALL, "time_bins": 50},
    "ssc-paper": {**_SSC_SMALL, "time_bins": 60},
    "ssc-wide": {
        **_WIDE, **_SSC, "hidden": (1024,) * 3, "time_bins": 60, "batch_size": 1024
    },
    "best": {
        "time_bins": 25, "channel_bin": 10, "scale": "log", "channel_shift": 15,
        "channel_stretch": 0.05, "channel_gain": 0.8, "time_stretch": 0.4, "lr": 2e-3,
        "batch_size": 32, "epochs": 30, "init": "quiet",
    },
}  # fmt: skip

# what stands in docs/results about a set-up, by its name; None is the command without a preset
MEASURED: dict[str | None, str] = {
    None: "99.75 % on speakers never heard, seed 0, 20 epochs, --amp (docs/results/embedded.json)",
    "best": "41.2 % of a left-out speaker's digits, 32.1 by the paper's (docs/results/accuracy.md)",
}

# a task's own length and readout; its channels are no places on a membrane
_TASK = {"channel_shift": 0, "dropout": 0.0}
TASKS: dict[str, dict[str, Any]] = {
    # the query comes in the last bin, and so does the answer
    "recall": {**_TASK, "time_bins": 100, "classes": 10, "readout": "last"},
    # a sum is a number between those that spikes of few neurons can say
    "adding": {**_TASK, "time_bins": 100, "readout": "membrane"},
    "digits": {**_TASK, "time_bins": 64},
    "mnist": {**_TASK, "time_bins": 784},
    "mnist-10k": {**_TASK, "time_bins": 784},
}
