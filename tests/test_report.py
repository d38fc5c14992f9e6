"""The page of a run: what it holds, and that it works in a browser."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from gpn_triton import report
from gpn_triton.analysis.record import read_records, spent
from gpn_triton.analysis.subject import run_samples
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.machine.profile import profiled
from gpn_triton.training import run_folder
from gpn_triton.training.build import build_model
from gpn_triton.training.objective import Epoch
from gpn_triton.training.options import TrainConfig
from tests.stores import make_store

pytest.importorskip("plotly")
T, N, CLASSES = 6, 8, 2
FILES = dict(least=60, most=60, end=1.0, empty=False, band=(100, 200))


def write_run(folder, classes=CLASSES, channels=700, **options):
    """A run's folder as training leaves it, with two made-up epochs and weights as they are drawn,
    strong enough for spikes."""
    cfg = TrainConfig(**{"hidden": (N,), "time_bins": T, "epochs": 2, **options})
    seeds = run_folder.seed_folders(folder, cfg.seed)
    for seed, own in zip(cfg.seed, seeds, strict=True):
        own.mkdir(parents=True)
        torch.manual_seed(seed)
        model = build_model(cfg, channels, classes)
        with torch.no_grad():
            model.output.weight.mul_(5)
            for parameter in model.inputs.parameters():
                parameter.mul_(5)
        run_folder.save_weights(own / "best.safetensors", model)
        names = [f"word {k}" for k in range(classes)] if classes > 1 else ["sum"]
        lines = [{"config": {**cfg.to_dict(), "seed": seed}, "class_names": names,
                  "num_channels": channels}]  # fmt: skip
        for k in (1, 2):
            lines.append(Epoch(
                epoch=k, train_loss=2 / k + seed, train_accuracy=0.3 * k, valid_loss=3 / k,
                valid_accuracy=0.25 * k, activity=[0.1 * k], lr=0.01 / k, seconds=1.5 * k,
                samples_per_second=100.0, skipped_steps=0, dead=[0.1], saturated=[0.0],
                gradient_norm=[0.5, 0.6],
            ).to_dict())  # fmt: skip
        (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run_folder.write_json(own / "result.json", {
            "test_accuracy": 0.75, "test_loss": 0.25, "best_epoch": 2, "parameters": 1234,
            "fraction_of_floor": None,
        })  # fmt: skip
    run_folder.write_json(folder / "config.json", cfg.to_dict())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with files and with runs: gpn of two seeds, the first with a profile, lif, cnn, and
    a number learned."""
    folder = tmp_path_factory.mktemp("runs")
    for name, samples in (("train", 40), ("test", 20)):
        write_events(folder / f"{name}.h5", make_store(samples, CLASSES, **FILES))
    own = {"train_file": f"{folder}/train.h5", "test_file": f"{folder}/test.h5"}
    write_run(folder / "gpn-run", **own, seed=(0, 1))
    write_run(folder / "lif-run", **own, neuron="lif", lr=0.02)
    write_run(folder / "cnn-run", **own, neuron="cnn")
    write_run(folder / "adding-run", 1, 2, dataset="adding", samples=30, readout="membrane",
              channel_shift=0)  # fmt: skip
    with profiled(1, 2, torch.device("cpu"), folder / "gpn-run" / "seed-0") as made:
        for _ in range(2):
            torch.ones(9, 9) @ torch.ones(9, 9)
            made()
    return folder


def make(runs, *arguments):
    """The page's text, and its figures by their places' names."""
    out = runs / "page.html"
    assert report.main([*map(str, arguments), "--out", str(out)]) == 0
    text = out.read_text()
    figures, decoder = {}, json.JSONDecoder()
    for found in re.finditer(r'Plotly\.newPlot\(\s*"(plot-[\w-]+)",\s*', text):
        data, end = decoder.raw_decode(text, found.end())
        layout, end = decoder.raw_decode(text, text.index("{", end))
        frames = re.compile(r"Plotly\.addFrames\('" + found[1] + r"',\s*").search(text)
        figures[found[1]] = data, layout, decoder.raw_decode(text, frames.end())[0] if frames else 0
    return text, figures


