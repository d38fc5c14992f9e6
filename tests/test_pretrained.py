"""Networks kept in folders, read from runs and from the authors' checkpoints, and written back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_export import authors_forward
from test_predict import make_run
from torch import nn

from gpn_triton import SpikingClassifier, export
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.neurons.pretrained import authors_weights
from gpn_triton.neurons.reference import GATES
from gpn_triton.training.run_folder import load_run

OLD = Path(__file__).parent / "data" / "old_runs" / "finished"


def counts(channels=700, T=9):
    return torch.poisson(torch.full((T, 4, channels), 0.2))


@torch.no_grad()
def assert_same(one, other, x):
    assert not one.training and set(one.state_dict()) == set(other.state_dict())
    for a, b in zip(one(x), other(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_runs_network_is_read_kept_and_read_again(tmp_path, neuron):
    run = make_run(tmp_path / "run", neuron=neuron, dropout=0.25)
    network, x = SpikingClassifier.from_run(run), counts()
    assert_same(network, load_run(run).model, x)
    files = network.save_pretrained(tmp_path / "kept", {"class_names": ["a", "b", "c"]})
    assert [path.name for path in files] == ["model.safetensors", "model.json"]
    assert json.loads(files[1].read_text())["class_names"] == ["a", "b", "c"]
    again = SpikingClassifier.from_pretrained(tmp_path / "kept")
    assert_same(again, network, x)
    assert again.dropout.p == 0.25 and again.arguments["neuron"] == neuron
    # what the export command writes is such a folder, too
    export.export(run, tmp_path / "out")
    assert torch.equal(SpikingClassifier.from_pretrained(tmp_path / "out")(x)[0], export_of(run, x))


def export_of(run, x):
    model = load_run(run).model
    model.fold()
    return model(x)[0]


def test_runs_of_older_programs_and_of_several_seeds_are_read(tmp_path):
    assert_same(SpikingClassifier.from_run(OLD), load_run(OLD).model, counts(70))
    run = make_run(tmp_path / "run", seed=(1, 2))
    (run / "seed-1").mkdir()
    shutil.move(run / "best.safetensors", run / "seed-1" / "best.safetensors")
    assert_same(
        SpikingClassifier.from_run(run / "seed-1"), load_run(run / "seed-1").model, counts()
    )
    with pytest.raises(ValueError, match=f"run: {run} holds 1 seeds: name one, as {run}/seed-1"):
        SpikingClassifier.from_run(run)


class Neuron(nn.Module):
    """What the authors call a layer of neurons: one Linear of v and x beside each other."""

    def __init__(self, N, gates):
        super().__init__()
        self.ln = nn.Linear(2 * N, gates * N)


class Authors(nn.Module):
    """The modules of the authors' networks, by their names; without what has no weights."""

    def __init__(self, sizes, gates=4):
        super().__init__()
        for k, (n_in, n) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
            setattr(self, f"fc{k}", nn.Linear(n_in, n))
            if k < len(sizes) - 1 and gates:
                setattr(self, f"sn{k}", Neuron(n, gates))


# S_base of SHD and SSC of January 2023, SNN_base_1_1024 and SNN_base_3_1024 of September 2023, with
# smaller layers
DROPS = {
    "January, SHD": ((70, 16, 20), "checkpoint.pt"),
    "January, SSC": ((70, 24, 16, 12, 35), "checkpoint.pt"),
    "September, SHD": ((70, 32, 20), "model_149.pt"),
    "September, SSC": ((70, 32, 32, 32, 35), "model_149.pt"),
}


