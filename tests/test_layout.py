"""The walls of the project: who may import whom, and what the package ships."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# module -> what of the project it may import
ARROWS = {
    "gpn_triton.surrogate": set(),
    "gpn_triton.reference": {"gpn_triton.surrogate"},
    "gpn_triton.ops": {
        "gpn_triton.reference",
        "gpn_triton.surrogate",
        "gpn_triton.kernels.offline",
        "gpn_triton.kernels.tiles",
        "gpn_triton.kernels.recurrence_forward",
        "gpn_triton.kernels.recurrence_backward",
    },
    "gpn_triton.spike_linear": {
        "gpn_triton.ops",
        "gpn_triton.reference",
        "gpn_triton.kernels.spikes",
    },
    "gpn_triton.layers": {"gpn_triton.ops", "gpn_triton.reference"},
    "gpn_triton.event_linear": set(),
    "gpn_triton.model": {
        "gpn_triton.event_linear",
        "gpn_triton.layers",
        "gpn_triton.reference",
        "gpn_triton.spike_linear",
    },
    "gpn_triton.files": set(),
    "gpn_triton.checkpoint": {"gpn_triton.files"},
    "gpn_triton.curves": {"gpn_triton.files"},
    "gpn_triton.distributed": set(),
    "gpn_triton.data.events": set(),
    "gpn_triton.data.hdf5_reader": set(),
    "gpn_triton.data.hdf5": {
        "gpn_triton.data.events",
        "gpn_triton.data.hdf5_reader",
        "gpn_triton.files",
    },
    "gpn_triton.data.download": {"gpn_triton.data.hdf5", "gpn_triton.files"},
    "gpn_triton.data.feed": {"gpn_triton.data.binning", "gpn_triton.data.events"},
    "gpn_triton.data.synthetic": {"gpn_triton.data.events"},
    "gpn_triton.trackers": set(),
    "gpn_triton.graphs": set(),
    "gpn_triton.schedule": {"gpn_triton.config"},
    "gpn_triton.device": set(),
    "gpn_triton.cost": {"gpn_triton.device", "gpn_triton.reference"},
    "gpn_triton.profile": {"gpn_triton.files"},
    "gpn_triton.provenance": set(),
    "gpn_triton.config": {"gpn_triton.model", "gpn_triton.ops", "gpn_triton.surrogate"},
}
NOBODY_IMPORTS = {"gpn_triton.train"}


def modules():
    """Every module of the package and of kernels/, by dotted name."""
    for path in [*ROOT.glob("gpn_triton/*.py"), *ROOT.glob("gpn_triton/data/*.py")]:
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for path in ROOT.glob("kernels/*.py"):
        yield f"gpn_triton.kernels.{path.stem}", path


def imports(path):
    """Absolute names a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (ROOT / Path(*name.split("."))).with_suffix(".py").exists()
                yield name if is_module else node.module


def test_imports_follow_the_arrows():
    for name, path in modules():
        own = {i for i in imports(path) if i.startswith("gpn_triton.")}
        assert not own & NOBODY_IMPORTS, f"{name} imports the trainer"
        if name in ARROWS:
            assert own <= ARROWS[name], f"{name} imports {sorted(own - ARROWS[name])}"


def test_kernels_import_only_torch_and_triton():
    for name, path in modules():
        if name.startswith("gpn_triton.kernels"):
            for i in imports(path):
                root = i.split(".")[0]
                fits = root in {"torch", "triton", *sys.stdlib_module_names} or i.startswith(
                    "gpn_triton.kernels."
                )
                assert fits, f"{name} imports {i}"


def test_kernels_is_a_link_to_a_folder_that_is_no_package():
    link = ROOT / "gpn_triton" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["gpn_triton.reference", "gpn_triton", "gpn_triton.data"])
def test_importing_brings_in_neither_triton_nor_matplotlib(module):
    code = (
        f"import sys, {module}; "
        "bad = {m for m in ('triton', 'matplotlib') if m in sys.modules}; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_block_pointers_in_kernels():
    # newer Triton refuses them
    for name, path in modules():
        assert "make_block_ptr" not in path.read_text(), name
