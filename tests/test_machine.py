"""What is asked of a GPU, shown without one: errors of a capture, want of memory, whose GPU it is."""

import contextlib

import pytest
import torch

from gpn_triton.machine.device import is_out_of_memory
from gpn_triton.machine.graphs import WARM_RUNS, Graphs


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
])  # fmt: skip
def test_want_of_memory_is_known_by_whatever_says_it(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError(str(error)))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


class FailingEnd:
    """torch.cuda.graph as it ends after an error in it: with an error of its own, streams apart."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        STREAMS.append("capture")

    def __exit__(self, *_):
        raise RuntimeError("operation failed due to a previous error during capture")


STREAMS = []


@contextlib.contextmanager
def stream(name):
    before = list(STREAMS)
    STREAMS.append(name)
    try:
        yield
    finally:
        STREAMS[:] = before


class AbsentStream:
    def wait_stream(self, other):
        pass


@pytest.mark.parametrize(("error", "kind", "message"), [
    (RuntimeError("copy from pageable memory"), RuntimeError,
     "cannot become a CUDA graph: copy from pageable memory; --no-graph"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError, "^CUDA error: CUBLAS"),
    (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "^CUDA out of memory"),
    (ValueError("x: expected"), ValueError, "^x: expected"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
])  # fmt: skip
def test_a_failed_capture_names_its_first_error_and_gives_the_stream_back(
    error, kind, message, monkeypatch
):
    for name, value in {
        "CUDAGraph": lambda: None, "graph": FailingEnd, "stream": stream,
        "Stream": lambda _: AbsentStream(), "current_stream": lambda _: AbsentStream(),
        "graph_pool_handle": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    graphs, runs = Graphs(torch.device("cuda"), True), iter(range(WARM_RUNS + 1))

    def work():
        if next(runs) == WARM_RUNS:
            raise error

    for _ in range(WARM_RUNS):
        graphs.run("key", work)
    with pytest.raises(kind, match=message):
        graphs.run("key", work)
    assert STREAMS == []
