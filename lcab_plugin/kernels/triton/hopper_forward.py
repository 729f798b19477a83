"""The forward kernel of Hopper GPUs. A group has the scores of the next block under way while it weighs the
values of the last, and the two groups take turns at the tensor cores, so that one's softmax runs beside the
other's products."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lcab_plugin.kernels.triton.hopper import (
    LN2,
    REGISTERS,
    WORKERS,
    at,
    item_of,
    keep_intervals,
    load_keys,
    locate,
    logits,
    make_barriers,
    reached,
    run_at,
    tma_store,
    turns,
    visible,
    wait_full,
)

PLACES = gl.constexpr(2)  # tiles of queries a group: those of the next item come meanwhile
COUNTS = ("units", "heads", "group", "together", "items", "tq")


@gluon.jit
def start_scores(q, j, streamed, turn, SIDE: gl.constexpr, META: gl.constexpr):
    """Start the product of queries and keys of block ``j``, in this group's turn at the tensor cores."""
    _, _, k_buffer, _, k_full, _, _, _ = streamed
    wait_full(k_full, j, META)
    mbarrier.wait(turn.index(SIDE), (j & 1) ^ (1 - SIDE))
    k = k_buffer.index(j % META.value.stages).reshape([META.value.block, META.value.dim]).permute((1, 0))
    zeros = gl.full([META.value.own, META.value.block], 0.0, gl.float32, META.value.scores)
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def start_output(p, acc, j, streamed, META: gl.constexpr):
    """Start adding the values of block ``j``, weighed by ``p``."""
    _, _, _, v_buffer, _, _, v_full, _ = streamed
    wait_full(v_full, j, META)
    v = v_buffer.index(j % META.value.stages).reshape([META.value.block, META.value.value_dim])
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def softmax(s, m, total, of_block, own, tables, sizes, MASKED: gl.constexpr, META: gl.constexpr):
    """Weights of one block of scores, the running maximum and sum, and what to scale earlier results by.
    ``of_block``: where it is masked, its first key and the intervals that its run reaches."""
    _, rows, held = own
    _, _, starts, stops = tables
    tq, scale_log2, cap_log2 = sizes
    scale = scale_log2  # folds into one fused multiply-add with the subtraction
    if META.value.softcap:
        s, _ = logits(s, scale_log2, cap_log2, True)
        scale = 1.0
    if MASKED:
        first, span = of_block
        keys = first + gl.arange(0, META.value.block, layout=gl.SliceLayout(0, META.value.scores))
        start0, stop0, start1, stop1 = held
        seen = visible(keys, start0, stop0, start1, stop1, starts, stops, rows, tq, span, META.value.kept)
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    shift = m_new
    if MASKED:
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(m - shift)
    return p, m_new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def step(
    p, acc, m, total, j, of_block, own, around, SIDE: gl.constexpr, MASKED: gl.constexpr, META: gl.constexpr
):
    """Scores and weights of block ``j``, and beside them the values of the block before."""
    q, _, _ = own
    streamed, turn, tables, sizes = around
    _, _, _, _, _, k_empty, _, v_empty = streamed
    s = start_scores(q, j, streamed, turn, SIDE, META)
    acc = start_output(p, acc, j - 1, streamed, META)
    mbarrier.arrive(turn.index(1 - SIDE), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(j % META.value.stages), count=1)
    new, m, total, alpha = softmax(s, m, total, of_block, own, tables, sizes, MASKED, META)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index((j - 1) % META.value.stages), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(new.to(p.dtype), p.type.layout), acc, m, total


@gluon.jit
def finish(acc, m, total, where, rows, LSE, tq, target, buffer):
    """Write the output, by way of ``buffer``, and the lse of these rows."""
    share = 1.0 / gl.where(total == 0.0, 1.0, total)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, acc.type.layout))[:, None]
    tma.store_wait(0)  # the item before has left the buffer
    buffer.reshape(acc.shape).store(acc.to(target.dtype))
    fence_async_shared()
    tma_store(target, where, buffer)
    lse = gl.where(total == 0.0, float("-inf"), (m + gl.log2(total)) * LN2)
    gl.store(LSE + rows, lse, mask=rows < tq)


