"""Damaged files end in one clear line or are read right: no traceback, no hang, no half file.

A case is a damage and the commands that read what was damaged. Rows named FAILED once ended in a
traceback or a wrong result; the others are drawn from a seed, and a wider range of seeds searches
further.
"""

import contextlib
import json
import math
import resource
import shutil
import signal
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpn_triton import export, predict, train
from gpn_triton.data.sources import hdf5
from gpn_triton.data.sources.hdf5 import read_events, write_events
from tests.stores import make_store

SMALL = "--hidden 4 --time-bins 4 --batch-size 8 --device cpu --epochs 3".split()
# a length of many gigabytes shall be refused here, too, and not exhaust the machine
SECONDS, ADDRESS_SPACE = 60, 24 << 30
GONE = object()
WEIRD = [
    GONE, None, True, -1, 0, 1, 0.5, -2.5, math.nan, math.inf, 2**31, 2**62, 10**30, 1e-300, "",
    "x" * 5000, "../..", "cuda:99", "gpn", "\0", "nan", [], [1], [None], ["a"], [0.5], [[1]],
    [2**62], {}, {"a": 1},
]  # fmt: skip


class TooSlow(BaseException):
    """A case took longer than SECONDS; no Exception, so that no command can take it for its own."""


@contextlib.contextmanager
def bounds():
    """End what takes too long or asks for too much memory."""

    def late(*_):
        raise TooSlow

    old, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, old)


