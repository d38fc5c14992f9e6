"""What is asked of a GPU, shown without one: a broken capture, want of memory, whose GPU it is."""

import contextlib

import pytest
import torch

from gpn_triton.machine import distributed
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


def node(monkeypatch, gpus, rank, processes):
    """This process as one of those torchrun started on a machine with so many GPUs."""
    for name, value in {"WORLD_SIZE": processes, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_a_node_takes_its_own_gpu_and_one_too_many_is_refused(name, monkeypatch):
    for rank in (0, 1):
        taken = node(monkeypatch, 2, rank, 3)
        assert distributed.own_device(name) == torch.device("cuda", rank)
        assert taken == [torch.device("cuda", rank)]
    taken = node(monkeypatch, 2, 2, 3)
    with pytest.raises(ValueError, match="device: 3 processes on this machine and 2 CUDA GPUs"):
        distributed.own_device(name)
    # torchrun tells all of them, before the first one takes a GPU
    node(monkeypatch, 2, 0, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        distributed.own_device(name)
    assert taken == []


def test_one_gpu_by_number_is_no_device_for_several_processes(monkeypatch):
    node(monkeypatch, 2, 1, 2)
    with pytest.raises(ValueError, match="device: cuda:0 would be the GPU of every process"):
        distributed.own_device("cuda:0")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="expected LOCAL_RANK"):
        distributed.own_device("cuda")
    assert distributed.own_device("cpu") == torch.device("cpu")
    node(monkeypatch, 0, 1, 2)
    assert distributed.own_device("auto") == torch.device("cpu")
    # alone a number is the user's choice
    node(monkeypatch, 2, 0, 1)
    assert distributed.own_device("cuda:1") == torch.device("cuda:1")


def test_a_process_that_fails_tells_the_others_why_and_a_broken_connection_blames_the_other_end(
    monkeypatch,
):
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.01)
    store = torch.distributed.HashStore()
    first, second = (distributed.Watch(store, rank, 2) for rank in (0, 1))
    for watch in (first, second):
        watch.start()
    try:
        assert first.blame(ValueError("x: expected\nmore")) is None
        said = "process 0 of 2 ended: x: expected"
        assert second.blame(RuntimeError("gloo/transport/tcp/pair.cc: Connection closed")) == said
        # its own error is not the other's
        assert second.blame(ValueError("y")) is None
        assert store.get("failed").decode() == said
    finally:
        for watch in (first, second):
            watch.ended.set()
            watch.join()


def test_a_process_that_has_left_is_not_taken_for_lost_and_one_that_stands_still_is(monkeypatch):
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(distributed, "LOST_SECONDS", 0.2)
    store = torch.distributed.HashStore()
    watches = [distributed.Watch(store, rank, 3) for rank in range(3)]
    for watch in watches[:2]:
        watch.start()
    watches[1].leave()
    # the third has never begun
    assert watches[0].found.wait(10)
    watches[0].ended.set()
    assert watches[0].verdict.startswith("process 2 of 3 has shown no sign of life for 0.2 s")
