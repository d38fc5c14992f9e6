"""What the pages show runs: their Python, their commands, and the site that is made of them."""

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

from gpn_triton import __version__
from gpn_triton.__main__ import find_commands, main
from gpn_triton.data.sources.hdf5 import write_events
from tests.stores import make_store

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# blocks of other languages are output, or for another program
RUN, SHOWN = ("", "python"), ("text", "bibtex")
# a line that calls the program, and what else a shell line may be
COMMAND = re.compile(r"(?:gpn-triton |python -m gpn_triton\.|torchrun .*?-m gpn_triton\.)(\w+)(.*)")
OTHERS = ("make", "source", "pip", "python tests/", "python -m bench", "RUN=$(")
# these pages' commands run one after the other; the tutorial has a test of its own
RUNNING = [f"docs/{name}.md" for name in (
    "index", "data", "runs", "long-sequences", "choosing-t", "audio")]  # fmt: skip


def blocks(page, language):
    return [text for _, own, text in FENCE.findall(PAGES[page]) if own == language]


def shell_lines(page):
    """The lines of a page's shell blocks, each whole and without its comment."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words) if "$(" not in line else line


def commands(page):
    """Of the lines that call the program, its command and the arguments."""
    for line in shell_lines(page):
        if found := COMMAND.match(line):
            yield found[1], shlex.split(re.sub(r"\$\(.*?\)", "RUN", found[2]))


def test_every_block_is_run_or_marked_as_output():
    assert len(PAGES) > 12
    for page, text in PAGES.items():
        found = FENCE.findall(text)
        assert text.count("```") == 2 * len(found), page
        assert {language for _, language, _ in found} <= {*RUN, *SHOWN}, page
        for line in shell_lines(page):
            assert COMMAND.match(line) or line.startswith(OTHERS), (page, line)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_has_the_options_it_is_given(page):
    for name, arguments in commands(page):
        path = find_commands()[name]
        module = f"gpn_triton.{name}" if path.stem == name else f"gpn_triton.{name}.{path.stem}"
        module = import_module(module)
        elsewhere = {"--init-from", "--resume", "--eval-only", "--config"}
        if name == "train" and not elsewhere & set(arguments):
            # what options say together is checked, too
            module.parser.parse([word for word in arguments if word != "vowels/train"])
        else:
            parser = module.parser if name == "train" else module
            parser.build_parser().parse_args(arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        if "sys.argv" not in block:
            exec(compile(block, page, "exec"), {})


def test_versions_agree():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited[1] == __version__


def run_of(page):
    """Run a page's commands in the current folder, at small sizes; how many ran."""
    ran = 0
    for seed, name in enumerate(("my_train.h5", "my_test.h5", "FILE.h5")):
        write_events(name, make_store(60, end=1.0, empty=False, seed=seed))
    for line in shell_lines(page):
        if line.startswith("python tests/"):
            vowels = [sys.executable, ROOT / line.split()[1], *line.split()[2:]]
            subprocess.run(vowels, check=True)
            for path in Path("vowels").rglob("*_[2-9].wav"):
                path.unlink()
    for name, arguments in commands(page):
        runs = sorted(Path("runs").glob("*"), key=lambda path: path.stat().st_mtime)
        arguments = [
            str(runs[-1]) if word == "RUN" else str(runs[0]) if word == "OTHER_RUN" else word
            for word in arguments
        ]
        # what needs the network, a training that was stopped, or a recording that is not there
        if {"--download", "--preset", "--resume", "FILE.wav", "events.csv"} & set(arguments):
            continue
        if {"shd", "mnist"} & set(arguments):
            continue
        if name == "train" and "--eval-only" not in arguments:
            arguments += ["--epochs", "1"]
            if "--init-from" not in arguments:
                arguments += ["--hidden", "6", "--time-bins", "8", "--batch-size", "16"]
            if not {"--train-file", "--config", "vowels/train"} & set(arguments):
                arguments += ["--samples", "40"]
        if name == "search":
            pytest.importorskip("optuna")
            arguments += ["--epochs", "1", "--time-bins", "8", "--trials", "2"]
        if name == "analyze":
            pytest.importorskip("matplotlib")
        assert main([name, *arguments]) == 0, (page, name, arguments)
        ran += 1
    return ran


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING)
def test_the_commands_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    for module in ("plotly", "soundfile", "soxr"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    assert run_of(page) >= 3


@pytest.mark.slow
def test_the_jacobian_s_script_draws_a_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    from gpn_triton import train

    small = ["--samples", "40", "--hidden", "6", "--time-bins", "8", "--epochs", "1"]
    assert train.main(small) == 0
    (script,) = [
        text for text in blocks("docs/results/long-sequences.md", "python") if "sys.argv" in text
    ]
    Path("script.py").write_text(script)
    (run,) = Path("runs").iterdir()
    env = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "PATH": ""}
    subprocess.run([sys.executable, "script.py", run, "out.png"], check=True, env=env)
    assert Path("out.png").stat().st_size > 1000


class Fetched(HTMLParser):
    """What a page has a browser fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(given.get("src"))
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given.get("href"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    pages = list(tmp_path.rglob("*.html"))
    assert {"index.html", "data.html", "api.html"} <= {path.name for path in pages}
    for path in pages:
        parser = Fetched()
        parser.feed(path.read_text())
        outside = [url for url in parser.found if url and "//" in url]
        assert outside == [], (path.name, outside)
    for path in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", path.read_text()), path.name
    # links to the program's own files lead to pages of them
    assert (tmp_path / "source" / "gpn_triton" / "neurons" / "reference.py.html").exists()