def array(value):
    """An array as plotly writes it."""
    if not isinstance(value, dict):
        return np.array(value)
    import base64

    found = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
    return found.reshape([int(n) for n in value.get("shape", str(len(found))).split(",")])


def test_the_page_holds_what_the_run_and_its_network_say(runs, capsys):
    folder = runs / "gpn-run" / "seed-0"
    text, figures = make(runs, folder, "--file", runs / "test.h5", "--sample", 3)
    (record,) = read_records([str(folder)])
    data, _, _ = figures["plot-curves"]
    for name in ("train_loss", "valid_loss", "seconds"):
        values = [getattr(epoch, name) for epoch in record.epochs]
        drawn = [array(line["y"]) for line in data]
        assert any(len(y) == 2 and np.allclose(y, values) for y in drawn), name
    # the matrix has every sample once, and the share that is said
    counts = array(figures["plot-confusion-0"][0][0]["text"])
    assert counts.shape == (CLASSES, CLASSES) and counts.sum() == 20
    share = 100 * counts.trace() / counts.sum()
    assert f"20 samples, test.h5, {share:.2f} % right" in capsys.readouterr().out
    assert f"{share:.2f} % right" in text
    # a frame a bin, whose gates and membrane are those of the network's own equations
    data, layout, frames = figures["plot-sample-0-3"]
    assert len(frames) == T == len(layout["sliders"][0]["steps"])
    trained = run_folder.load_run(folder)
    model = trained.model.double()
    x = model.inputs[0](run_samples(trained, str(runs / "test.h5")).sample(3).double())
    v = torch.zeros_like(x[0])
    for t, frame in enumerate(frames):
        gates = model.neurons[0].gates_at(x[t], v)
        _, h, v = model.neurons[0].step(x[t], v, gates)
        for name, wanted in {"h": h, **gates._asdict()}.items():
            at = moved_at(data, name)
            drawn = array(frame["data"][frame["traces"].index(at)]["y"])
            order = array(data[at]["customdata"]).astype(int)
            assert np.abs(drawn - wanted[0, order].detach().numpy()).max() < 1e-4
    # nothing is fetched, and what --profile left is there
    marked = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!#)|<link|@import|url\(', marked)
    assert "<script src" not in text and "The whole table" in text and "plot-time-0" in figures


def moved_at(data, name):
    return next(k for k, trace in enumerate(data) if trace.get("name") == name)


def test_several_runs_are_overlaid_and_compared(runs):
    named = [runs / "gpn-run", runs / "lif-run", runs / "cnn-run"]
    text, figures = make(runs, *named, "--no-data")
    data, _, _ = figures["plot-curves"]
    names = list(dict.fromkeys(line["name"] for line in data if line.get("showlegend") is True))
    assert names == ["gpn-run/seed-0", "gpn-run/seed-1", "lif-run", "cnn-run"]
    assert {"plot-curves", "plot-time-0"} == set(figures)
    table = text.split("Options that differ</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<td>--([\w-]+)</td>((?:<td>.*?</td>)+)", table)
    values = {name: re.findall("<td>(.*?)</td>", cells) for name, cells in rows}
    assert values == {
        "seed": ["0", "1", "0", "0"], "neuron": ["gpn", "gpn", "lif", "cnn"],
        "lr": ["0.001", "0.001", "0.02", "0.001"],
    }  # fmt: skip


def test_a_learned_number_is_drawn_against_what_it_is(runs):
    text, figures = make(runs, runs / "adding-run")
    (points,) = figures["plot-confusion-0"][0]
    assert len(array(points["x"])) == len(array(points["y"])) > 0
    assert "near enough" in text and "squared error" in text
    name = next(name for name in figures if name.startswith("plot-sample"))
    assert len(figures[name][2]) == T


def test_names_are_text_and_never_markup(runs, tmp_path):
    folder = tmp_path / "<b>run"
    shutil.copytree(runs / "lif-run", folder)
    header, rest = (folder / "metrics.jsonl").read_text().split("\n", 1)
    names = {"class_names": ["</script><img src=x>", "<i>b</i>"]}
    (folder / "metrics.jsonl").write_text(json.dumps(json.loads(header) | names) + "\n" + rest)
    text, _ = make(runs, folder, "--sample", "0", "--samples", "2")
    assert "<img" not in text.split("</script>", 1)[1] and "<b>run" not in text