@gluon.jit
def compute(queries, around, results, counts, SIDE: gl.constexpr, META: gl.constexpr):
    """A group of four warps: the output of its own rows of every item."""
    q_sources, q_buffers, q_full, q_empty = queries
    streamed, turn, tables, sizes = around
    _, _, _, _, _, k_empty, _, v_empty = streamed
    out_target, out_buffer, LSE = results
    lines, runs, starts, stops = tables
    _, heads, _, _, items = counts
    tq, _, _ = sizes
    OWN: gl.constexpr = META.value.own
    OUTPUT: gl.constexpr = META.value.product(META.value.value_dim)
    WEIGHTS: gl.constexpr = META.value.factor(META.value.value_dim)
    EACH_ROW: gl.constexpr = gl.SliceLayout(1, META.value.scores)
    j = gl.to_tensor(0)
    for n in range(turns(items)):
        line, b, h, row = locate(item_of(n), lines, counts, SIDE, META)
        begin, partial, end, full = (
            gl.load(line + 1),
            gl.load(line + 2),
            gl.load(line + 3),
            gl.load(line + 4),
        )
        rows = row + gl.arange(0, OWN, layout=EACH_ROW)
        acc = gl.full([OWN, META.value.value_dim], 0.0, gl.float32, OUTPUT)
        m = gl.full([OWN], float("-inf"), gl.float32, EACH_ROW)
        total = gl.full([OWN], 0.0, gl.float32, EACH_ROW)
        place = SIDE * PLACES + n % PLACES
        q = q_buffers[0].index(place).reshape([OWN, META.value.dim])
        mbarrier.wait(q_full.index(place), (n // PLACES) & 1)
        if begin < end:
            # The first block, with nothing before it.
            own = (q, rows, keep_intervals(starts, stops, rows, tq, META.value.kept, True))
            s = start_scores(q, j, streamed, turn, SIDE, META)
            mbarrier.arrive(turn.index(1 - SIDE), count=1)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(j % META.value.stages), count=1)
            if full > 0:
                p, m, total, _alpha = softmax(s, m, total, (0, (0, 0)), own, tables, sizes, False, META)
            else:
                first_block, _stop = run_at(runs, begin)
                of_block = (first_block * META.value.block, reached(runs, begin))
                p, m, total, _alpha = softmax(s, m, total, of_block, own, tables, sizes, True, META)
            p = gl.convert_layout(p.to(q_sources[0].dtype), WEIGHTS)
            for _full in range(1, full):
                j += 1
                p, acc, m, total = step(p, acc, m, total, j, (0, (0, 0)), own, around, SIDE, False, META)
            for r in range(partial, end):
                first_block, stop = run_at(runs, r)
                span = reached(runs, r)
                for block in range(first_block + (r == begin).to(gl.int32), stop):
                    j += 1
                    of_block = (block * META.value.block, span)
                    p, acc, m, total = step(p, acc, m, total, j, of_block, own, around, SIDE, True, META)
            acc = start_output(p, acc, j, streamed, META)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(v_empty.index(j % META.value.stages), count=1)
            j += 1
        mbarrier.arrive(q_empty.index(place), count=1)
        where = [b, row, h, 0]
        finish(acc, m, total, where, rows, at(LSE, b * heads + h, tq), tq, out_target, out_buffer.index(SIDE))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=COUNTS)
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    lines,
    runs,
    starts,
    stops,
    units,
    heads,
    group,
    together,
    items,
    tq,
    scale_log2,
    cap_log2,
    META: gl.constexpr,
):
    """``OUT [b, tq, h, DV]`` and ``LSE [b, h, tq]``; ``Q``, ``K``, ``V`` and ``OUT`` are ``hopper.source``.

    An item is a line of the table for one of ``units``: a pair of heads (``META.paired``) or a head, of one
    sequence of the batch. Any grid computes all ``items``.
    """
    STAGES: gl.constexpr = META.value.stages
    BLOCK: gl.constexpr = META.value.block
    OWN: gl.constexpr = META.value.own
    DIM: gl.constexpr = META.value.dim
    VALUE_DIM: gl.constexpr = META.value.value_dim
    q_buffer = gl.allocate_shared_memory(Q.dtype, [2 * PLACES, 1, OWN, 1, DIM], Q.layout)
    queries = ((Q,), (q_buffer,), make_barriers(2 * PLACES, 1), make_barriers(2 * PLACES, 1))
    k_buffer = gl.allocate_shared_memory(K.dtype, [STAGES, 1, BLOCK, 1, DIM], K.layout)
    v_buffer = gl.allocate_shared_memory(V.dtype, [STAGES, 1, BLOCK, 1, VALUE_DIM], V.layout)
    k_full, k_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    v_full, v_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    streamed = (K, V, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty)
    results = (OUT, gl.allocate_shared_memory(OUT.dtype, [2, 1, OWN, 1, VALUE_DIM], OUT.layout), LSE)
    turn = make_barriers(2, 1)
    fence_async_shared()
    tables = (lines, runs, starts, stops)
    counts = (units, heads, group, together, items)
    around = (streamed, turn, tables, (tq, scale_log2, cap_log2))
    gl.warp_specialize(
        [
            (compute, (queries, around, results, counts, 0, META)),
            (compute, (queries, around, results, counts, 1, META)),
            (load_keys, (queries, streamed, tables, counts, PLACES, META)),
        ],
        WORKERS,
        REGISTERS,
    )
