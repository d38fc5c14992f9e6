"""The rooms of the house: which module lies in which, who may import whom, what a package ships."""

import ast
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a room: its modules, and the rooms below it that it imports; `commands` is the package's folder
ROOMS = {
    "kernels": (
        "binning binning_cpu cpu cuba_lif events_cpu gpn_backward gpn_cpu gpn_forward "
        "inner_ear inner_ear_cpu lif lif_cpu linear_cpu offline operands pointwise "
        "pointwise_cpu spikes tiles tiles_measured",
        "",
    ),
    "machine": ("command device distributed figure files graphs interrupt profile provenance", ""),
    "neurons": (
        "checks cost derivatives event_linear explain gpn gpn_options jacobian layers lif networks "
        "pretrained recurrence_torch reference row_linear sequences spike_linear states surrogate "
        "time_steps",
        "machine kernels",
    ),
    "data": (
        "augmentation binning datasets dense events feed hold_out inspection loader "
        "sources.download sources.hdf5 sources.hdf5_reader sources.images sources.long_tasks "
        "sources.synthetic sources.tables",
        "neurons machine kernels",
    ),
    "training": (
        "build curves engine experiment objective options parser presets progress run run_folder "
        "schedule trackers",
        "data neurons machine",
    ),
    "audio": ("ear encoding picture recordings reference", "data machine kernels"),
    "analysis": (
        "answers distributions energy gradients grid heterogeneity page pictures plots record "
        "replay report sample_plot search space subject table tasks trials",
        "training data neurons machine",
    ),
    "commands": (
        "__main__ analyze data.__main__ encode export predict report reproduce search train",
        "analysis training audio data neurons machine",
    ),
}
# whoever else imports a kernel
KERNEL_IMPORTERS = {
    "neurons.derivatives", "neurons.explain", "neurons.gpn", "neurons.lif",
    "neurons.recurrence_torch", "neurons.event_linear", "neurons.row_linear",
    "neurons.spike_linear", "data.binning",
    "audio.ear",
}  # fmt: skip
# what the package's face shows comes from here
FACE = {
    "data.events", "data.loader", "data.sources.hdf5", "machine.interrupt", "machine.provenance",
    "neurons.explain", "neurons.gpn", "neurons.layers", "neurons.networks",
}  # fmt: skip
KERNELS_MAY_IMPORT = {"torch", "triton", "numba", "llvmlite", "numpy", *sys.stdlib_module_names}


def modules(root):
    """Every module by its name below the package, with its file; a room's __init__ is `room`."""
    for path in sorted(root.glob("kernels/*.py")):
        yield f"kernels.{path.stem}", path
    for path in sorted((root / "gpn_triton").rglob("*.py")):
        parts = path.relative_to(root / "gpn_triton").with_suffix("").parts
        if parts[0] != "kernels":
            yield ".".join(parts if parts[-1] != "__init__" else parts[:-1]), path


def imported(path, known):
    """What of the project a file imports anywhere in it, and the other packages it imports."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package != "gpn_triton":
                others.add(package)
            else:
                # a name out of a module, or the module itself
                own.add(rest if rest in known else rest.rpartition(".")[0])
    return own, others


def room_of(module):
    """The room a module lies in; a room's __main__ is a command."""
    first, _, rest = module.partition(".")
    return first if first in ROOMS and rest != "__main__" else "commands"


def faults(root, rooms=ROOMS, kernel_importers=KERNEL_IMPORTERS):
    """What in a tree does not stand in the tables, one line each."""
    found = dict(modules(root))
    listed = {
        name if room == "commands" else f"{room}.{name}"
        for room, (names, _) in rooms.items()
        for name in names.split()
    }
    faces = {"", *rooms, "data.sources"}
    yield from (f"{name} is listed in no room" for name in sorted(found.keys() - listed - faces))
    yield from (f"{name} is listed and not there" for name in sorted(listed - found.keys()))
    used, to_kernels, graph = set(), set(), {}
    for name, path in found.items():
        own, others = imported(path, found)
        if name in faces:
            if own - (FACE if name == "" else set()):
                yield f"the face {name or 'gpn_triton'} imports {sorted(own)}"
            continue
        room, graph[name] = room_of(name), own
        for other in own:
            if other in rooms["commands"][0].split() or other == "":
                yield f"{name} imports the command or face {other or 'gpn_triton'}"
                continue
            target = room_of(other)
            if target == "kernels" and room != "kernels":
                to_kernels.add(name)
            if target != room:
                used.add((room, target))
                if target not in rooms[room][1].split():
                    yield f"{name} imports {other}: there is no arrow from {room} to {target}"
        if room == "kernels":
            yield from (f"{name} imports {other}" for other in sorted(others - KERNELS_MAY_IMPORT))
    for room, (_, below) in rooms.items():
        for target in below.split():
            if (room, target) not in used:
                yield f"nobody uses the arrow from {room} to {target}"
    for name in sorted(to_kernels ^ kernel_importers):
        yield f"{name} imports kernels or is listed to: one without the other"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"a circle of imports: {' -> '.join(error.args[1])}"


def test_every_module_is_in_its_room_and_imports_go_down():
    assert list(faults(ROOT)) == []
    # a permission that nobody uses is found
    unused = {**ROOMS, "machine": (ROOMS["machine"][0], "kernels")}
    assert "nobody uses the arrow from machine to kernels" in list(faults(ROOT, unused))
    # newer Triton refuses block pointers
    assert not [name for name, path in modules(ROOT) if "make_block_ptr" in path.read_text()]
    # kernels is a link to a folder that is no package
    link = ROOT / "gpn_triton" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture
def copy(tmp_path):
    """A copy of the program that a test may spoil."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("gpn_triton", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    return tmp_path


@pytest.mark.parametrize(("file", "line", "fault"), [
    ("gpn_triton/machine/files.py", "from gpn_triton.data.events import EventStore",
     "machine.files imports data.events: there is no arrow from machine to data"),
    ("gpn_triton/training/run.py", "import gpn_triton.train",
     "training.run imports the command"),
    ("gpn_triton/neurons/news.py", "", "neurons.news is listed in no room"),
    ("kernels/tiles.py", "import h5py", "kernels.tiles imports h5py"),
    ("gpn_triton/training/run.py", "from gpn_triton.kernels import tiles",
     "training.run imports kernels or is listed to"),
    ("gpn_triton/neurons/surrogate.py", "from gpn_triton.neurons.gpn import gpn",
     "a circle of imports"),
])  # fmt: skip
def test_a_planted_fault_is_found(copy, file, line, fault):
    path = copy / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    assert any(found.startswith(fault) for found in faults(copy))


def test_importing_the_package_and_its_data_brings_in_neither_triton_nor_matplotlib():
    code = (
        "import sys, gpn_triton, gpn_triton.data.datasets; "
        "bad = {m for m in ('triton', 'matplotlib') if m in sys.modules}; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
