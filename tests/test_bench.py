"""The benchmarks run, refuse what is wrong, and their records render and compare; no timing."""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, contest, gpu, measure, report, scaling, subjects
from bench.contest import NO_TIME
from tests.interpreter import need_interpreter

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
WORKER = "PYTEST_XDIST_WORKER"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record file of one tiny run over all kinds of benchmark."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    some = ["-k", "not gru and not lif and not forward_backward and not tuning", "--rounds=2"]
    where = [str(ROOT / "bench"), f"--rootdir={ROOT}", f"--benchmark-json={path}"]
    with pytest.MonkeyPatch.context() as patch:
        # in a worker of pytest-xdist benchmarks refuse to run
        patch.delenv(WORKER, raising=False)
        assert pytest.main([*where, "--benchmark-only", *gpu.TINY, *some]) == 0
    return path


def test_every_kind_runs_says_what_was_left_out_and_records_what_a_figure_needs(record):
    contents = json.loads(record.read_text())
    found = [benchmark["extra_info"] for benchmark in contents["benchmarks"]]
    # tiles are compared where kernels run
    assert {r["kind"] for r in found} >= set(cases.KINDS) - {"tuning"}
    layer = {r["subject"]: r["held_beyond_bytes"] for r in found if r["kind"] == "layer"}
    assert {"hoisted", "lstm"} <= layer.keys()
    # ours holds less for backward than the loops
    assert layer["gpn-cpu-every-10"] < layer["gpn-cpu"] < layer["loop"] < layer["authors"]
    left_out = contents["left_out"]
    assert {left["subject"] for left in left_out} >= {"gpn-triton", "authors-graph"}
    assert all(left["outcome"] == "skipped" and left["reason"] for left in left_out)
    for r, benchmark in zip(found, contents["benchmarks"], strict=True):
        assert r["versions"]["torch"] == torch.__version__ and r["device"] and r["threads"] >= 1
        assert {"commit", "dtype", "scaled", "full", "mode", "time_ratio"} <= r.keys()
        assert min(r[k] for k in ("peak_bytes", "floor_ms", "fraction_of_floor", "bytes")) > 0
        assert r["kind"] == "binning" or r["flops"] > 0
        assert r.get("spikes_a_step", 1) > 0
        # pytest-benchmark's clock shows the rounds that were measured
        assert benchmark["stats"]["rounds"] == 2
        assert 1e3 * benchmark["stats"]["median"] == pytest.approx(r["median_ms"])


@pytest.mark.parametrize("subject", ["gpn-cpu", "lif", "cuba-lif"])
@pytest.mark.parametrize(("name", "damage"), [
    ("spike", lambda out: torch.cat([1 - out[:1].detach(), out[1:]])),
    ("gradient", lambda out: out + 0.01 * (out - out.detach())),
    ("result is not finite", lambda out: out * torch.inf),
])  # fmt: skip
def test_gate_names_what_is_wrong(name, damage, subject):
    entry = subjects.entries(cases.cases("recurrence", "tiny")[0], CPU, True)(subject)
    assert entry.check()["spikes_a_step"] > 0
    forward = entry.call.forward
    entry.call.forward = lambda: damage(forward())
    with pytest.raises(subjects.Wrong, match=name):
        entry.check()


def test_contest_times_in_turns_and_names_who_is_wrong_or_late_and_times_neither():
    case, order = cases.cases("layer", "tiny")[0], []
    right = subjects.entries(case, CPU, True)

    def prepare(name):
        entry = right(name)
        forward = entry.call.forward
        if name == "gpn-cpu":
            entry.call.forward = lambda: 1 - forward()
        return entry

    run = contest.Contest(case, prepare, ["gpn-cpu", "loop"], CPU, 1, 0)
    outcome, reason = run.left_out("gpn-cpu")
    assert run.times.keys() == {"loop"}
    assert outcome == "failed" and reason.startswith("wrong: gpn-cpu: ")
    late = contest.Contest(case, right, ["loop"], CPU, 1, 0, deadline=0)
    assert not late.times and late.left_out("loop") == ("skipped", "no time left")
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    measure.race(calls, CPU, rounds=3, seconds=0)
    assert order == list("abcbcacab")[: len(order)]


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
    assert "### layer: tiny" in page and "| gpn-cpu | " in page and "### Left out" in page
    for name in ("tiny-time-against-T.png", "tiny-memory-against-T.png"):
        assert name in page and (tmp_path / name).stat().st_size > 1000


