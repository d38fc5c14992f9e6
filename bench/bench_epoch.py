"""An epoch of training steps over a made-up data set of SHD's or SSC's size (a CPU: 2 batches)."""

from bench import networks

KIND = "epoch"
SUBJECTS = ("gpn", "gpn-every-10", "loop", "lstm")
SAMPLES = {"shd": 8156, "ssc": 75466}


def bench_epoch(contest, case, subject, device):
    full = SAMPLES.get(case.name.split("-")[0], 0)
    batches = 2 if case.scaled or not full else -(-full // case.B)
    contest(
        networks.steps(case, device, batches),
        case,
        subject,
        mode="epoch",
        samples=batches * case.B,
        samples_of_full=full,
    )