def damage_bytes(path: Path, rng) -> None:
    """Flip, replace, lose or add some of a file's bytes, or make eight of them a huge number."""
    data = bytearray(path.read_bytes())
    at, length, kind = int(rng.integers(len(data))), int(rng.integers(1, 64)), rng.integers(6)
    if kind == 0:
        for k in rng.integers(len(data), size=rng.integers(1, 9)):
            data[k] ^= 1 << int(rng.integers(8))
    elif kind == 5:
        data[at // 8 * 8 :][:8] = int([2**64 - 1, 2**40, 2**31][rng.integers(3)]).to_bytes(8, "big")
    else:
        end = {1: at + length, 2: at, 3: at + length, 4: len(data)}[kind]
        data[at:end] = {1: bytes(len(data[at:end])), 2: rng.bytes(length)}.get(kind, b"")
    path.write_bytes(data)


def put(values, place, value) -> None:
    """Put a value at a place, which is a list of keys, in nested dicts and lists."""
    for key in place[:-1]:
        values = values[key]
    if value is GONE:
        del values[place[-1]]
    else:
        values[place[-1]] = value


def places(values, above=()):
    """Every place in nested dicts and lists."""
    keys = values if isinstance(values, dict) else range(len(values))
    for key in keys:
        yield (*above, key)
        if isinstance(values[key], dict | list):
            yield from places(values[key], (*above, key))


# HDF5 files

FLOATS = h5py.vlen_dtype(np.float16)
LAYOUT = ("spikes/times", "spikes/units", "labels", "extra/speaker", "extra/keys")
OTHER = [
    dict(data=np.zeros(12, np.complex64)),
    dict(data=np.zeros(12, [("a", "i4"), ("b", "f4")])),
    dict(data=np.zeros((12, 0), np.int32)),
    dict(data=np.array(3)),
    dict(data=h5py.Empty("f4")),
    dict(data=["a\nü" * 9] * 12, dtype=h5py.string_dtype()),
    dict(data=np.full(12, 2**64 - 1, np.uint64)),
    dict(data=np.full(12, np.nan)),
    dict(data=np.zeros(12, np.int32), dtype=h5py.enum_dtype({"a": 0, "b": 1}, np.int32)),
    dict(data=np.zeros(12, np.longdouble)),
    dict(data=np.zeros(12, "V5")),
    dict(shape=(12,), dtype=h5py.ref_dtype),
    dict(shape=(12,), dtype=h5py.regionref_dtype),
    dict(shape=(12,), dtype=FLOATS),
    dict(shape=(12, 2), dtype=FLOATS),
    dict(shape=(12,), dtype=h5py.vlen_dtype(np.dtype("S3"))),
    dict(shape=(12,), dtype=h5py.vlen_dtype(h5py.vlen_dtype(np.float32))),
    dict(shape=(12,), dtype=np.dtype((np.float32, (4,)))),
    dict(shape=(10**9,), dtype=np.uint8, chunks=(10**6,), compression="gzip"),
    dict(shape=(2**62,), dtype=np.int64, chunks=(1000,)),
    dict(shape=(10**7,), dtype=FLOATS, chunks=(1000,)),
    "/spikes/times", "/nowhere", h5py.ExternalLink("/dev/zero", "/x"),
]  # fmt: skip


def damage_layout(path: Path, rng) -> None:
    """Put another dataset, a link or nothing in the place of one of a file's datasets."""
    name, other = LAYOUT[rng.integers(len(LAYOUT))], OTHER[rng.integers(len(OTHER))]
    with h5py.File(path, "a") as file:
        del file[name]
        if isinstance(other, dict):
            file.create_dataset(name, **other)
        else:
            file[name] = h5py.SoftLink(other) if isinstance(other, str) else other


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("damage", [damage_bytes, damage_layout])
def test_a_damaged_hdf5_file_is_refused_or_read(tmp_path, damage, seed, monkeypatch):
    monkeypatch.setattr(hdf5, "READ_SECONDS", 20.0)
    rng, path = np.random.default_rng(seed), tmp_path / "events.h5"
    write_events(path, make_store(seed=seed), (np.float16, np.float32)[seed % 2])
    damage(path, rng)
    read = False
    with bounds(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read_events(path).validate("damaged")
            read = True
        except ValueError as error:
            text = str(error)
            assert text.startswith(f"{path}: ") and "expected" in text and "\n" not in text, text
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left[0] == "events.h5" and len(left) == 1 + read, left


# files of a run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Data, a finished run in run/ and, in other-K/, runs of which none may go on with another's
    checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    for part, samples in (("train", 24), ("test", 8)):
        write_events(folder / f"{part}.h5", make_store(samples, seed=len(part), empty=False))
    for name, more in [("run", ""), *((f"other-{k}", more) for k, more in enumerate(OTHERS))]:
        files = [f"--{part}-file={folder / part}.h5" for part in ("train", "test")]
        assert train.main([*files, "--out", str(folder / "runs"), *SMALL, *more.split()]) == 0
        next((folder / "runs").iterdir()).rename(folder / name)
    return folder


OTHERS = ["--hidden 5", "--neuron lstm", "--batch-size 5"]


@pytest.fixture
def check(base, tmp_path, capsys, monkeypatch):
    """Damage a copy of the run, hand it to commands and see how these end."""
    monkeypatch.chdir(tmp_path)
    run, options = tmp_path / "run", tmp_path / "options.toml"
    files = [f"--{part}-file={base / part}.h5" for part in ("train", "test")]
    arguments = {
        "train": (train.main, *files, f"--config={options}", "--out", "out", *SMALL[2:]),
        "resume": (train.main, "--resume", run),
        "eval": (train.main, "--eval-only", run),
        "predict": (predict.main, run, base / "test.h5", "--out", "predictions.csv"),
        "export": (export.main, run, "--out", "export"),
    }

    def contents():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def check(damage, commands):
        shutil.copytree(base / "run", run)
        if "resume" in commands:
            (run / "result.json").unlink()
        damage(run)
        for command in commands.split():
            before = contents()
            main, *argv = arguments[command]
            capsys.readouterr()
            with bounds(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                status = main([*map(str, argv)])
            lines = capsys.readouterr().err.splitlines()
            assert (status, len(lines)) in ((0, 0), (2, 1)), (status, lines)
            assert all(line.startswith("error: ") and len(line) > 17 for line in lines), lines
            after = contents()
            assert not [path for path in after if path.name.startswith(".")]
            assert not status or command == "train" or after == before
            if command == "resume" and not status:
                result = json.loads((run / "result.json").read_text())
                assert math.isfinite(result["test_loss"])

    return check


def change_checkpoint(run, place, value):
    """Change a checkpoint's value; the last epoch is left to do, so that what was read is used."""
    path, newest = sorted(run.glob("checkpoint-*.pt"))
    newest.unlink()
    state = torch.load(path, weights_only=True)
    put(state, place, value)
    torch.save(state, path)


FAILED = [
    ("computes", GONE),
    ("fingerprint", GONE),
    ("fingerprint", "\0"),
    ("fingerprint", [2**62]),
    ("engine", GONE),
    ("engine model", GONE),
    ("engine totals", torch.ones(4, dtype=torch.cfloat)),
    ("engine schedule shape _step_count", [0.5]),
    ("progress epoch", GONE),
    ("progress step", math.inf),
    ("progress seconds", [2**62]),
    ("progress best_accuracy", ["a"]),
    ("progress best_accuracy", "../.."),
    ("progress best_epoch", GONE),
]


@pytest.mark.parametrize("place, value", FAILED, ids=lambda v: "gone" if v is GONE else str(v)[:40])
def test_a_wrong_value_in_a_checkpoint_is_refused_or_used(check, place, value):
    check(lambda run: change_checkpoint(run, place.split(), value), "resume")


@pytest.mark.parametrize("seed", range(8))
def test_any_value_of_a_checkpoint_may_be_wrong(check, base, seed):
    rng = np.random.default_rng(seed)
    state = torch.load(next((base / "run").glob("checkpoint-*.pt")), weights_only=True)
    found = list(places(state))
    place, value = found[rng.integers(len(found))], WEIRD[rng.integers(len(WEIRD))]
    check(lambda run: change_checkpoint(run, place, value), "resume")


@pytest.mark.parametrize("k", range(len(OTHERS)))
def test_another_networks_checkpoint_is_refused(check, base, k):
    def damage(run):
        for path in run.glob("checkpoint-*.pt"):
            path.unlink()
        shutil.copy(sorted((base / f"other-{k}").glob("checkpoint-*.pt"))[0], run)

    check(damage, "resume")
    assert not Path("run", "result.json").exists()


def test_a_flipped_bit_of_a_checkpoint_is_not_taken_for_a_weight(check, base):
    # it FAILED: the older checkpoint has to be taken, or none
    def damage(run):
        path = sorted(run.glob("checkpoint-*.pt"))[-1]
        weight = torch.load(path, weights_only=True)["engine"]["model"]["inputs.0.weight"]
        data = bytearray(path.read_bytes())
        data[data.index(weight.numpy().tobytes()) + 3] ^= 1
        path.write_bytes(data)

    check(damage, "resume")
    weights = [(folder / "run" / "best.safetensors").read_bytes() for folder in (base, Path())]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name, commands", [
    ("checkpoint-00002-000000.pt", "resume"), ("checkpoint-00003-000000.pt", "resume"),
    ("config.json", "eval predict export"), ("best.safetensors", "eval predict export"),
    ("metrics.jsonl", "resume predict"),
])  # fmt: skip
def test_a_damaged_file_of_a_run_is_refused_or_used(check, name, commands, seed):
    check(lambda run: damage_bytes(run / name, np.random.default_rng(seed)), commands)


@pytest.mark.parametrize("seed", range(6))
def test_any_option_of_a_run_may_be_wrong(check, seed):
    def damage(run):
        rng, path = np.random.default_rng(seed), run / "config.json"
        values = json.loads(path.read_text())
        put(values, [list(values)[rng.integers(len(values))]], WEIRD[rng.integers(len(WEIRD))])
        path.write_text(json.dumps(values))

    check(damage, "eval predict export resume")


WEIGHTS = {
    "is missing": lambda t: GONE,
    "has no rows": lambda t: t[:0].clone(),
    "has another dimension": lambda t: t[None],
    "is whole": lambda t: t.long(),
    "is infinite": lambda t: t * torch.inf,
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_weight_that_does_not_fit_is_refused_or_used(check, case):
    def damage(run):
        tensors = load_file(run / "best.safetensors")
        put(tensors, ["inputs.0.weight"], WEIGHTS[case](tensors["inputs.0.weight"]))
        save_file(tensors, run / "best.safetensors")

    check(damage, "eval predict export")


TOML = [
    # this FAILED
    "overflow = " + "[" * 5000,
    "lr = 1979-05-27", "hidden = {a=1}", "seed = [[1]]", "dropout = nan", "alpha = 10e400",
    "seed = 0x7fffffffffffffffff", "hidden = []", "neuron = ", "hidden = [1, 'a']",
    "readout = '''\n'''", "lr = 07", "noise = true", "\0", "nothing = 1",
]  # fmt: skip


@pytest.mark.parametrize("text", TOML, ids=lambda text: repr(text)[:30])
def test_options_that_cannot_be_are_refused(check, text):
    check(lambda run: Path("options.toml").write_text(text), "train")
    assert not Path("out").exists()