def test_compare_names_regressions_of_ours_and_only_those(record, tmp_path, capsys):
    old = json.loads(record.read_text())
    for benchmark in old["benchmarks"]:
        benchmark["extra_info"] |= {"median_ms": 10.0, "low_ms": 9.9, "high_ms": 10.1}
    new = copy.deepcopy(old)
    changes = {
        "gpn-cpu": {"median_ms": 12.0, "low_ms": 11.9, "high_ms": 12.1},
        "gpn-cpu-every-10": {"peak_bytes": 1e9},
        "authors": {"median_ms": 20.0, "low_ms": 19.0, "high_ms": 21.0},
        # slower by its median, within the spread
        "hoisted": {"median_ms": 11.0, "low_ms": 9.0, "high_ms": 13.0},
    }
    for info in (b["extra_info"] for b in new["benchmarks"] if b["group"] == "layer: tiny"):
        info |= changes.get(info["subject"], {})
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, contents in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(contents))

    lines, regressions = report.compare(*map(report.read, paths))
    assert len(lines) == 3 and not any("hoisted" in line for line in lines)
    assert [line.split()[0] for line in regressions] == ["slower", "more"]
    for one, other, status in ((0, 1, 1), (1, 0, 0), (0, 0, 0)):
        assert report.main(["--compare", str(paths[one]), str(paths[other])]) == status
    assert "no change beyond the spread" in capsys.readouterr().out


def test_report_s_mistakes_are_one_clear_line(tmp_path, capsys):
    for argv, message in (
        (["--compare", "none.json", "none.json"], "none.json: no such file"),
        ([str(tmp_path)], "no record; write one"),
    ):
        assert report.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_names_are_unique_the_headline_is_never_scaled_and_a_gpu_runs_every_file():
    for kind in cases.KINDS:
        full, small = cases.cases(kind, "full"), cases.cases(kind, "small")
        assert len({c.name for c in full}) == len(full) and not any(c.scaled for c in full)
        assert {c.name for c in small} <= {c.name for c in full}
    headline = next(c for c in cases.cases("layer", "small") if c.name == "shd")
    assert not headline.scaled and headline.inputs == 700
    files = {f for part in gpu.PARTS.values() for f in part.files if part.is_benchmark}
    assert files == {f"bench/{path.name}" for path in (ROOT / "bench").glob("bench_*.py")}


def test_gpu_command_runs_at_tiny_sizes_and_records_what_it_measured(tmp_path, monkeypatch):
    need_interpreter()
    monkeypatch.delenv(WORKER, raising=False)
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)]
    command += ["--parts", "steps,counters"]
    subprocess.run(command, cwd=ROOT, check=True)
    found = report.records(report.read(tmp_path / "gpu-steps.json"))
    assert {r["subject"] for r in found} >= {"gpn-persistent", "gpn-stepwise", "lstm"}
    # as if the deadline had cut one case of the first part short
    record = json.loads((tmp_path / "gpu-steps.json").read_text())
    record["left_out"].append(
        {"group": found[0]["group"], "subject": "lstm", "outcome": "skipped", "reason": NO_TIME}
    )
    (tmp_path / "gpu-steps.json").write_text(json.dumps(record))
    state = json.loads((tmp_path / "gpu-parts.json").read_text())
    assert state["parts"] == {"steps": "ran", "counters": "ran"}
    del state["parts"]["steps"]
    (tmp_path / "gpu-parts.json").write_text(json.dumps(state))
    again = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "counters: ran in an earlier call" in again
    second = report.records(report.read(tmp_path / "gpu-steps-2.json"))
    assert {r["group"] for r in second} == {found[0]["group"]}


def test_records_of_another_commit_are_set_aside(tmp_path):
    of = {"commit": "a", "device": "some GPU"}
    gpu.Ended(tmp_path, of).add("steps", "ran")
    (tmp_path / "gpu-steps.json").write_text("{}")
    assert gpu.Ended(tmp_path, of).parts == {"steps": "ran"}
    assert gpu.Ended(tmp_path, {**of, "commit": "b"}).parts == {}
    assert [path.name for path in gpu.record_paths(tmp_path, "steps")] == []
    assert (tmp_path / "old-gpu-steps.json").exists()


def test_a_part_whose_tool_is_not_there_is_left_out_with_the_reason(tmp_path, monkeypatch):
    args = argparse.Namespace(budget=100, dry_run=False, out=tmp_path, commit=None)
    monkeypatch.setattr(gpu, "start", lambda *command, tool=(): None)
    monkeypatch.setattr(gpu, "wait", lambda process, seconds: 0)
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: None)
    ended = gpu.Ended(tmp_path, {})
    failed = gpu.run(["tests", "racecheck"], args, ended)
    assert failed == {"racecheck": "left out: compute-sanitizer is not here"}
    assert ended.parts == {"tests": "ran"}


def test_the_page_on_scaling_holds_the_computed_table():
    assert scaling.table() in (ROOT / "docs" / "scaling.md").read_text()
    # one process passes nothing on, two pass on the whole buffer once
    assert scaling.ring_seconds(1000, 1, 1e9, 1e-6) == 0
    assert scaling.ring_seconds(1000, 2, 1e9, 0) == pytest.approx(1e-6)
