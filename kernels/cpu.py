"""How kernels for a CPU are written, compiled by Numba and run: panels, products, threads.

A product's weights are packed in panels: PANEL neurons side by side for every depth. product holds
four rows by one panel in registers and adds up over the depth in order, so that a row's sum is the
same bits whatever the other rows are. It is written in LLVM's vectors because no loop is sure to
become this one. Everything elementwise is left to LLVM's vectoriser, which needs to know that
arrays do not overlap (inner) and indices that start at zero (row).

Threads are Python's: a kernel holds no GIL, and its threads take tiles from one counter until none
is left, so that a thread that comes late, or whose core has other work, holds up nobody. Numba's
own layers are each unsafe somewhere: workqueue ends the process when two threads call it at once
(as autograd may), GNU's OpenMP ends a forked child, TBB has to be installed; and what they cost in
compile time is spent on every kernel. torch.get_num_threads() is read at every call; one thread
uses none of this.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.compiler import Compiler
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

# a product holds ROWS rows by two vectors of LANES neurons in registers: 8 sums side by side hide
# the latency of two multiply-adds a cycle, and 16 registers hold them and their operands. On one
# Zen core, float32, of 39 GFLOP/s: 4 rows 38, 6 rows 38, 3 rows by 4 vectors 22 (they spill), torch
# 32 for 512 rows and 20 to 28 for 12 to 24. 16 lanes are unmeasured
ROWS = 4
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
PANEL = 2 * LANES
# terms of a weight gradient's sums that stay in the first cache; 128 and 256 are alike
DEPTH = 128
# no nnan, no ninf: NaN stays visible. No reassoc: exp relies on the order of a sum
OPTIONS = dict(fastmath={"contract", "nsz"}, error_model="numpy")
# one rounding an operation: no multiplication is contracted with its addition
EXACT = dict(error_model="numpy")


class _Disjoint(Compiler):
    """Compiles a function whose array arguments do not overlap where it writes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.state.flags.noalias = True


_WITHIN = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True)
inner = numba.njit(pipeline_class=_Disjoint, **_WITHIN, **OPTIONS)
exact_inner = numba.njit(**_WITHIN, **EXACT)


def kernel(*files: str, options: dict = OPTIONS):
    """Compile for calls from Python, cached on disk where a folder can be written.

    files: what else the kernel is made of. Numba looks at its own file alone before it takes a
    compiled kernel from the cache. options: OPTIONS or EXACT.
    """

    def decorate(function):
        try:
            compiled = numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:
            # neither __pycache__, nor the user's cache, nor NUMBA_CACHE_DIR can be written
            return numba.njit(nogil=True, **options)(function)
        stats = [os.stat(f) for f in (function.__code__.co_filename, __file__, *files)]
        stamp = [(s.st_mtime, s.st_size) for s in stats]
        compiled._cache._cache_file._source_stamp = stamp
        return compiled

    return decorate


@intrinsic
def take(typing, counter):
    """The counter's value before adding one to it, atomically."""

    def code(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), code


