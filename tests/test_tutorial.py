"""The tutorial's commands and code run, with smaller sizes given beside their own."""

import re
import shlex
from pathlib import Path

import pytest

from gpn_triton import analyze, encode, reproduce, train
from tests.vowels import write_vowels

for extra in ("matplotlib", "soundfile", "soxr"):
    pytest.importorskip(extra)
TEXT = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line for language, block in BLOCKS if not language
    for line in block.splitlines() if line.startswith("python -m")
]  # fmt: skip
MAINS = {
    module.__name__.split(".")[1]: module.main for module in (train, analyze, encode, reproduce)
}
# of options that are given twice the last counts
SMALLER = {
    "train": "--samples 40 --classes 2 --hidden 6 --time-bins 5 --epochs 1 --keep-epochs 0 1",
    "encode": "--channels 20",
    "gradients": "--time-bins 4 --samples 4",
    "parameters": "",
    "heterogeneity": "--samples 24 --hidden 6 --time-bins 5 --epochs 1",
    "cost": "",
    "reproduce": "--samples 40 --classes 2 --hidden 6 --time-bins 5 --epochs 1 --neurons gpn "
    "--seed 0",
}


def run(command):
    """Run a command of the tutorial in this process, in the current folder."""
    for found in re.findall(r"\$\(ls -d (\S+)\)", command):
        folder, pattern = found.rsplit("/", 1)
        (match,) = Path(folder).glob(pattern)
        command = command.replace(f"$(ls -d {found})", str(match))
    if "$RUN" in command:
        (made,) = Path("runs/tutorial").glob("*")
        command = command.replace("$RUN", str(made))
    _, _, module, *arguments = shlex.split(command)
    name = module.removeprefix("gpn_triton.")
    kind = arguments[0] if name == "analyze" else name
    assert MAINS[name]([*arguments, *shlex.split(SMALLER[kind])]) == 0, command


def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [command for command in COMMANDS if "reproduce" not in command]
    assert len(quick) == 8
    write_vowels(Path("vowels"), speakers=1, each=1, seconds=0.1)
    for command in quick:
        run(command)
    pictures = {str(path) for path in Path("runs").glob("*/*.png")}
    assert Path("runs/ear.png").exists() and pictures == {
        f"runs/{name}.png" for name in (
            "gradients/gradients", "fresh/gradients", "parameters/parameters", "parameters/traces",
            "heterogeneity/heterogeneity", "cost/cost")
    }  # fmt: skip


@pytest.mark.slow
def test_the_grid_s_command_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in COMMANDS if "reproduce" in command]
    run(command)
    assert Path("runs/grid/table.md").exists()


def test_the_code_runs(capsys):
    (code,) = [block for language, block in BLOCKS if language == "python"]
    exec(code, {})
    assert len(capsys.readouterr().out.split(",")) == 30
