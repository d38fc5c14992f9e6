"""The benchmarks run, refuse what is wrong, and their records render and compare; no timing."""

import copy
import json
from pathlib import Path

import pytest
import torch

from bench import cases, measure, report, subjects

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def bench(*args):
    """Run pytest on bench/ at the smallest size, in this process; returns its exit status."""
    options = ["--size", "tiny", "--bench-device", "cpu", "--rounds", "2", "--case-seconds", "0"]
    options += [
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        "-k",
        "not gru and not lif and not forward_backward",
    ]
    return pytest.main([*args, f"--rootdir={ROOT}", *options])


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record file of one tiny run over all kinds of benchmark."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    assert bench(str(ROOT / "bench"), f"--benchmark-json={path}") == 0
    return path


def tiny(kind, backward=True):
    """A function that prepares the subjects of the smallest case of a kind."""
    return subjects.entries(cases.cases(kind, "tiny")[0], CPU, backward)


def test_every_kind_of_benchmark_runs_and_says_what_was_left_out(record):
    contents = json.loads(record.read_text())
    found = report.records(report.read(record))
    assert {r["kind"] for r in found} == set(cases.KINDS)
    assert {"gpn-torch", "gpn-torch-every-10", "loop", "authors", "hoisted", "lstm"} <= {
        r["subject"] for r in found if r["kind"] == "layer"
    }
    assert {left["subject"] for left in contents["left_out"]} >= {"gpn-triton", "authors-graph"}
    assert all(left["outcome"] == "skipped" and left["reason"] for left in contents["left_out"])


def test_records_carry_what_a_figure_needs(record):
    for benchmark in json.loads(record.read_text())["benchmarks"]:
        r = benchmark["extra_info"]
        assert r["versions"]["torch"] == torch.__version__ and r["device"] and r["threads"] >= 1
        assert {"commit", "dtype", "scaled", "full", "mode", "time_ratio"} <= r.keys()
        assert r["peak_bytes"] > 0 and r["floor_ms"] > 0 and r["fraction_of_floor"] > 0
        assert r["bytes"] > 0 and (r["flops"] > 0) == (
            r["subject"] != "lif" and r["kind"] != "binning"
        )
        # pytest-benchmark's clock shows the rounds that were measured
        assert benchmark["stats"]["rounds"] == 2
        assert 1e3 * benchmark["stats"]["median"] == pytest.approx(r["median_ms"])


def test_layer_holds_less_for_backward_than_the_loops(record):
    held = {
        r["subject"]: r["held_beyond_bytes"]
        for r in report.records(report.read(record))
        if r["kind"] == "layer"
    }
    assert held["gpn-torch-every-10"] < held["gpn-torch"] < held["loop"] < held["authors"]


@pytest.mark.parametrize("kind", ["recurrence", "layer"])
@pytest.mark.parametrize("subject", ["gpn-torch", "authors", "lif"])
def test_gate_passes_what_is_right(kind, subject):
    assert tiny(kind)(subject).check()["spikes_a_step"] > 0


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("spike", lambda out: torch.cat([1 - out[:1].detach(), out[1:]])),
        ("gradient", lambda out: out + 0.01 * (out - out.detach())),
        ("result is not finite", lambda out: out * torch.inf),
    ],
)
def test_gate_names_what_is_wrong(name, damage):
    entry = tiny("recurrence")("gpn-torch")
    forward = entry.call.forward
    entry.call.forward = lambda: damage(forward())
    with pytest.raises(subjects.Wrong, match=name):
        entry.check()


