"""Fixtures and options of the benchmarks; see README.md beside this file.

The subjects of one case are set up, checked and timed together, in turns, when the first of them is
asked for; each then reports its own rounds to pytest-benchmark through a clock that is set forward
by the measured time.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import measure, report
from bench.cases import SIZES, Case, cases
from bench.competitors import Unavailable
from bench.subjects import Wrong
from gpn_triton import cost
from gpn_triton import device as machine
from gpn_triton.provenance import provenance

_contests = pytest.StashKey[dict[str, "Contest"]]()
_left_out = pytest.StashKey[list[dict[str, str]]]()
_records = pytest.StashKey[list[dict[str, Any]]]()
_now = 0.0


def replayed_seconds() -> float:
    """The clock pytest-benchmark reads: moved on by what was measured, never by itself."""
    return _now


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
            item.add_marker(pytest.mark.benchmark(timer=replayed_seconds, group=_group(item)))
    # all subjects of a case one after the other: only one case's tensors live at a time
    items.sort(key=lambda item: (item.path, item.originalname, _group(item)))


def _group(item) -> str:
    params = getattr(item, "callspec", None)
    name = item.originalname.removeprefix("bench_").replace("_", " ")
    return f"{name}: {params.params['case']}" if params else name


class Contest:
    """The subjects of one case: set up, checked, timed in turns.

    Args:
        prepare: makes a subject's Entry from its name. subjects: names, in order.
        device, rounds, seconds: see measure.race.
    Attributes:
        times, info: by subject, of those that ran. failed: by subject, why the others did not.
    """

    def __init__(
        self,
        prepare: Callable[[str], Any],
        subjects: list[str],
        device: torch.device,
        rounds: int,
        seconds: float,
    ):
        self.failed: dict[str, Exception] = {}
        self.info: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, Any] = {}
        calls = {}
        for name in subjects:
            try:
                entry = prepare(name)
                seen = entry.check()
                entry.call()
                held = measure.held_bytes(entry.saves) if entry.saves else (None, None)
                peak = getattr(entry.call, "peak_bytes", None)
                peak = measure.peak_bytes(entry.call, device) if peak is None else peak
            except (Unavailable, Wrong, torch.OutOfMemoryError) as error:
                self.failed[name] = error
                entry = None
            except Exception as error:
                # a competitor that breaks is left out and named; ours breaking is a failure
                self.failed[name] = (
                    error
                    if name.startswith("gpn")
                    else Unavailable(f"{type(error).__name__}: {error}")
                )
                entry = None
            if entry is None:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            calls[name] = entry.call
            self.counts[name] = entry.count
            self.info[name] = {
                **seen,
                "peak_bytes": peak,
                "held_bytes": held[0],
                "held_beyond_bytes": held[1],
            }
        self.times = measure.race(calls, device, rounds, seconds) if calls else {}


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where the benchmarks run."""
    return _device(request.config)


@pytest.fixture(scope="session")
def ceilings(request, device) -> machine.Ceilings:
    """What the device can do at best; not worth a second where shapes are tiny."""
    tiny = request.config.getoption("--size") == "tiny"
    return machine.ceilings(device, **({"n": 128} if tiny else {}))


@pytest.fixture(scope="session")
def header(device) -> dict[str, Any]:
    """What every record carries of the machine and the program."""
    found = provenance(device)
    return {
        **{key: found[key] for key in ("commit", "device", "threads")},
        "versions": found["versions"],
        "device_type": device.type,
    }


@pytest.fixture
def contest(request, benchmark, device, ceilings, header):
    """A function run(prepare, case, subject, **info) that measures and records one subject.

    `prepare(name)` returns a subject's Entry; it is called for every selected subject of the case.
    """

    def run(prepare: Callable[[str], Any], case: Case, subject: str, **info: Any) -> None:
        global _now
        group, contests = _group(request.node), request.config.stash[_contests]
        options = request.config.option
        if group not in contests:
            contests.clear()
            gc.collect()
            rivals = [
                item.callspec.params["subject"]
                for item in request.session.items
                if item.path == request.node.path and _group(item) == group
            ]
            # what stands in for a larger shape is there to show that it runs, and roughly how fast
            share = 0.4 if case.scaled else 1.0
            rounds = 1 if benchmark.disabled else max(2, round(share * options.rounds))
            seconds = share * options.case_seconds
            contests[group] = Contest(prepare, rivals, device, rounds, seconds)
        entered = contests[group]
        if subject in entered.failed:
            error = entered.failed[subject]
            if isinstance(error, Wrong):
                pytest.fail(f"wrong: {subject}: {error}", pytrace=False)
            if isinstance(error, torch.OutOfMemoryError):
                pytest.skip(f"out of memory: {str(error).splitlines()[0]}")
            if isinstance(error, Unavailable):
                pytest.skip(str(error))
            raise error
        times, count = entered.times[subject], entered.counts[subject]
        floor = cost.floor_seconds(count, ceilings)
        ours = [s for s in ("gpn-triton", *entered.times) if s.startswith("gpn")]
        first = next((s for s in ours if s in entered.times), None)
        wall = measure.summary(times.wall)
        benchmark.extra_info.update(
            header,
            case=case.name,
            kind=case.kind,
            subject=subject,
            T=case.T,
            B=case.B,
            hidden=list(case.hidden),
            inputs=case.inputs,
            dtype=case.dtype,
            scaled=case.scaled,
            full=list(case.full),
            **wall,
            device_median_ms=measure.summary(times.device)["median_ms"] if times.device else None,
            flops=count.flops,
            serial_flops=count.serial_flops,
            bytes=count.bytes,
            floor_ms=1e3 * floor,
            fraction_of_floor=1e3 * floor / wall["median_ms"],
            ceilings={
                "flops_per_s": ceilings.flops_per_s,
                "bytes_per_s": ceilings.bytes_per_s,
                "source": ceilings.source,
            },
            time_relative_to=first,
            time_ratio=_ratio(times.wall, entered.times[first].wall) if first else None,
            **entered.info[subject],
            **info,
        )
        request.config.stash[_records].append(
            {**benchmark.extra_info, "group": group, "rounds": len(times.wall)}
        )
        rounds = iter(times.wall)

        def advance() -> None:
            global _now
            _now += next(rounds)

        benchmark.pedantic(advance, rounds=len(times.wall))

    return run


def _ratio(times: list[float], others: list[float]) -> float:
    """Median over rounds of one's time over another's, taken next to each other."""
    return statistics.median(a / b for a, b in zip(times, others, strict=False))


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
