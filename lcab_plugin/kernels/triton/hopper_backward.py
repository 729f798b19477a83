"""The backward kernels of Hopper GPUs: sums over keys for dq, over rows of every query head for dk and dv,
as in ``backward.py``. Gradients of scores, and in the second kernel the weights, are left factors in the
registers where they were computed; that kernel's products are transposed, [keys, rows], to have them there.
"""

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
    tma_load,
    tma_store,
    turns,
    visible,
    wait_full,
)

COUNTS = ("units", "heads", "group", "together", "items", "tq", "tk", "sum_stride")


@gluon.jit
def product(a, x, j, full, META: gl.constexpr):
    """Start ``a @ x.T``, of an own tile and that of block ``j`` once it has come."""
    zeros = gl.full([META.value.own, META.value.block], 0.0, gl.float32, META.value.scores)
    wait_full(full, j, META)
    return warpgroup_mma(a, x.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def weights(s, lse, of_block, own_rows, held, tables, sizes, MASKED: gl.constexpr, META: gl.constexpr):
    """Softmax weights from scores and the lse of every row (broadcast), and what a soft cap's slope needs.
    ``of_block``: where it is masked, its first column and the intervals that its run reaches."""
    _, _, starts, stops = tables
    count, scale_log2, cap_log2, _ = sizes
    s, t = logits(s, scale_log2, cap_log2, META.value.softcap)
    p = gl.exp2(s - lse)
    if MASKED:
        first, span = of_block
        columns = first + gl.arange(0, META.value.block, layout=gl.SliceLayout(0, META.value.scores))
        start0, stop0, start1, stop1 = held
        seen = visible(
            columns, start0, stop0, start1, stop1, starts, stops, own_rows, count, span, META.value.kept
        )
        p = gl.where(seen, p, 0.0)
    return p, t


@gluon.jit
def dq_step(dq, j, of_block, own, around, MASKED: gl.constexpr, META: gl.constexpr):
    """Add what block ``j`` of the keys gives."""
    q, dout, lse, delta, rows, held = own
    streamed, tables, sizes = around
    _, _, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty = streamed
    stage = j % META.value.stages
    k = k_buffer.index(stage).reshape([META.value.block, META.value.dim])
    v = v_buffer.index(stage).reshape([META.value.block, META.value.value_dim])
    s = product(q, k, j, k_full, META)
    dp = product(dout, v, j, v_full, META)
    s = warpgroup_mma_wait(1, deps=[s])
    p, t = weights(s, lse[:, None], of_block, rows, held, tables, sizes, MASKED, META)
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(stage), count=1)
    ds = p * (dp - delta[:, None])
    if META.value.softcap:
        ds = ds * (1.0 - t * t)
    ds = gl.convert_layout(ds.to(k.dtype), META.value.factor(META.value.dim))
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq, ds = warpgroup_mma_wait(0, deps=[dq, ds])
    mbarrier.arrive(k_empty.index(stage), count=1)
    return dq


@gluon.jit
def compute_dq(queries, around, DQ, sums, counts, SIDE: gl.constexpr, META: gl.constexpr):
    """A group of four warps: dq of its own rows of every item."""
    _, buffers, own_full, own_empty = queries
    q_buffer, do_buffer = buffers
    _, tables, sizes = around
    LSE, DELTA, sum_stride = sums
    lines, runs, starts, stops = tables
    _, heads, _, _, items = counts
    tq, _, _, scale = sizes
    OWN: gl.constexpr = META.value.own
    EACH_ROW: gl.constexpr = gl.SliceLayout(1, META.value.scores)
    j = gl.to_tensor(0)
    for n in range(turns(items)):
        line, b, h, row = locate(item_of(n), lines, counts, SIDE, META)
        rows = row + gl.arange(0, OWN, layout=EACH_ROW)
        held = keep_intervals(starts, stops, rows, tq, META.value.kept, True)
        lse = gl.load(at(LSE, b * heads + h, sum_stride) + rows, mask=rows < tq, other=0.0)
        delta = gl.load(at(DELTA, b * heads + h, sum_stride) + rows, mask=rows < tq, other=0.0)
        dq = gl.full([OWN, META.value.dim], 0.0, gl.float32, META.value.product(META.value.dim))
        q = q_buffer.index(SIDE).reshape([OWN, META.value.dim])
        dout = do_buffer.index(SIDE).reshape([OWN, META.value.value_dim])
        own = (q, dout, lse, delta, rows, held)
        mbarrier.wait(own_full.index(SIDE), n & 1)
        for _full in range(gl.load(line + 4)):
            dq = dq_step(dq, j, (0, (0, 0)), own, around, False, META)
            j += 1
        for r in range(gl.load(line + 2), gl.load(line + 3)):
            begin, stop = run_at(runs, r)
            span = reached(runs, r)
            for block in range(begin, stop):
                of_block = (block * META.value.block, span)
                dq = dq_step(dq, j, of_block, own, around, True, META)
                j += 1
        q.store((dq * scale).to(DQ.dtype))  # where the queries were: every product has read them
        fence_async_shared()
        tma_store(DQ, [b, row, h, 0], q_buffer.index(SIDE))
        tma.store_wait(0)
        mbarrier.arrive(own_empty.index(SIDE), count=1)


