"""A whole training step: bins, forward, loss, backward, optimiser."""

from bench import networks

KIND = "train_step"
SUBJECTS = networks.SUBJECTS


def bench_train_step(contest, case, subject, device):
    contest(networks.steps(case, device, batches=1), case, subject, mode="training step")
