"""The backward kernels: one owns rows and sums dq, the other owns keys and sums dk and dv, so that no sum is
shared between programs: bitwise repeatable, without atomics. Probabilities are recomputed from the lse that
is given, which may be of a softmax over more keys than these."""

from __future__ import annotations

import triton
import triton.language as tl

from lcab_plugin.kernels.triton.forward import (
    COUNTS,
    LOG2E,
    at,
    dot,
    keep_intervals,
    load_block,
    load_rows,
    logits,
    reached,
    run_at,
    store_rows,
    visible,
)


@triton.jit
def load_vector(base, rows, count, BOUND: tl.constexpr):
    """One number a row; zero past ``count`` rows."""
    if BOUND:
        return tl.load(base + rows, mask=rows < count, other=0.0)
    else:
        return tl.load(base + rows)


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    DOUT,
    OUT,
    LSE,
    DELTA,
    LSE2,
    do_batch,
    do_stride,
    do_head,
    o_batch,
    o_stride,
    o_head,
    heads,
    batch_heads,
    tq,
    sum_stride,
    BM: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
):
    """``DELTA [b, h, tq] = rowsum(dout * out)``, and ``LSE2``: ``LSE`` to base 2; rows of ``sum_stride``
    numbers, a multiple of ``BM``, with zeros past ``tq``."""
    first, bh = (tl.program_id(0) // batch_heads) * BM, tl.program_id(0) % batch_heads
    b, h = bh // heads, bh % heads
    rows = first + tl.arange(0, BM)
    dout = load_rows(at(at(DOUT, b, do_batch), h, do_head), do_stride, first, tq, BM, DV, DVP, True)
    out = load_rows(at(at(OUT, b, o_batch), h, o_head), o_stride, first, tq, BM, DV, DVP, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(at(DELTA, bh, sum_stride) + rows, delta)
    lse = load_vector(at(LSE, bh, tq), rows, tq, True)
    tl.store(at(LSE2, bh, sum_stride) + rows, lse * LOG2E)


@triton.jit(do_not_specialize=COUNTS)
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
    do_batch,
    do_stride,
    do_head,
    q_batch,
    q_stride,
    q_head,
    k_batch,
    k_stride,
    k_head,
    v_batch,
    v_stride,
    v_head,
    heads,
    group,
    batch_heads,
    tq,
    tk,
    sum_stride,
    scale_log2,
    cap_log2,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    KEPT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """``DQ [b, tq, h, D]`` (contiguous); the table and the grid are the forward's."""
    pid = tl.program_id(0)
    line = lines + (pid // batch_heads) * 5
    bh = pid % batch_heads
    b, h = bh // heads, bh % heads
    hk = h // group
    first_row = tl.load(line) * BM
    rows = first_row + tl.arange(0, BM)
    q = load_rows(at(at(Q, b, q_batch), h, q_head), q_stride, first_row, tq, BM, D, DP, True)
    dout = load_rows(at(at(DOUT, b, do_batch), h, do_head), do_stride, first_row, tq, BM, DV, DVP, True)
    lse = tl.load(at(LSE, bh, sum_stride) + rows, mask=rows < tq, other=0.0)
    delta = tl.load(at(DELTA, bh, sum_stride) + rows, mask=rows < tq, other=0.0)
    if not TMA:
        K = at(at(K, b, k_batch), hk, k_head)
        V = at(at(V, b, v_batch), hk, v_head)

    dq = tl.zeros([BM, DP], tl.float32)
    for MASKED in tl.static_range(2):  # the FULL runs, then the PARTIAL ones
        start0, stop0, start1, stop1 = keep_intervals(starts, stops, rows, tq, KEPT, MASKED)
        for r in range(tl.load(line + 1 + MASKED), tl.load(line + 2 + MASKED)):
            begin, end = run_at(runs, r)
            span = reached(runs, r)
            for block in range(begin, end):
                first = block * BN
                k = load_block(K, b, hk, k_stride, first, tk, BN, D, DP, MASKED, TMA)
                v = load_block(V, b, hk, v_stride, first, tk, BN, DV, DVP, MASKED, TMA)
                s, t = logits(dot(q, tl.trans(k), None, UPCAST), scale_log2, cap_log2, SOFTCAP)
                dp = dot(dout, tl.trans(v), None, UPCAST)
                p = tl.exp2(s - lse[:, None])
                if MASKED:
                    keys = first + tl.arange(0, BN)
                    seen = visible(keys, start0, stop0, start1, stop1, starts, stops, rows, tq, span, KEPT)
                    p = tl.where(seen, p, 0.0)
                ds = p * (dp - delta[:, None])
                if SOFTCAP:
                    ds = ds * (1.0 - t * t)
                dq = dot(ds.to(k.dtype), k, dq, UPCAST)
    store_rows(at(DQ, b, tq * heads * D) + h * D, heads * D, first_row, tq, dq * scale, BM, D, DP)


@triton.jit(do_not_specialize=COUNTS)
def dkv_kernel(
    DK,
    DV_OUT,
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
    do_batch,
    do_stride,
    do_head,
    q_batch,
    q_stride,
    q_head,
    k_batch,
    k_stride,
    k_head,
    v_batch,
    v_stride,
    v_head,
    heads,
    group,
    batch_heads,
    tq,
    tk,
    sum_stride,
    scale_log2,
    cap_log2,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    KEPT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """``DK [b, tk, kv_heads, D]`` and ``DV_OUT`` (contiguous), summed over the query heads of each group.

    The table is that of the transposed mask: lines are blocks of keys, runs are blocks of rows. Grid: lines x
    batch x kv heads (``batch_heads``). Products are transposed, [keys, rows], so that no score has to be.
    """
    pid = tl.program_id(0)
    line = lines + (pid // batch_heads) * 5
    bh = pid % batch_heads
    kv_heads = heads // group
    b, hk = bh // kv_heads, bh % kv_heads
    first_key = tl.load(line) * BN
    keys = first_key + tl.arange(0, BN)
    k = load_rows(at(at(K, b, k_batch), hk, k_head), k_stride, first_key, tk, BN, D, DP, True)
    v = load_rows(at(at(V, b, v_batch), hk, v_head), v_stride, first_key, tk, BN, DV, DVP, True)

    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DVP], tl.float32)
    for member in range(group):
        h = hk * group + member
        if TMA:
            Qh, DOh = Q, DOUT
        else:
            Qh = at(at(Q, b, q_batch), h, q_head)
            DOh = at(at(DOUT, b, do_batch), h, do_head)
        LSEh = at(LSE, b * heads + h, sum_stride)
        DELTAh = at(DELTA, b * heads + h, sum_stride)
        for MASKED in tl.static_range(2):  # the FULL runs, then the PARTIAL ones
            start0, stop0, start1, stop1 = keep_intervals(starts, stops, keys, tk, KEPT, MASKED)
            for r in range(tl.load(line + 1 + MASKED), tl.load(line + 2 + MASKED)):
                begin, end = run_at(runs, r)
                span = reached(runs, r)
                for block in range(begin, end):
                    first = block * BM
                    rows = first + tl.arange(0, BM)
                    q = load_block(Qh, b, h, q_stride, first, tq, BM, D, DP, MASKED, TMA)
                    dout = load_block(DOh, b, h, do_stride, first, tq, BM, DV, DVP, MASKED, TMA)
                    s, t = logits(dot(k, tl.trans(q), None, UPCAST), scale_log2, cap_log2, SOFTCAP)
                    lse = load_vector(LSEh, rows, tq, MASKED)
                    p = tl.exp2(s - lse[None, :])
                    if MASKED:
                        seen = visible(
                            rows, start0, stop0, start1, stop1, starts, stops, keys, tk, span, KEPT
                        )
                        p = tl.where(seen, p, 0.0)
                    dv = dot(p.to(dout.dtype), dout, dv, UPCAST)
                    # only now: computed beside the scores it would cost registers, and ptxas would
                    # serialise the products
                    dp = dot(v, tl.trans(dout), None, UPCAST)
                    ds = p * (dp - load_vector(DELTAh, rows, tq, MASKED)[None, :])
                    if SOFTCAP:
                        ds = ds * (1.0 - t * t)
                    dk = dot(ds.to(q.dtype), q, dk, UPCAST)
    store_rows(at(DK, b, tk * kv_heads * D) + hk * D, kv_heads * D, first_key, tk, dk * scale, BN, D, DP)
    dv_out = at(DV_OUT, b, tk * kv_heads * DV) + hk * DV
    store_rows(dv_out, kv_heads * DV, first_key, tk, dv, BN, DV, DVP)
