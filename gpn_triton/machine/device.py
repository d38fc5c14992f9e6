"""What is asked of the computer: its device, what can run there, and what it can do at best."""

import functools
import importlib.util
import resource
import statistics
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "cpu", "torch")
# processor features of which one multiplies matrices of the half type in hardware
HALF_UNITS = {
    torch.bfloat16: ("avx512bf16", "amx-bf16", "bf16"),
    torch.float16: ("avx512fp16", "amx-fp16", "fullfp16"),
}
# taken over, no record here measures them: a bfloat16 matrix product and a device-to-device copy
STATED = {"H200": (790e12, 4.3e12)}


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is the first CUDA GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:K, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not here: {torch.cuda.device_count()} CUDA GPUs found")
    return device


def choose_backend(backend: str, x: Tensor) -> str:
    """triton, cpu or torch; raises RuntimeError if one was asked for by name and cannot run.

    auto is cpu on a CPU, triton on a GPU whose kernels can run, else torch. An operator that has no
    kernel for a CPU takes cpu for torch.
    """
    if backend == "auto":
        if x.device.type == "cpu":
            return "cpu"
        return "triton" if triton_unavailable(x) is None else "torch"
    if reason := unavailable(backend, x):
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    return backend


def unavailable(backend: str, x: Tensor) -> str | None:
    """Why a backend asked for by name cannot take x, with what would help; None if it can."""
    if backend == "triton":
        return triton_unavailable(x)
    if backend == "cpu" and x.device.type != "cpu":
        return f"x is on {x.device}; move it to the CPU"
    return None


def triton_unavailable(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take x, with what would help; None if they can."""
    if x.dtype == torch.float64:
        return "x is float64 and the kernels compute in float32; use float32 or backend='torch'"
    return _device_unavailable(x.device.type, x.device.index)


def _device_unavailable(kind: str, index: int | None) -> str | None:
    """Why the kernels cannot run on a device."""
    return _ask_device(kind, index)


# torch.compile asks once and keeps the answer: this is the mark that
# torch.compiler.assume_constant_result makes, which would import the compiler here
_device_unavailable._dynamo_marked_constant = True


# asked in every call; the answer cannot change while a process runs
@functools.cache
def _ask_device(kind: str, index: int | None) -> str | None:
    """_device_unavailable, found out."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it exists for Linux: pip install triton)"
    from triton import knobs

    if kind == "cpu" and not knobs.runtime.interpret:
        return (
            "x is on the CPU; move it to a CUDA GPU, or set TRITON_INTERPRET=1 before Python starts"
            " to run the kernels in Triton's interpreter (for tests: it is slow)"
        )
    if kind not in ("cpu", "cuda"):
        return f"x is on device {kind!r}; the kernels run on CUDA GPUs"
    if kind == "cuda" and torch.version.hip:
        return "this is a ROCm build of torch; the kernels are written for NVIDIA GPUs"
    if kind == "cuda" and torch.cuda.get_device_capability(index) < (8, 0):
        capability = torch.cuda.get_device_capability(index)
        return f"the GPU has compute capability {capability}; the kernels need (8, 0) or more"
    return None


def thread_slowdown(rounds: int = 9) -> float:
    """How many times as long a small product takes with torch's threads as with one, by medians.

    Above 1 other work holds the cores and threads wait for each other. Takes some 20 ms where they
    do not; torch's number of threads is afterwards what it was.
    """
    threads, a, seconds = torch.get_num_threads(), torch.ones(192, 192), {}
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            times = timeit.repeat(lambda: torch.mm(a, a).sigmoid_(), number=4, repeat=1 + rounds)
            # the first one starts the threads
            seconds[count] = statistics.median(times[1:])
    finally:
        torch.set_num_threads(threads)
    return seconds[threads] / seconds[1]


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of a half type in hardware."""
    if device.type != "cpu":
        return True
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return any(features.get(name) for name in HALF_UNITS[dtype])


class KernelLimits(TypedDict, total=False):
    """Arguments of tiles.choose: a GPU's multiprocessors, a block's shared memory at most, and 10 x
    major + minor of the compute capability."""

    sm_count: int
    shared_bytes: int
    capability: int


def kernel_limits() -> KernelLimits:
    """What tiles.choose asks about the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "sm_count": properties.multi_processor_count,
        "shared_bytes": properties.shared_memory_per_block_optin,
        "capability": 10 * properties.major + properties.minor,
    }


def l2_bytes(device: torch.device) -> int | None:
    """Size of a GPU's L2 cache; None of a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None


def float32_precision() -> str:
    """How float32 operands are multiplied, by torch.set_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of x now; None: it is off, x is float64, or its device (meta)
    knows no autocast."""
    kind = x.device.type
    # torch.amp.is_autocast_available would ask, but torch 2.11 cannot trace it
    if x.dtype == torch.float64 or kind == "meta":
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


# how a RuntimeError says that memory did not suffice: torch's on a CPU, a launch or a graph of
# CUDA's, Triton's launcher, cuBLAS and cuDNN
WANT_OF_MEMORY = (
    "can't allocate memory", "out of memory", "cudaErrorMemoryAllocation", "STATUS_ALLOC_FAILED",
)  # fmt: skip


@contextmanager
def memory_named() -> Iterator[None]:
    """Make a MemoryError of one line of torch's errors of memory that did not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(str(error).splitlines()[0]) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in WANT_OF_MEMORY)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: matrix products in FLOP/s, copies in bytes/s, and where it is from."""

    flops_per_s: float
    bytes_per_s: float
    source: str


@functools.cache
def ceilings(device: torch.device, n: int | None = None, measured: bool = False) -> Ceilings:
    """What the device can do at best.

    A GPU that is listed has stated figures, taken on such a card with bfloat16; any other device is
    measured, once in a process: the best of several matrix products (bfloat16 on a GPU, else
    float32) and copies. That takes memory for a moment, at most 1.4 GiB on a GPU and 140 MiB else,
    so a program that reports its own peak reads it before. It draws from no global generator.

    Args:
        n: side of the matrices; default: 8192 on a GPU, else 1024.
        measured: whether a listed GPU is measured, too.
    """
    cuda = device.type == "cuda"
    if cuda and not measured:
        name = torch.cuda.get_device_name(device)
        for key, (flops, bandwidth) in STATED.items():
            if key in name:
                return Ceilings(flops, bandwidth, f"stated: measured on an {key}, bfloat16")
    n = n or (8192 if cuda else 1024)
    dtype = torch.bfloat16 if cuda else torch.float32
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=draw).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    # beyond any cache
    source = torch.ones(min(16 * n * n, 1 << 27), device=device)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if cuda else lambda: None
    with torch.no_grad():
        seconds = [
            min(timeit.repeat(lambda call=call: (call(), wait()), wait, repeat=12, number=1))
            for call in (lambda: torch.mm(a, b, out=product), lambda: target.copy_(source))
        ]
    flops, bandwidth = 2 * n**3 / seconds[0], 2 * source.nbytes / seconds[1]
    name, mib = str(dtype).removeprefix("torch."), source.nbytes / 2**20
    source = f"measured: {n}^3 product in {name}, copy of {mib:.0f} MiB"
    return Ceilings(flops, bandwidth, source)
