"""Training steps on a made-up data set of SHD's or SSC's size (scaled down: on 2 batches)."""

from bench import networks

KIND = "epoch"
SUBJECTS = ("gpn", "gpn-no-graph", "gpn-every-10", "loop", "lstm")
SAMPLES = {"shd": 8156, "ssc": 75466}
BATCHES = 8


def bench_epoch(contest, case, subject, device):
    full = SAMPLES.get(case.name.split("-")[0], 0)
    whole = full and not case.scaled
    batches = BATCHES if whole else 2
    contest(
        networks.steps(case, device, batches, full if whole else None),
        case,
        subject,
        mode="epoch",
        samples=batches * case.B,
        samples_of_full=full,
    )
