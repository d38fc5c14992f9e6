"""One layer by the tiles that are chosen now and by others: rows x neurons x depth, warps, stages.

Persistent tiles for layers that can be persistent, else stepwise ones; where all is tiny, the first
of each. It runs on a GPU, and in Triton's interpreter.
"""

from bench import tuning

KIND = "tuning"
SUBJECTS = tuning.swept


def bench_tuning_forward_backward(contest, case, subject, device):
    contest(tuning.entries(case, device, backward=True), case, subject, mode="forward+backward")


def bench_tuning_forward(contest, case, subject, device):
    contest(tuning.entries(case, device, backward=False), case, subject, mode="forward")