@intrinsic
def product(typing, z, z_at, z_row, a, a_0, a_1, a_2, a_3, w, w_at, depth):
    """Add sum_k a[a_r + k] w[w_at + k PANEL + n] to z[z_at + r z_row + n], r < 4."""

    def code(context, builder, signature, arguments):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        scalar = context.get_value_type(z.dtype)
        vector = ir.VectorType(scalar, LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        align = z.dtype.bitwidth // 8

        def pointer(k, offset):
            array = context.make_array(signature.args[k])(context, builder, arguments[k])
            return builder.gep(array.data, [offset])

        def lanes(base, offset):
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        _, z_at, z_row, _, *a_at, _, w_at, depth = arguments
        rows = [pointer(3, at) for at in a_at]
        panel = pointer(8, w_at)
        sums = [
            lanes(pointer(0, builder.add(z_at, builder.mul(z_row, i64(r)))), i64(LANES * c))
            for r in range(ROWS)
            for c in range(2)
        ]
        first = [builder.load(p, align=align) for p in sums]
        name = f"llvm.fmuladd.v{LANES}f{8 * align}"
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), name
        )
        entry = builder.block
        body, done = (builder.append_basic_block(n) for n in ("product", "product_done"))
        builder.branch(body)
        builder.position_at_end(body)
        k = builder.phi(i64)
        k.add_incoming(i64(0), entry)
        running = [builder.phi(vector) for _ in sums]
        at = builder.mul(k, i64(PANEL))
        weights = [
            builder.load(lanes(panel, builder.add(at, i64(LANES * c))), align=align)
            for c in range(2)
        ]
        for r in range(ROWS):
            value = builder.load(builder.gep(rows[r], [k]))
            value = builder.insert_element(undefined, value, i32(0))
            zeros = ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)
            value = builder.shuffle_vector(value, undefined, zeros)
            for c in range(2):
                phi = running[2 * r + c]
                phi.add_incoming(first[2 * r + c], entry)
                phi.add_incoming(builder.call(multiply_add, [value, weights[c], phi]), body)
        following = builder.add(k, i64(1))
        k.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, depth), body, done)
        builder.position_at_end(done)
        for p, phi in zip(sums, running, strict=True):
            builder.store(phi.incomings[1][0], p, align=align)
        return context.get_dummy_value()

    i = types.int64
    return types.void(z, i, i, a, i, i, i, i, w, i, i), code


