"""Time and memory against the number of steps, to 10,000 on a GPU, saved whole and checkpointed."""

from bench import subjects

KIND = "long_sequence"
SUBJECTS = (
    "gpn-cpu", "gpn-cpu-every-16", "gpn-triton", "gpn-triton-every-16",
    "gpn-triton-every-64", "loop", "lstm",
)  # fmt: skip


def bench_long_sequence(contest, case, subject, device):
    contest(subjects.entries(case, device, backward=True), case, subject, mode="forward+backward")
