"""Fixtures and options of the benchmarks; see README.md beside this file.

The subjects of one case are set up, checked and timed together, in turns, when the first of them is
asked for; each then reports its own rounds to pytest-benchmark through a clock that is set forward
by the measured time.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.cases import SIZES, Case, cases
from bench.contest import NO_TIME, Contest
from bench.subjects import Entry, Wrong
from gpn_triton.machine import device as machine

_contests = pytest.StashKey[dict[str, Contest]]()
_deadline = pytest.StashKey[float]()
_left_out = pytest.StashKey[list[dict[str, str]]]()
_records = pytest.StashKey[list[dict[str, Any]]]()


class ReplayedClock:
    """The clock that pytest-benchmark reads: each round moves it on by what was measured.

    benchmark.pedantic runs all rounds of a test before the next test begins, so that subjects would
    be measured one after the other and a machine that slows down would slow the last. A timer of
    one's own is what pytest-benchmark documents.
    """

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """The round itself."""
        self.now += seconds


_clock = ReplayedClock()
# the kernels' tiles are timed where kernels run
collect_ignore = ["bench_tuning.py"]
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    collect_ignore = []


def pytest_addoption(parser):
    add = parser.getgroup("gpn_triton benchmarks").addoption
    add("--size", choices=SIZES, help="shapes: full (with a GPU), small (without) or a test's tiny")
    add("--rounds", type=int, default=7, help="least rounds a subject, 0.4 of them where scaled")
    add(
        "--case-seconds", type=float, default=3.0,
        help="go on past --rounds, up to 5 times as many, within so many seconds a case",
    )  # fmt: skip
    add("--budget", type=float, default=math.inf, help="seconds after which no subject is begun")
    add(
        "--recorded", action="append", default=[], metavar="FILE.json",
        help="leave out the cases that this record holds whole; may be given several times",
    )  # fmt: skip
    add("--commit", help="of the tree, where it came without its history")
    add("--bench-device", help="cpu or cuda (default: cuda where there is one)")


def pytest_configure(config):
    config.stash[_contests], config.stash[_left_out], config.stash[_records] = {}, [], []
    config.stash[_deadline] = time.monotonic() + config.getoption("--budget")


def _device(config) -> torch.device:
    return torch.device(
        config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
    )


def pytest_generate_tests(metafunc):
    """Cases of the kind that the module names in KIND, and its SUBJECTS.

    Where these are a function, it answers with those of a case in a benchmark of the module.
    """
    if "case" not in metafunc.fixturenames:
        return
    size = metafunc.config.getoption("--size")
    size = size or ("full" if _device(metafunc.config).type == "cuda" else "small")
    kind, subjects = metafunc.module.KIND, metafunc.module.SUBJECTS
    name = metafunc.function.__name__
    pairs = [
        (subject, case)
        for case in cases(kind, size)
        for subject in (subjects(case, name) if callable(subjects) else subjects)
    ]
    ids = [f"{subject}-{case}" for subject, case in pairs]
    metafunc.parametrize(("subject", "case"), pairs, ids=ids)


def pytest_collection_modifyitems(config, items):
    whole = set()
    for path in config.getoption("--recorded"):
        contents = report.read(Path(path))
        cut = {left["group"] for left in contents["left_out"] if left["reason"] == NO_TIME}
        whole |= {record["group"] for record in report.records(contents)} - cut
    done = [item for item in items if _group(item) in whole]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in done]
    for item in items:
        if "contest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_clock, group=_group(item)))


def _group(item) -> str:
    params = getattr(item, "callspec", None)
    name = item.originalname.removeprefix("bench_").replace("_", " ")
    return f"{name}: {params.params['case']}" if params else name


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where the benchmarks run."""
    return _device(request.config)


@pytest.fixture(scope="session")
def ceilings(request, device) -> machine.Ceilings:
    """What the device can do at best; not worth a second where shapes are tiny."""
    tiny = request.config.getoption("--size") == "tiny"
    return machine.ceilings(device, measured=True, **({"n": 128} if tiny else {}))


@pytest.fixture
def contest(request, benchmark, device, ceilings):
    """A function run(prepare, case, subject, **info) that measures and records one subject.

    `prepare(name)` returns a subject's Entry; it is called for every selected subject of the case.
    """

    def run(prepare: Callable[[str], Entry], case: Case, subject: str, **info: Any) -> None:
        group, contests = _group(request.node), request.config.stash[_contests]
        if group not in contests:
            contests.clear()
            gc.collect()
            rivals = [
                item.callspec.params["subject"]
                for item in request.session.items
                if item.path == request.node.path and _group(item) == group
            ]
            # what stands in for a larger shape is there to show that it runs, and roughly how fast
            share, options = 0.4 if case.scaled else 1.0, request.config.option
            rounds = 1 if benchmark.disabled else max(2, round(share * options.rounds))
            seconds = share * options.case_seconds
            deadline = request.config.stash[_deadline]
            contests[group] = Contest(case, prepare, rivals, device, rounds, seconds, deadline)
        entered = contests[group]
        if subject in entered.failed:
            outcome, reason = entered.left_out(subject)
            if outcome == "skipped":
                pytest.skip(reason)
            if isinstance(entered.failed[subject], Wrong):
                pytest.fail(reason, pytrace=False)
            raise entered.failed[subject]
        wall = entered.times[subject].wall
        record = entered.record(subject, ceilings, group=group, **info)
        record["commit"] = request.config.getoption("--commit") or record["commit"]
        benchmark.extra_info.update(record)
        request.config.stash[_records].append(record)
        rounds = iter(wall)
        benchmark.pedantic(_clock.advance, rounds=len(wall), setup=lambda: ((next(rounds),), {}))

    return run


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    result = (yield).get_result()
    if result.when == "call" and result.outcome != "passed":
        reason = result.longrepr[2] if result.skipped else str(result.longrepr).splitlines()[-1]
        params = item.callspec.params if hasattr(item, "callspec") else {}
        item.config.stash[_left_out].append(
            {
                "group": _group(item),
                "subject": params.get("subject", item.name),
                "outcome": result.outcome,
                "reason": reason.removeprefix("Skipped: "),
            }
        )


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Name what did not run, and why, in the record; drop what only says who ran it."""
    output_json["left_out"] = config.stash[_left_out]
    output_json["machine_info"].pop("node", None)
    for record in output_json["benchmarks"]:
        record["params"] = {k: record["extra_info"].get(k) for k in ("case", "subject")}


def pytest_terminal_summary(terminalreporter, config):
    """Print what pytest-benchmark's tables lack, memory first of all, of cases at full size."""
    full = [r for r in config.stash[_records] if not r["scaled"]]
    if full:
        terminalreporter.section("time, memory and floors of the cases at full size")
    for name, group in report.by_group(full).items():
        terminalreporter.write_line(f"\n{name}: {report.describe(group[0])}")
        terminalreporter.write_line(report.table(group))
