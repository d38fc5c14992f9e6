"""One layer by the tiles that are chosen now and by others: rows x neurons x depth, warps, stages.

Forward's tiles are swept in a forward pass alone, backward's in both passes, behind the forward
tile that is chosen. Persistent tiles for layers that can be persistent, else stepwise ones; where
all is tiny, the first of each. It runs on a GPU, and in Triton's interpreter.
"""

from bench import tuning

KIND = "tuning"
SUBJECTS = tuning.subjects_of


def bench_tuning_backward(contest, case, subject, device):
    contest(tuning.entries(case, device, "backward"), case, subject, mode="forward+backward")


def bench_tuning_forward(contest, case, subject, device):
    contest(tuning.entries(case, device, "forward"), case, subject, mode="forward")