def test_a_profile_is_read_by_its_own_times(runs):
    about, rows = spent((runs / "gpn-run" / "seed-0" / "profile.txt").read_text())
    assert "1 training steps on cpu" in about
    assert len(rows) > 1 and all(a.ms >= b.ms > 0 for a, b in zip(rows, rows[1:], strict=False))
    assert spent("nothing of a table") == ("nothing of a table", [])


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere"], "run: nowhere is not a run folder: no config.json"),
    (["lif-run", "begun"], "run: begun: no epoch was finished, there is nothing to show"),
    (["spoilt"], "run: spoilt/metrics.jsonl cannot be read"),
    (["lif-run", "--sample", "99"], r"sample: expected 0..\d+, got 99"),
    (["cnn-run", "--sample", "0"], "run: a cnn sees all bins at once"),
    (["lif-run", "--samples", "0"], "samples: expected at least 1, got 0"),
    (["lif-run", "--no-data", "--file", "test.h5"], "file: has no effect beside --no-data"),
    (["adding-run", "--file", "test.h5"], "file: adding-run learned adding, whose inputs are no"),
    (["moved"], "gone.h5: .* --no-data makes the page without them"),
    (["lif-run", "--out", "nowhere/page.html"], "No such file or directory"),
])  # fmt: skip
def test_a_mistake_is_answered_in_a_line(arguments, message, runs, tmp_path, monkeypatch, capsys):
    for name in ("lif-run", "cnn-run", "adding-run", "spoilt", "moved", "begun"):
        there = runs / (name if name.endswith("-run") else "lif-run")
        shutil.copytree(there, tmp_path / name)
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    (tmp_path / "spoilt" / "metrics.jsonl").write_text("{}\n{}\n")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**config, "train_file": "gone.h5"}))
    shutil.copy(runs / "test.h5", tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert report.main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


def test_a_missing_plotly_is_named_before_the_work(runs, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    assert report.main([str(runs / "lif-run")]) == 2
    assert "plotly is missing (pip install 'gpn-triton[report]')" in capsys.readouterr().err


@pytest.mark.slow
def test_in_a_browser_the_slider_moves_the_gates_and_nothing_is_fetched(runs):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium, and there is none")
    _, figures = make(runs, runs / "gpn-run", runs / "lif-run", runs / "cnn-run")
    data, layout, _ = figures["plot-confusion-0"]
    assert [one["visible"] for one in data] == [True, False, False, False]
    assert len(layout["updatemenus"][0]["buttons"]) == 4
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 1300})
        context.set_offline(True)
        page = context.new_page()
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto((runs / "page.html").as_uri())
        plot = page.locator("[id^=plot-sample]").first
        plot.scroll_into_view_if_needed()

        def drawn():
            """The gates' values, where the cursor stands, and the points' places on the screen."""
            return plot.evaluate(
                "p => [p._fullData.filter(d => d.name == 'f')[0].y.join(), p._fullData[1].x.join(),"
                " [...p.querySelectorAll('.scatterlayer .point')].map("
                "d => d.getAttribute('transform')).join()]"
            )

        def shades():
            return plot.evaluate("p => p.querySelectorAll('.heatmaplayer image').length")

        before = drawn()
        assert shades() == 2
        rail = plot.locator(".slider-rail-touch-rect").bounding_box()
        page.mouse.click(rail["x"] + 0.7 * rail["width"], rail["y"] + rail["height"] / 2)
        page.wait_for_function(
            "([p, x]) => p._fullData[1].x.join() != x", arg=[plot.element_handle(), before[1]]
        )
        page.wait_for_timeout(300)
        after = drawn()
        assert all(a != b for a, b in zip(before, after, strict=True)) and shades() == 2
        browser.close()
    assert failed == [] and asked == [(runs / "page.html").as_uri()]
