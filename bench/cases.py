"""Named shapes of the benchmarks: full for a GPU, scaled down under the same names for a CPU.

A name says what the full shape is; a record carries the shape that ran and, in `scaled`, whether it
is a smaller one. Names ending in a dtype run in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SIZES = ("full", "small", "tiny")
KINDS = ("recurrence", "layer", "train_step", "epoch", "binning", "long_sequence", "tuning")


@dataclass(frozen=True)
class Case:
    """A shape to run.

    Args:
        name: unique in its kind. kind: one of KINDS.
        T: time bins. B: batch. hidden: neurons of each layer. inputs: channels C; of a recurrence,
            which has no input Linear, N. classes: of the readout, 0 without one.
        dtype: float32, bfloat16 or float16, of inputs and products.
        full: the (T, B, hidden) that the name stands for. compiled: whether torch.compile, at
            10 s and more a shape, takes part.
    """

    name: str
    kind: str
    T: int
    B: int
    hidden: tuple[int, ...]
    inputs: int
    classes: int = 0
    dtype: str = "float32"
    full: tuple[int, int, tuple[int, ...]] = (0, 0, ())
    compiled: bool = False

    @property
    def N(self) -> int:
        """Neurons of the first layer."""
        return self.hidden[0]

    @property
    def scaled(self) -> bool:
        """Whether this is smaller than what the name stands for."""
        return (self.T, self.B, self.hidden) != self.full

    def __str__(self) -> str:
        return self.name


def _case(kind: str, name: str, full: tuple, small: tuple | None, **options) -> tuple:
    """The case at full size and scaled down, or None: for a GPU alone; sizes are (T, B, hidden)."""

    def make(T, B, hidden):
        inputs = options.get("inputs") or hidden[0]
        return Case(name, kind, T, B, hidden, **{**options, "inputs": inputs}, full=full)

    if small is None:
        return make(*full), None
    # a CPU's compiler takes longer: there only where the shape is the headline's
    little = make(*small)
    return make(*full), replace(little, compiled=little.compiled and not little.scaled)


SHD = {"inputs": 700, "classes": 20}
SSC = {"inputs": 700, "classes": 35}
_SSC_HIDDEN = (512, 256, 128)

_TABLE = [
    # against N, at the paper's batch
    *(
        _case("recurrence", f"N{N}", (100, 256, (N,)), (10, 16, (N,)), compiled=N == 128)
        for N in (128, 512, 256, 64, 1024)
    ),
    # against T and against B, at N = 128 (64 on a CPU)
    *(
        _case("recurrence", f"T{T}", (T, 256, (128,)), (t, 16, (64,)))
        for T, t in ((20, 10), (250, 50), (1000, 200), (1600, 1600))
    ),
    *(
        _case("recurrence", f"B{B}", (100, B, (128,)), (20, b, (64,)))
        for B, b in ((32, 8), (1024, 64), (2048, 128), (8192, 256))
    ),
    *(
        _case("recurrence", f"N{N}-B{B}", (100, B, (N,)), (10, 256, (N,)) if N > 256 < B else None)
        for B, widths in ((32, (512, 256, 64)), (2048, (1024, 512, 256, 64)))
        for N in widths
    ),
    *(
        _case("tuning", f"N{N}-B{B}", (100, B, (N,)), None)
        for N, B in ((128, 256), (512, 256), (256, 256), (64, 256), (128, 2048), (512, 2048))
    ),
    # the headline: the first layer of the SHD network, never scaled
    _case("layer", "shd", (100, 256, (128,)), (100, 256, (128,)), inputs=700, compiled=True),
    _case("layer", "ssc", (50, 256, (512,)), (10, 32, (512,)), inputs=700),
    _case("layer", "wide", (20, 128, (1024,)), (5, 16, (512,)), inputs=700),
    _case("layer", "wide-deep", (60, 1024, (1024,)), (4, 32, (512,)), inputs=1024),
    _case("layer", "ssc-B2048", (100, 2048, (512,)), (10, 64, (512,)), inputs=700),
    _case("train_step", "shd-T20", (20, 32, (128,)), (20, 32, (128,)), **SHD),
    _case("train_step", "shd-T100", (100, 256, (128,)), (50, 64, (128,)), **SHD),
    _case("train_step", "ssc-T50", (50, 256, _SSC_HIDDEN), (10, 32, _SSC_HIDDEN), **SSC),
    _case("train_step", "ssc-T100-B2048", (100, 2048, _SSC_HIDDEN), (10, 64, _SSC_HIDDEN), **SSC),
    _case("train_step", "shd-wide", (20, 128, (1024,)), (5, 16, (512,)), **SHD),
    _case("train_step", "ssc-wide", (60, 1024, (1024,) * 3), (4, 16, (256,) * 3), **SSC),
    _case("epoch", "shd", (100, 256, (128,)), (20, 64, (128,)), **SHD),
    _case("epoch", "ssc", (50, 256, _SSC_HIDDEN), (5, 64, (128, 64)), **SSC),
    *(
        _case("epoch", f"ssc-T{T}-B{B}", (T, B, _SSC_HIDDEN), None, **SSC)
        for T, B in ((100, 2048), (100, 256), (50, 2048))
    ),
    _case("binning", "shd", (100, 256, ()), (100, 64, ()), **SHD),
    _case("binning", "fine", (1000, 256, ()), (1000, 16, ()), **SHD),
    *(
        _case("long_sequence", f"T{T}", (T, 256, (128,)), (T, 4, (64,)))
        for T in (100, 300, 1000, 3000, 10_000)
    ),
]
# compared in the three dtypes on a GPU; a CPU computes half types by converting, so not there
_HALF = [
    replace(full, name=f"{full.name}-{dtype}", dtype=dtype)
    for full, _ in _TABLE
    for dtype in ("bfloat16", "float16")
    if full.kind != "binning" and (dtype == "bfloat16" or full.name in ("N128", "N512"))
]
_TINY = {
    "recurrence": ("tiny", 5, 3, (8,), 8),
    "layer": ("tiny", 5, 3, (8,), 12),
    "train_step": ("tiny", 4, 6, (8,), 700),
    "epoch": ("tiny", 4, 6, (8,), 700),
    "binning": ("tiny", 6, 4, (), 700),
    "long_sequence": ("tiny", 12, 2, (8,), 8),
    "tuning": ("tiny", 3, 3, (16,), 16),
}


def cases(kind: str, size: str) -> list[Case]:
    """The cases of one kind.

    Args:
        kind: one of KINDS. size: full (a GPU's), small (a CPU's: minutes) or tiny (a test's).
    Raises:
        ValueError: an unknown kind or size.
    """
    if kind not in KINDS or size not in SIZES:
        raise ValueError(f"expected one of {KINDS} and one of {SIZES}, got {kind!r}, {size!r}")
    if size == "tiny":
        name, T, B, hidden, inputs = _TINY[kind]
        classes = 20 if kind in ("train_step", "epoch", "binning") else 0
        return [Case(name, kind, T, B, hidden, inputs, classes, full=(T, B, hidden))]
    if size == "small":
        return [small for _, small in _TABLE if small and small.kind == kind]
    # tiles are compared in the dtype that matters
    found = [full for full, _ in _TABLE] if kind != "tuning" else []
    return [case for case in found + _HALF if case.kind == kind]