@pytest.mark.parametrize("drop", DROPS)
@torch.no_grad()
def test_the_authors_checkpoints_are_read_whole_and_written_back(tmp_path, drop):
    sizes, name = DROPS[drop]
    theirs = Authors(sizes)
    for k in range(1, len(sizes) - 1):
        getattr(theirs, f"fc{k}").weight.mul_(5)
    torch.save(theirs.state_dict(), tmp_path / name)
    network = SpikingClassifier.from_authors(tmp_path / name, dropout=0.25)
    assert network.hidden == sizes[1:-1] and network.dropout.p == 0.25 and not network.training
    x = counts(70).double()
    logits, activity = network.double()(x)
    weights = {name: t.double() for name, t in theirs.state_dict().items()}
    torch.testing.assert_close(authors_forward(weights, x), logits, rtol=1e-12, atol=1e-12)
    assert (activity > 0).all()
    # back, into their modules and by way of a file
    back = authors_weights(network.float())
    theirs.load_state_dict(back)
    save_file({name: t.contiguous() for name, t in back.items()}, tmp_path / "authors.safetensors")
    again = SpikingClassifier.from_authors(tmp_path / "authors.safetensors")
    assert all(map(torch.equal, again.state_dict().values(), network.state_dict().values()))
    again.save_pretrained(tmp_path / "kept")
    kept = SpikingClassifier.from_pretrained(tmp_path / "kept")
    assert all(map(torch.equal, kept.state_dict().values(), network.state_dict().values()))


@pytest.mark.parametrize("variant", [v for v in GATES if v != "full"])
def test_their_ablations_are_read_by_name(variant):
    gates = len(GATES[variant])
    theirs = Authors((9, 6, 5, 3), gates).state_dict()
    network = SpikingClassifier.from_authors(theirs, neuron=f"gpn-{variant}")
    back = authors_weights(network)
    assert set(back) == set(theirs) and all(torch.equal(back[k], theirs[k]) for k in theirs)


def test_the_authors_layout_of_a_network_that_normalises_is_what_it_computes(tmp_path):
    network = SpikingClassifier([6], inputs=9, classes=3, time_constants=(1, 5)).eval()
    network.normalise(lambda: [[counts(9)]])
    with torch.no_grad():
        expected, x = network(counts(9)), counts(9)
        expected = network(x)[0]
        got = SpikingClassifier.from_authors(authors_weights(network))(x)[0]
    torch.testing.assert_close(got, expected)


def truncated(path):
    path.write_bytes(path.read_bytes()[:100])


NET = SpikingClassifier
WRONG = Authors((9, 6, 3)).state_dict()


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda d: NET.from_authors(d / "none.pt"), FileNotFoundError, "no such file"),
    (lambda d: NET.from_authors(d / "cut.pt"), ValueError, "cut.pt cannot be read"),
    (lambda d: NET.from_authors(d / "list.pt"), ValueError, "expected tensors by name"),
    (lambda d: NET.from_authors({}), ValueError, "too many or missing: fc1.weight"),
    (lambda d: NET.from_authors({**WRONG, "sn1.w": torch.ones(1)}), ValueError,
     "a network of gpn; too many or missing: sn1.w"),
    (lambda d: NET.from_authors(WRONG, "gpn-no-i"), ValueError,
     r"layer 1: ln_weight: expected \[18, 12\] for variant no-i of 6 neurons, got \[24, 12\]"),
    (lambda d: NET.from_authors(WRONG, "lstm"), ValueError, "neuron: expected one of"),
    (lambda d: NET.from_pretrained(d), FileNotFoundError, "folder: no such file"),
    (lambda d: NET.from_pretrained(d / "bad"), ValueError, "expected format 1 .* got 7"),
    (lambda d: NET.from_pretrained(d / "other"), ValueError, "does not fit its network"),
    (lambda d: NET.from_run(d), FileNotFoundError, "run: no such file: .*config.json"),
    (lambda d: NET.from_run(d / "begun"), FileNotFoundError, "best.safetensors"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, make, error, message):
    torch.save(WRONG, tmp_path / "cut.pt")
    truncated(tmp_path / "cut.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    network = SpikingClassifier([4], inputs=5, classes=2)
    for name, changed in (("bad", {"format": 7}), ("other", {"network": {"hidden": [3]}})):
        network.save_pretrained(tmp_path / name, changed)
    make_run(tmp_path / "begun")
    (tmp_path / "begun" / "best.safetensors").unlink()
    with pytest.raises(error, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)
