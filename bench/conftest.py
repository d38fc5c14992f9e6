"""Fixtures and options of the benchmarks; see README.md beside this file.

The subjects of one case are set up, checked and timed together, in turns, when the first of them is
asked for; each then reports its own rounds to pytest-benchmark through a clock that is set forward
by the measured time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import report
from bench.cases import SIZES, Case, cases
from bench.contest import Contest
from bench.subjects import Entry, Wrong
from gpn_triton import device as machine

_contests = pytest.StashKey[dict[str, Contest]]()
_left_out = pytest.StashKey[list[dict[str, str]]]()
_records = pytest.StashKey[list[dict[str, Any]]]()


class ReplayedClock:
    """The clock that pytest-benchmark reads: each round moves it on by what was measured.

    benchmark.pedantic cannot take the rounds itself. It runs all rounds of a test before the next
    test begins, so subjects would be measured one after the other and a machine that slows down
    would slow the last. To run the others in its `setup` would run every subject once for every
    other. A timer of one's own is what pytest-benchmark documents.
    """

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, seconds: list[float]) -> Callable[[], tuple[tuple[float], dict]]:
        """A set-up for pedantic that hands one measured round to each of its rounds."""
        rounds = iter(seconds)
        return lambda: ((next(rounds),), {})

    def advance(self, seconds: float) -> None:
        """The round itself."""
        self.now += seconds


_clock = ReplayedClock()


def pytest_addoption(parser):
    group = parser.getgroup("gpn_triton benchmarks")
    group.addoption(
        "--size", choices=SIZES, default=None,
        help="shapes: full (default with a GPU), small (default without) or tiny (a test's)",
    )  # fmt: skip
    group.addoption(
        "--rounds",
        type=int,
        default=7,
        help="least rounds a subject, 0.4 of them where shapes are scaled down (default: 7)",
    )
    group.addoption(
        "--case-seconds", type=float, default=3.0,
        help="go on past --rounds, up to 5 times as many, within so many seconds a case",
    )  # fmt: skip
    group.addoption(
        "--bench-device", default=None, help="cpu or cuda (default: cuda where there is one)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Show the columns that mean something for rounds taken in turns, the fastest first."""
    config.stash[_contests], config.stash[_left_out], config.stash[_records] = {}, [], []
    given = " ".join(map(str, config.invocation_params.args))
    if "--benchmark-columns" not in given and hasattr(config.option, "benchmark_columns"):
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]
    if "--benchmark-sort" not in given and hasattr(config.option, "benchmark_sort"):
        config.option.benchmark_sort = "median"


def _device(config) -> torch.device:
    return torch.device(
        config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
    )


def pytest_generate_tests(metafunc):
    """Cases of the kind that the module names in KIND, and its SUBJECTS."""
    if "case" not in metafunc.fixturenames:
        return
    size = metafunc.config.getoption("--size")
    size = size or ("full" if _device(metafunc.config).type == "cuda" else "small")
    metafunc.parametrize("subject", metafunc.module.SUBJECTS)
    metafunc.parametrize("case", cases(metafunc.module.KIND, size), ids=str)


def pytest_collection_modifyitems(items):
    for item in items:
        if "contest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_clock, group=_group(item)))
    # all subjects of a case one after the other: only one case's tensors live at a time
    items.sort(key=lambda item: (item.path, item.originalname, _group(item)))


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
    return machine.ceilings(device, **({"n": 128} if tiny else {}))


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
            contests[group] = Contest(case, prepare, rivals, device, rounds, seconds)
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
        benchmark.extra_info.update(record)
        request.config.stash[_records].append(record)
        benchmark.pedantic(_clock.advance, rounds=len(wall), setup=_clock.replay(wall))

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


def pytest_report_header(config):
    device = _device(config)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"gpn_triton benchmarks: {device}, {torch.get_num_threads()} threads, load {load:.1f}, "
        f"torch {torch.__version__}"
    )
