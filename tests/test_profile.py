"""A profile says where some training steps' time went, and leaves everything else as it was."""

import gzip
import json

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import record_function

from gpn_triton import SpikingClassifier
from gpn_triton.machine.profile import profiled

CPU = torch.device("cpu")


def training():
    """A small network's training steps, each giving its loss."""
    torch.manual_seed(0)
    model = SpikingClassifier([8], inputs=10, classes=4)
    optimizer = torch.optim.Adam(model.parameters())
    x, labels = torch.rand(6, 3, 10), torch.zeros(3, dtype=torch.long)
    while True:
        with record_function("forward"):
            loss = F.cross_entropy(model(x)[0], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def test_the_table_is_printed_and_lies_beside_a_trace_of_the_same_steps(tmp_path, capsys):
    with profiled(3, 9, CPU, tmp_path) as made:
        losses = [(loss, made())[0] for _, loss in zip(range(9), training(), strict=False)]
    # it changes no number and draws nothing
    assert losses == [loss for _, loss in zip(range(9), training(), strict=False)]
    assert len(set(losses)) == 9
    assert {path.name for path in tmp_path.iterdir()} == {"profile.txt", "trace.json.gz"}
    text = (tmp_path / "profile.txt").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.startswith("3 training steps on cpu, after 5 that were not recorded")
    calls = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.strip()}
    assert calls["ProfilerStep*"] == calls["forward"] == calls["gpn_triton::recurrence"] == "3"
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("gpn_triton::recurrence") == names.count("forward") == 3
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(("steps", "made", "recorded", "before"), [(5, 3, 2, 1), (4, 1, 1, 0)])
def test_a_short_epoch_has_fewer_steps_to_record(steps, made, recorded, before, tmp_path):
    with profiled(steps, made, CPU, tmp_path) as step:
        for _, _ in zip(range(made), training(), strict=False):
            step()
    first = (tmp_path / "profile.txt").read_text().splitlines()[0]
    assert first.startswith(f"{recorded} training steps on cpu, after {before} that")


def test_failed_training_leaves_the_profiler_off_and_no_file(tmp_path):
    with pytest.raises(ArithmeticError), profiled(5, 7, CPU, tmp_path) as made:
        for k, _ in zip(range(7), training(), strict=False):
            made()
            if k == 4:
                raise ArithmeticError
    assert not torch.autograd._profiler_enabled() and not list(tmp_path.iterdir())