@gluon.jit(do_not_specialize=COUNTS)
def dq_kernel(
    DQ,
    DOUT,
    Q,
    K,
    V,
    LSE,
    DELTA,
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
    sum_stride,
    scale_log2,
    cap_log2,
    scale,
    META: gl.constexpr,
):
    """``DQ [b, tq, h, D]``; items are the forward's, ``LSE`` (to base 2) and ``DELTA`` have rows of
    ``sum_stride`` numbers."""
    STAGES: gl.constexpr = META.value.stages
    BLOCK: gl.constexpr = META.value.block
    OWN: gl.constexpr = META.value.own
    DIM: gl.constexpr = META.value.dim
    VALUE_DIM: gl.constexpr = META.value.value_dim
    # One place for each own tile: with two, as in the forward, Triton 3.6 gave wrong results on an H200.
    q_buffer = gl.allocate_shared_memory(Q.dtype, [2, 1, OWN, 1, DIM], Q.layout)
    do_buffer = gl.allocate_shared_memory(DOUT.dtype, [2, 1, OWN, 1, VALUE_DIM], DOUT.layout)
    queries = ((Q, DOUT), (q_buffer, do_buffer), make_barriers(2, 2), make_barriers(2, 1))
    k_buffer = gl.allocate_shared_memory(K.dtype, [STAGES, 1, BLOCK, 1, DIM], K.layout)
    v_buffer = gl.allocate_shared_memory(V.dtype, [STAGES, 1, BLOCK, 1, VALUE_DIM], V.layout)
    k_full, k_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    v_full, v_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    streamed = (K, V, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty)
    fence_async_shared()
    sums = (LSE, DELTA, sum_stride)
    tables = (lines, runs, starts, stops)
    counts = (units, heads, group, together, items)
    around = (streamed, tables, (tq, scale_log2, cap_log2, scale))
    gl.warp_specialize(
        [
            (compute_dq, (queries, around, DQ, sums, counts, 0, META)),
            (compute_dq, (queries, around, DQ, sums, counts, 1, META)),
            (load_keys, (queries, streamed, tables, counts, 1, META)),
        ],
        WORKERS,
        REGISTERS,
    )