def test_wrong_subject_fails_as_wrong_and_is_not_timed(tmp_path, monkeypatch, capsys):
    right, path = subjects.gpn, tmp_path / "broken.json"

    def without_bypass(x, weight_x, weight_v, bias, *args, **options):
        bias = bias.detach().clone()
        bias[2 * len(bias) // 4 : 3 * len(bias) // 4] = 0
        return right(x, weight_x, weight_v, bias, *args, **options)

    monkeypatch.setattr(subjects, "gpn", without_bypass)
    layer = str(ROOT / "bench" / "bench_layer.py")
    names = [f"{layer}::bench_layer[{name}-tiny]" for name in ("gpn-torch", "authors")]
    assert bench(*names, f"--benchmark-json={path}") == pytest.ExitCode.TESTS_FAILED
    assert "wrong: gpn-torch: " in capsys.readouterr().out
    contents = json.loads(path.read_text())
    assert [b["extra_info"]["subject"] for b in contents["benchmarks"]] == ["authors"]
    assert contents["left_out"][0]["outcome"] == "failed"


def test_race_takes_rounds_in_turns_and_lets_the_slow_stop():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.race(calls, CPU, rounds=3, seconds=0)
    assert order == list("abcbcacab")[: len(order)]
    assert {len(t.wall) for t in times.values()} == {3}


def test_memory_of_a_call_is_counted():
    x = torch.randn(1000, 256)

    def call():
        y = x * 2
        z = y + 1
        del y
        return z.sum()

    # y and z live at once, and little else
    assert 2 * x.nbytes <= measure.peak_bytes(call, CPU) < 2 * x.nbytes + 10_000


def test_report_renders_every_record_with_plots(record, tmp_path):
    (tmp_path / "tiny.json").write_bytes(record.read_bytes())
    page = report.render(tmp_path).read_text()
    assert "### layer: tiny" in page and "| gpn-torch | " in page and "### Left out" in page
    for name in ("tiny-roofline.png", "tiny-time-against-T.png", "tiny-memory-against-T.png"):
        assert name in page and (tmp_path / name).stat().st_size > 1000


def test_compare_names_regressions_of_ours_and_only_those(record, tmp_path, capsys):
    old = json.loads(record.read_text())
    for benchmark in old["benchmarks"]:
        benchmark["extra_info"] |= {"median_ms": 10.0, "low_ms": 9.9, "high_ms": 10.1}
    new = copy.deepcopy(old)
    infos = [b["extra_info"] for b in new["benchmarks"] if b["group"] == "layer: tiny"]
    changes = {
        "gpn-torch": {"median_ms": 12.0, "low_ms": 11.9, "high_ms": 12.1},
        "gpn-torch-every-10": {"peak_bytes": 1e9},
        "authors": {"median_ms": 20.0, "low_ms": 19.0, "high_ms": 21.0},
        # slower by its median, within the spread
        "hoisted": {"median_ms": 11.0, "low_ms": 9.0, "high_ms": 13.0},
    }
    for info in infos:
        info |= changes.get(info["subject"], {})
    paths = []
    for name, contents in (("old", old), ("new", new)):
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_text(json.dumps(contents))

    assert report.main(["--compare", *paths]) == 1
    lines, regressions = report.compare(*map(report.read, map(Path, paths)))
    assert len(lines) == 3 and not any("hoisted" in line for line in lines)
    assert [line.split()[0] for line in regressions] == ["slower", "more"]
    assert report.main(["--compare", paths[1], paths[0]]) == 0
    assert report.main(["--compare", paths[0], paths[0]]) == 0
    assert "no change beyond the spread" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--compare", "none.json", "none.json"], "none.json: no such file"),
        (["{tmp}"], "no record; write one"),
    ],
)
def test_report_s_mistakes_are_one_clear_line(argv, message, tmp_path, capsys):
    assert report.main([a.format(tmp=tmp_path) for a in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_names_are_unique_and_say_when_they_are_scaled():
    for kind in cases.KINDS:
        full, small = cases.cases(kind, "full"), cases.cases(kind, "small")
        assert len({c.name for c in full}) == len(full)
        assert {c.name for c in small} <= {c.name for c in full}
        assert not any(c.scaled for c in full)
    headline = next(c for c in cases.cases("layer", "small") if c.name == "shd")
    assert (headline.T, headline.B, headline.hidden, headline.inputs) == (100, 256, (128,), 700)
    assert not headline.scaled
