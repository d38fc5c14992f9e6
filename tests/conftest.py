"""Before any test imports triton: interpret the kernels where there is no GPU to run them."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # read once, at the first import of triton, for the whole process
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # without it torch refuses cuBLAS under use_deterministic_algorithms
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Memory that torch hands out and nobody wrote: NaN, or absurd where a whole number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """One thread unless a test asks for more: these layers are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_process(monkeypatch):
    """Read files without a process of its own, where only their contents are the subject."""
    from gpn_triton.data.sources import hdf5, hdf5_reader

    def run(path, *flags):
        try:
            return hdf5_reader.read_layout(str(path), not flags, "--largest-unit" in flags)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    monkeypatch.setattr(hdf5, "_run_reader", run)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none"))
