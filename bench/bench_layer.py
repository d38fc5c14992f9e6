"""A whole layer, input Linear and neurons, forward and backward: on a CPU the headline."""

from bench import subjects

KIND = "layer"
SUBJECTS = subjects.SUBJECTS


def bench_layer(contest, case, subject, device):
    contest(subjects.entries(case, device, backward=True), case, subject, mode="forward+backward")
