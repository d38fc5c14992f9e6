"""What is told while a network trains and after."""

import json
import re
from pathlib import Path

import pytest

from gpn_triton import train
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.training.parser import parse
from gpn_triton.training.presets import MEASURED, PRESETS
from gpn_triton.training.progress import Pace, aligned
from tests.stores import make_store

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def test_the_time_left_is_that_of_the_samples_left_at_the_pace_so_far():
    now = iter([0.0, 2.0, 10.0, 4000.0]).__next__
    pace = Pace(1000, now)
    assert pace.left() == "?"
    pace.add(100)
    assert pace.left() == "00:18"
    pace.add(300)
    assert pace.left() == "00:15"
    pace.add(400)
    assert pace.left() == "16:40"


def test_columns_stand_below_each_other():
    assert aligned([("a", "bb", "c"), ("dddd", "e", "")]) == "a     bb  c\ndddd  e"


@pytest.mark.parametrize("quiet", [False, True])
def test_seeds_end_in_a_table_and_quiet_runs_tell_it_alone(tmp_path, capsys, quiet):
    write_events(tmp_path / "a.h5", make_store(40, channels=9, empty=False))
    command = (
        f"--train-file {tmp_path}/a.h5 --out {tmp_path}/runs --hidden 4 --time-bins 3 --epochs 2 "
        "--batch-size 8 --seed 1 2 --device cpu"
    )
    assert train.main([*command.split(), *["--quiet"] * quiet]) == 0
    lines = capsys.readouterr().out.splitlines()
    if quiet:
        assert len(lines) == 5
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [bool(re.search(r"  \d+:\d\d left$", line)) for line in epochs] == (
        [] if quiet else [True, True, True, False]
    )
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "result.json").read_text())
    head, one, two, mean, last = lines[-5:]
    assert head.split()[:3] == ["seed", "test", "%"]
    for line, result in zip((one, two), summary["results"], strict=True):
        assert line.split()[:2] == [str(result["seed"]), f"{100 * result['test_accuracy']:.2f}"]
    assert f"{100 * summary['test_accuracy']:.2f} +- " in mean and mean.startswith("mean")
    assert last.endswith(str(run)) and "(2 seeds)" in last


def test_presets_are_listed_with_their_networks_and_figures_that_are_on_record(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--list-presets"])
    assert ended.value.code == 0
    head, none, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == list(PRESETS) and none.startswith("(none)")
    cells = re.split("  +", next(row for row in rows if row.startswith("ssc-wide")))
    assert cells[1:5] == ["ssc", "gpn 1024-1024-1024", "60", "1024"]
    # no figure is told that does not stand in docs/results
    assert set(MEASURED) <= {None, *PRESETS}
    for told in MEASURED.values():
        figure, file = re.match(r"([\d.]+) % .* \(docs/results/(\S+)\)$", told).groups()
        text = (RESULTS / file).read_text()
        if file.endswith(".md"):
            assert re.search(rf"^\| `best` \|.* {re.escape(figure)} \(", text, re.MULTILINE)
            continue
        result = json.loads(text)
        assert f"{100 * result['test_accuracy']:.2f}" == figure and result["seed"] == 0
