"""The device side of trial_cluster_gemm.py: products in clusters, in Gluon of Triton 3.7."""
# ruff: noqa: ANN001, ANN202

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    cluster,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _bring(a_desc, b_desc, c_desc, a, b, c, bars, row, column, steps, MORE: gl.constexpr):
    ready, free, shared = bars
    STAGES: gl.constexpr = a.shape[0]
    MOST: gl.constexpr = b.shape[1]
    BYTES: gl.constexpr = a_desc.nbytes_per_cta + b_desc.nbytes_per_cta
    for step in range(steps):
        stage = step % STAGES
        parity = ((step // STAGES) & 1) ^ 1
        bar = ready.index(stage)
        mbarrier.wait(free.index(stage), parity)
        mbarrier.expect(bar, BYTES + (c_desc.nbytes_per_cta if MORE else 0))
        tma.async_copy_global_to_shared(a_desc, [row, step * 64], bar, a.index(stage))
        mbarrier.wait(shared.index(stage), parity)  # the first one waits for all of its cluster
        at = [column, step * 64]
        tma.async_copy_global_to_shared(b_desc, at, bar, b.index(stage), multicast=True)
        if MORE:
            at = [column + MOST, step * 64]
            tma.async_copy_global_to_shared(c_desc, at, bar, c.index(stage), multicast=True)


@gluon.jit
def _store(out, width, row, column, acc, SUMS: gl.constexpr):
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    r = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    c = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SUMS))
    gl.store(out + r[:, None] * width + c[None, :], acc.to(gl.bfloat16))


@gluon.jit
def _multiply(
    a, b, c, bars, out, width, row, column, steps,
    MORE: gl.constexpr, SUMS: gl.constexpr, SUMS_MORE: gl.constexpr,
):  # fmt: skip
    ready, free, shared = bars
    STAGES: gl.constexpr = a.shape[0]
    ROWS: gl.constexpr = a.shape[1]
    MOST: gl.constexpr = b.shape[1]
    LEFT: gl.constexpr = c.shape[1]
    acc = gl.zeros([ROWS, MOST], gl.float32, SUMS)
    if MORE:
        rest = gl.zeros([ROWS, LEFT], gl.float32, SUMS_MORE)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        acc = warpgroup_mma(a.index(stage), b.index(stage).permute((1, 0)), acc, is_async=True)
        if MORE:
            rest = warpgroup_mma(
                a.index(stage), c.index(stage).permute((1, 0)), rest, is_async=True
            )
            acc, rest = warpgroup_mma_wait(2, deps=(acc, rest))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        # The products of the step before have ended: its tiles are free.
        if step > 0:
            mbarrier.arrive(free.index((step - 1) % STAGES))
            mbarrier.arrive(shared.index((step - 1) % STAGES))
    if MORE:
        acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
        _store(out, width, row, column + MOST, rest, SUMS_MORE)
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    _store(out, width, row, column, acc, SUMS)


@gluon.jit
def _product(
    a_desc, b_desc, c_desc, out, width, steps,
    STAGES: gl.constexpr, CTAS: gl.constexpr, MORE: gl.constexpr, OWN: gl.constexpr,
    ALL: gl.constexpr, SUMS: gl.constexpr, SUMS_MORE: gl.constexpr,
):  # fmt: skip
    # a_desc: bf16 [T, K] in boxes of a cluster's rows, b_desc, c_desc: bf16 [N, K]; out: [T, N]
    a = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout)
    b = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout)
    if MORE:
        shape: gl.constexpr = [STAGES] + c_desc.block_type.shape
        c = gl.allocate_shared_memory(c_desc.dtype, shape, c_desc.layout)
    else:
        c = b
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, CTAS], OWN)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, CTAS], OWN)
    shared = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ALL)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), 1)
        mbarrier.init(free.index(stage), 1)
        mbarrier.init(shared.index(stage), 1)
    mbarrier.sync_cluster_init()
    ROWS: gl.constexpr = a.shape[1]
    COLUMNS: gl.constexpr = b.shape[1] + (c.shape[1] if MORE else 0)
    row = gl.program_id(0) * ROWS
    column = gl.program_id(1) * COLUMNS
    bars = (ready, free, shared)
    gl.warp_specialize(
        [
            (
                _multiply,
                (a, b, c, bars, out, width, row, column, steps, MORE, SUMS, SUMS_MORE),
            ),
            (_bring, (a_desc, b_desc, c_desc, a, b, c, bars, row, column, steps, MORE)),
        ],
        [1],
        [40],
    )
    # Nobody ends while another one may still write to its memory.
    cluster.arrive()
    cluster.wait()
