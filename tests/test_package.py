"""What an installation brings: the command, its files, its types, and how soon it is imported."""

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import gpn_triton
from gpn_triton import __main__ as dispatcher

ROOT = Path(__file__).parent.parent
COMMANDS = dispatcher.find_commands()


def test_every_command_is_found_and_told_in_a_sentence(capsys):
    known = "train predict export encode reproduce search analyze report"
    assert {*known.split()} <= {*COMMANDS}
    assert dispatcher.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", said, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_tells_the_version(name, capsys):
    for flag, found in (("--version", f"gpn-triton {gpn_triton.__version__}\n"), ("--help", name)):
        with pytest.raises(SystemExit) as ended:
            dispatcher.main([name, flag])
        assert ended.value.code == 0
        assert found in capsys.readouterr().out


def test_the_one_command_hands_on_arguments_and_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dispatcher.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpn-triton {gpn_triton.__version__}\n"
    assert dispatcher.main(["export", "nowhere"]) == 2
    assert "run: nowhere is not a run folder" in capsys.readouterr().err
    for arguments, got in (
        ([], "got none"),
        (["trian"], "got 'trian'"),
        (["machine"], "'machine'"),
    ):
        assert dispatcher.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "expected one of analyze, " in said and got in said


@pytest.mark.slow
def test_the_package_is_imported_in_a_moment_beside_torch():
    # the processor's time, which other work on the machine does not change much
    code = (
        "import time, torch; t = time.process_time(); import gpn_triton; "
        "print(time.process_time() - t)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert float(ran.stdout) < 0.3


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source release, and the wheel that is made of it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(files, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        to = source / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            to.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            to.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", out, source]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    (wheel,), (release,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, release


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(built):
    wheel, release = built
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "gpn_triton").rglob("*.py")}
    wanted |= {f"gpn_triton/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    wanted |= {"gpn_triton/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        about = email.message_from_bytes(archive.read(about))
    assert names == wanted
    assert about["Version"] == gpn_triton.__version__ and about["License-Expression"] == "MIT"
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert about["Keywords"] and "arxiv.org/abs/2412.01087" in about["Project-URL"]
    with tarfile.open(release) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CITATION.cff", "constraints.txt", "docs/index.md"} <= held
    assert names <= held and not any(name.startswith("tests/") for name in held)


@pytest.mark.slow
def test_the_wheel_works_where_nothing_of_the_clone_is(built, tmp_path):
    # the dependencies are this environment's, which an installation of its own would take minutes
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", built[0]]
    subprocess.run(install, check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["OMP_NUM_THREADS"] = "1"

    def run(*command):
        options = dict(cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        ran = subprocess.run([tmp_path / "env" / "bin" / command[0], *command[1:]], **options)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout

    where = run("python", "-c", "import gpn_triton; print(gpn_triton.__file__)").strip()
    assert where.startswith(str(site))
    assert run("gpn-triton", "--version") == f"gpn-triton {gpn_triton.__version__}\n"
    said = run("gpn-triton", "train", "--samples", "200", "--epochs", "1", "--hidden", "16")
    assert "test accuracy" in said
    (made,) = (tmp_path / "runs").iterdir()
    assert json.loads((made / "result.json").read_text())["epochs"] == 1
    run("gpn-triton", "export", made)
    assert (made / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_public_surface_s_types_are_clean(tmp_path):
    pytest.importorskip("basedpyright")
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]

    def errors(*arguments):
        ran = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        found = json.loads(ran.stdout)
        assert found["summary"]["filesAnalyzed"] > 0
        return [d["message"] for d in found["generalDiagnostics"] if d["severity"] == "error"]

    assert errors() == []
    # a user's mistake is seen
    (tmp_path / "mine.py").write_text("from gpn_triton import GPN\n\nGPN(8, '128')\n")
    settings = {"typeCheckingMode": "basic", "include": ["."], "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    (mistake,) = errors("--project", str(tmp_path))
    assert "hidden_size" in mistake