@gluon.jit
def locate_part(item, parts, lines, units, SIDE: gl.constexpr, META: gl.constexpr):
    """An item's line of the table, unit and first own key, of one of the two groups; the first query head it
    sums over, counted from that of its keys, how many they are, and the slot for the sum or -1."""
    part = parts + (item // units) * 4
    line = lines + gl.load(part) * 5
    key = (gl.load(line) * 2 + SIDE) * META.value.own
    return line, item % units, key, gl.load(part + 1), gl.load(part + 2), gl.load(part + 3)


@gluon.jit
def load_rows(keys, streamed, parts, tables, counts, META: gl.constexpr):
    """The warp that loads for dk and dv: every item's keys and values, then the rows of its query heads in
    the order of use, with their lse and delta."""
    own_sources, own_buffers, own_full, own_empty = keys
    sources, buffers, q_full, q_empty, do_full, do_empty = streamed
    q_source, do_source, lse_source, delta_source = sources
    q_buffer, do_buffer, lse_buffer, delta_buffer = buffers
    lines, runs, _, _ = tables
    units, kv_heads, group, items = counts
    j = gl.to_tensor(0)
    for n in range(turns(items)):
        for SIDE in gl.static_range(2):
            line, unit, key, member, members, _slot = locate_part(item_of(n), parts, lines, units, SIDE, META)
            b, hk = unit // kv_heads, unit % kv_heads
            mbarrier.wait(own_empty.index(SIDE), (n & 1) ^ 1)
            for i in gl.static_range(2):
                mbarrier.expect(own_full.index(SIDE), own_sources[i].block_type.nbytes)
                tma_load(own_sources[i], [b, key, hk, 0], own_full.index(SIDE), own_buffers[i].index(SIDE))
        for h in range(hk * group + member, hk * group + member + members):
            line_of_head = b * kv_heads * group + h
            for r in range(gl.load(line + 1), gl.load(line + 3)):
                begin, end = run_at(runs, r)
                for block in range(begin, end):
                    row = block * META.value.block
                    stage = j % META.value.stages
                    free = ((j // META.value.stages) & 1) ^ 1
                    full = q_full.index(stage)
                    mbarrier.wait(q_empty.index(stage), free)
                    mbarrier.expect(full, q_source.block_type.nbytes + lse_source.block_type.nbytes)
                    tma_load(q_source, [b, row, h, 0], full, q_buffer.index(stage))
                    tma_load(lse_source, [line_of_head, row], full, lse_buffer.index(stage))
                    full = do_full.index(stage)
                    mbarrier.wait(do_empty.index(stage), free)
                    mbarrier.expect(full, do_source.block_type.nbytes + delta_source.block_type.nbytes)
                    tma_load(do_source, [b, row, h, 0], full, do_buffer.index(stage))
                    tma_load(delta_source, [line_of_head, row], full, delta_buffer.index(stage))
                    j += 1


@gluon.jit
def dkv_step(dk, dv, j, of_block, own, around, MASKED: gl.constexpr, META: gl.constexpr):
    """Add what block ``j`` of the rows gives."""
    k, v, keys, held = own
    streamed, tables, sizes = around
    _, buffers, q_full, q_empty, do_full, do_empty = streamed
    q_buffer, do_buffer, lse_buffer, delta_buffer = buffers
    EACH_ROW: gl.constexpr = gl.SliceLayout(0, META.value.scores)
    stage = j % META.value.stages
    q = q_buffer.index(stage).reshape([META.value.block, META.value.dim])
    dout = do_buffer.index(stage).reshape([META.value.block, META.value.value_dim])
    s = product(k, q, j, q_full, META)
    dp = product(v, dout, j, do_full, META)
    s = warpgroup_mma_wait(1, deps=[s])
    lse = lse_buffer.index(stage).reshape([META.value.block]).load(EACH_ROW)
    p, t = weights(s, lse[None, :], of_block, keys, held, tables, sizes, MASKED, META)
    factor = gl.convert_layout(p.to(q.dtype), META.value.factor(META.value.value_dim))
    dv = warpgroup_mma(factor, dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = delta_buffer.index(stage).reshape([META.value.block]).load(EACH_ROW)
    ds = p * (dp - delta[None, :])
    if META.value.softcap:
        ds = ds * (1.0 - t * t)
    ds = gl.convert_layout(ds.to(q.dtype), META.value.factor(META.value.dim))
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dv, factor = warpgroup_mma_wait(1, deps=[dv, factor])
    mbarrier.arrive(do_empty.index(stage), count=1)
    dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])
    mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def store_sums(base, first, x):
    """Write float32 rows ``first`` and on."""
    rows = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    columns = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    gl.store(at(base, first, x.shape[1]) + rows[:, None] * x.shape[1] + columns[None, :], x)


@gluon.jit
def compute_dkv(keys_of_items, around, results, counts, SIDE: gl.constexpr, META: gl.constexpr):
    """A group of four warps: dk and dv of its own keys of every item."""
    _, buffers, own_full, own_empty = keys_of_items
    k_buffer, v_buffer = buffers
    _, tables, sizes = around
    DK, DV, DK_SUMS, DV_SUMS, parts = results
    lines, runs, starts, stops = tables
    units, kv_heads, _, items = counts
    tk, _, _, scale = sizes
    OWN: gl.constexpr = META.value.own
    DIM: gl.constexpr = META.value.dim
    VALUE_DIM: gl.constexpr = META.value.value_dim
    j = gl.to_tensor(0)
    for n in range(turns(items)):
        line, unit, key, _member, members, slot = locate_part(item_of(n), parts, lines, units, SIDE, META)
        keys = key + gl.arange(0, OWN, layout=gl.SliceLayout(1, META.value.scores))
        held = keep_intervals(starts, stops, keys, tk, META.value.kept, True)
        dk = gl.full([OWN, DIM], 0.0, gl.float32, META.value.product(DIM))
        dv = gl.full([OWN, VALUE_DIM], 0.0, gl.float32, META.value.product(VALUE_DIM))
        k = k_buffer.index(SIDE).reshape([OWN, DIM])
        v = v_buffer.index(SIDE).reshape([OWN, VALUE_DIM])
        own = (k, v, keys, held)
        full, partial, end = gl.load(line + 4), gl.load(line + 2), gl.load(line + 3)
        mbarrier.wait(own_full.index(SIDE), n & 1)
        for _m in range(members):
            for _full in range(full):
                dk, dv = dkv_step(dk, dv, j, (0, (0, 0)), own, around, False, META)
                j += 1
            for r in range(partial, end):
                begin, stop = run_at(runs, r)
                span = reached(runs, r)
                for block in range(begin, stop):
                    of_block = (block * META.value.block, span)
                    dk, dv = dkv_step(dk, dv, j, of_block, own, around, True, META)
                    j += 1
        if slot < 0:
            k.store((dk * scale).to(DK.dtype))  # where the keys were: every product has read them
            v.store(dv.to(DV.dtype))
            fence_async_shared()
            where = [unit // kv_heads, key, unit % kv_heads, 0]
            tma_store(DK, where, k_buffer.index(SIDE))
            tma_store(DV, where, v_buffer.index(SIDE))
            tma.store_wait(0)
        else:
            first = ((slot * units + unit) * 2 + SIDE) * OWN
            store_sums(DK_SUMS, first, dk * scale)
            store_sums(DV_SUMS, first, dv)
        mbarrier.arrive(own_empty.index(SIDE), count=1)


@gluon.jit(do_not_specialize=COUNTS)
def dkv_kernel(
    DK,
    DV,
    DK_SUMS,
    DV_SUMS,
    DOUT,
    Q,
    K,
    V,
    LSE,
    DELTA,
    parts,
    lines,
    runs,
    starts,
    stops,
    units,
    heads,
    group,
    items,
    tk,
    scale_log2,
    cap_log2,
    scale,
    META: gl.constexpr,
):
    """``DK [b, tk, kv_heads, D]`` and ``DV``, summed over the query heads of each group; ``LSE`` and
    ``DELTA`` are ``hopper.row_source``. The table is that of the transposed mask, its lines of twice
    ``META.own`` keys; an item is one of the ``parts`` (``plan.Parts``) for one of ``units``, a key/value head
    of one sequence of the batch. Parts with a slot leave their sums in ``DK_SUMS [slots, units, 2 * own, D]``
    and ``DV_SUMS``."""
    STAGES: gl.constexpr = META.value.stages
    BLOCK: gl.constexpr = META.value.block
    OWN: gl.constexpr = META.value.own
    DIM: gl.constexpr = META.value.dim
    VALUE_DIM: gl.constexpr = META.value.value_dim
    k_buffer = gl.allocate_shared_memory(K.dtype, [2, 1, OWN, 1, DIM], K.layout)
    v_buffer = gl.allocate_shared_memory(V.dtype, [2, 1, OWN, 1, VALUE_DIM], V.layout)
    keys = ((K, V), (k_buffer, v_buffer), make_barriers(2, 2), make_barriers(2, 1))
    buffers = (
        gl.allocate_shared_memory(Q.dtype, [STAGES, 1, BLOCK, 1, DIM], Q.layout),
        gl.allocate_shared_memory(DOUT.dtype, [STAGES, 1, BLOCK, 1, VALUE_DIM], DOUT.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], LSE.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], DELTA.layout),
    )
    q_full, q_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    do_full, do_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    streamed = ((Q, DOUT, LSE, DELTA), buffers, q_full, q_empty, do_full, do_empty)
    fence_async_shared()
    tables = (lines, runs, starts, stops)
    counts = (units, heads // group, group, items)
    around = (streamed, tables, (tk, scale_log2, cap_log2, scale))
    results = (DK, DV, DK_SUMS, DV_SUMS, parts)
    gl.warp_specialize(
        [
            (compute_dkv, (keys, around, results, counts, 0, META)),
            (compute_dkv, (keys, around, results, counts, 1, META)),
            (load_rows, (keys, streamed, parts, tables, counts, META)),
        ],
        WORKERS,
        REGISTERS,
    )