@intrinsic
def row(typing, a, at):
    """The array from element `at` on: no copy, no count of references, no bounds."""

    def code(context, builder, signature, arguments):
        array = context.make_array(a)(context, builder, arguments[0])
        row = context.make_array(a)(context, builder)
        size = ir.Constant(ir.IntType(64), a.dtype.bitwidth // 8)
        context.populate_array(
            row, data=builder.gep(array.data, [arguments[1]]), shape=array.shape,
            strides=array.strides, itemsize=size, meminfo=None,
        )  # fmt: skip
        return row._getvalue()

    return a(a, types.int64), code


@inner
def multiply(z, z_row, z_step, a, a_row, a_step, steps, rows, w, first, last, depth):
    """Add panels first..last - 1 of weight a to z, for `rows` rows of each of `steps` steps."""
    for p in range(first, last):
        for s in range(steps):
            for r in range(0, rows, ROWS):
                # the last four rows repeat the last row: z has room for whole fours, a has not
                a_0 = s * a_step + r * a_row
                a_1 = a_0 + a_row if r + 1 < rows else a_0
                a_2 = a_1 + a_row if r + 2 < rows else a_1
                a_3 = a_2 + a_row if r + 3 < rows else a_2
                z_at = s * z_step + r * z_row + p * PANEL
                product(z, z_at, z_row, a, a_0, a_1, a_2, a_3, w, p * depth * PANEL, depth)


@inner
def _take_panels(x, N, depth, out):
    """x [depth, N] as panels [ceil(N / PANEL), DEPTH, PANEL], with zeros beyond N."""
    for k in range(depth):
        for n in range(0, N, PANEL):
            x_n, out_n = row(x, k * N + n), row(out, n * DEPTH + k * PANEL)
            stop = N - n if n + PANEL > N else PANEL
            for j in range(stop):
                out_n[j] = x_n[j]
            for j in range(stop, PANEL):
                out_n[j] = 0


@inner
def _transpose(g, g_row, depth, M, out):
    """Columns of g [depth, M] as rows of out [M, DEPTH]."""
    for m in range(M):
        out_m, g_m = row(out, m * DEPTH), row(g, m)
        for k in range(depth):
            out_m[k] = g_m[k * g_row]


@inner
def _add_panel(panel, out, N, n, M):
    """Add panel [M, PANEL] to columns n on of out [M, N], and clear it."""
    stop = N - n if n + PANEL > N else PANEL
    for m in range(M):
        panel_m, out_m = row(panel, m * PANEL), row(out, m * N + n)
        for j in range(stop):
            out_m[j] += panel_m[j]
        for j in range(PANEL):
            panel_m[j] = 0


@inner
def _add_row(a, out, M):
    for m in range(M):
        out[m] += a[m]


@kernel()
def weight_gradient_kernel(
    counter, g, x, v, g_weight_x, g_weight_v, g_bias, depth, M, N, g_row, block
):
    """Add g^T x and g^T v to the weights' gradients [M, N], and the sum of g to the bias's [M].

    g [depth, M], a row every g_row numbers; x, v [depth, N]. A thread takes `block` rows of the
    gradients at a time, a multiple of ROWS; sums run over the depth in order, in parts of DEPTH.
    """
    panels, bias = -(-N // PANEL), np.zeros(block, g.dtype)
    sums, turned = np.zeros(block * PANEL, g.dtype), np.empty(block * DEPTH, g.dtype)
    packed = np.empty(panels * DEPTH * PANEL, g.dtype)
    while True:
        first = take(counter) * block
        if first >= M:
            break
        rows = block if first + block < M else M - first
        for d in range(0, depth, DEPTH):
            part = DEPTH if d + DEPTH < depth else depth - d
            _transpose(row(g, d * g_row + first), g_row, part, rows, turned)
            for p in range(2 * panels):
                a, g_weight = (x, g_weight_x) if p < panels else (v, g_weight_v)
                if p % panels == 0:
                    _take_panels(row(a, d * N), N, part, packed)
                n = p % panels * PANEL
                for m in range(0, rows, ROWS):
                    g_0 = m * DEPTH
                    g_1 = g_0 + DEPTH if m + 1 < rows else g_0
                    g_2 = g_1 + DEPTH if m + 2 < rows else g_1
                    g_3 = g_2 + DEPTH if m + 3 < rows else g_2
                    product(
                        sums, m * PANEL, PANEL, turned, g_0, g_1, g_2, g_3, packed, n * DEPTH, part
                    )
                _add_panel(sums, row(g_weight, first * N), N, n, rows)
            for k in range(part):
                _add_row(row(g, (d + k) * g_row + first), bias, rows)
        for m in range(rows):
            g_bias[first + m] += bias[m]
            bias[m] = 0


def is_compiled(kernel) -> bool:
    """Whether this process or this machine's cache holds the kernel, if of an older program."""
    file = getattr(kernel._cache, "_cache_file", None)
    return bool(kernel.signatures) or (file is not None and os.path.exists(file._index_path))


def flat(a: Tensor | None, like: Tensor) -> np.ndarray:
    """The tensor's memory as one long array."""
    return (like.new_empty(0) if a is None else a.contiguous()).detach().numpy().reshape(-1)


def pack(w: Tensor | None, G: int, like: Tensor) -> np.ndarray:
    """Weights [G n, depth] as panels [G ceil(n / PANEL), depth, PANEL], zeros where n ends."""
    if w is None:
        return flat(None, like)
    n, depth = w.shape[0] // G, w.shape[1]
    width = -(-n // PANEL) * PANEL
    if width != n:
        w = F.pad(w.reshape(G, n, depth), (0, 0, 0, width - n))
    return flat(w.reshape(-1, PANEL, depth).transpose(1, 2), like)


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run(kernel, threads: int, tiles: int, *arguments) -> None:
    """Run the kernel on this thread and others, which take tiles from one counter."""
    global _pool
    counter = np.zeros(1, np.int64)
    helpers = min(threads, tiles) - 1
    if helpers > 0 and _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), "gpn_cpu")
    others = [_pool.submit(kernel, counter, *arguments) for _ in range(helpers)]
    kernel(counter, *arguments)
    for other in others:
        # one that has not begun finds nothing left to do
        if not other.cancel():
            other.result()
