"""One layer of GPN without its input Linear: forward, and forward and backward."""

from bench import subjects

KIND = "recurrence"
SUBJECTS = subjects.SUBJECTS


def bench_recurrence_forward_backward(contest, case, subject, device):
    contest(subjects.entries(case, device, backward=True), case, subject, mode="forward+backward")


def bench_recurrence_forward(contest, case, subject, device):
    contest(subjects.entries(case, device, backward=False), case, subject, mode="forward")
