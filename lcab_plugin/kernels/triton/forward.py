"""The forward kernel, and what it shares with the backward kernels. Imported only when Triton is.

A program owns one block of rows of one head and visits the blocks of its line of the block table: runs of
FULL blocks first, without mask or bounds, then PARTIAL ones. In a PARTIAL block a row sees the keys of its
intervals, which lie in registers for one or two intervals a row and are read from memory beyond that.
Softmax runs in base 2 with the scale folded in (FlashAttention 2, arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Lengths and numbers of heads: Triton would compile anew for each that is 1 or a multiple of 16.
COUNTS = ("heads", "group", "batch_heads", "tq", "tk", "sum_stride")


@triton.jit
def at(base, row, stride):
    """The address of row ``row``; the product is 64 bits wide, since a tensor may pass 2^31 elements."""
    return base + row.to(tl.int64) * stride


@triton.jit
def load_rows(
    base, stride, first, count, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BOUND: tl.constexpr
):
    """Rows ``first`` to ``first + ROWS`` of one head, [ROWS, DP]: zeros past ``count`` rows and D columns."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    pointers = at(base, first, stride) + rows[:, None] * stride + columns[None, :]
    if BOUND:
        inside = (first + rows < count)[:, None]
        if D < DP:
            inside = inside & (columns < D)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    elif D < DP:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_block(
    source,
    b,
    h,
    stride,
    first,
    count,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BOUND: tl.constexpr,
    TMA: tl.constexpr,
):
    """A block of rows of head ``h``: through a tensor descriptor, or a pointer to that head."""
    if TMA:
        return source.load([b, first, h, 0]).reshape(ROWS, DP)
    else:
        return load_rows(source, stride, first, count, ROWS, D, DP, BOUND)


@triton.jit
def store_rows(base, stride, first, count, value, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Write back a block of rows, in the dtype of the target."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    pointers = at(base, first, stride) + rows[:, None] * stride + columns[None, :]
    inside = (first + rows < count)[:, None] & (columns < D)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """``acc + a @ b``. UPCAST: Triton's interpreter has no bfloat16 product.

    In float32 every block's product is summed on its own before it is added: one running sum over thousands
    of rows would lose more than the error budget.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if acc is None:
        return tl.dot(a, b, input_precision="ieee")
    elif a.dtype == tl.float32:
        product = tl.dot(a, b, input_precision="ieee")
        return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_intervals(starts, stops, index, rows, count):
    """Interval ``index`` of these of ``count`` rows; rows past the last see nothing."""
    inside = rows < count
    offset = tl.cast(index, tl.int64) * count + rows
    return tl.load(starts + offset, mask=inside, other=0), tl.load(stops + offset, mask=inside, other=0)


@triton.jit
def keep_intervals(starts, stops, rows, count, KEPT: tl.constexpr, NEEDED: tl.constexpr):
    """The first one or two intervals of these rows, to stay in registers."""
    start0, stop0 = rows, rows
    start1, stop1 = rows, rows
    if NEEDED and KEPT > 0:
        start0, stop0 = load_intervals(starts, stops, 0, rows, count)
    if NEEDED and KEPT == 2:
        start1, stop1 = load_intervals(starts, stops, 1, rows, count)
    return start0, stop0, start1, stop1


@triton.jit
def run_at(runs, r):
    """The first block of a run of the table and the one after its last."""
    run = runs + 4 * r
    begin = tl.load(run)
    return begin, begin + tl.load(run + 1)


@triton.jit
def reached(runs, r):
    """Which intervals of its rows reach into a run of the table: the first, and the one after the last."""
    run = runs + 4 * r
    return tl.load(run + 2), tl.load(run + 3)


@triton.jit
def visible(columns, start0, stop0, start1, stop1, starts, stops, rows, count, span, KEPT: tl.constexpr):
    """Which (row, column) pairs of a block the mask shows, [rows, columns]; ``span``: of its run, by
    ``reached``."""
    columns = columns[None, :]
    seen = (columns >= start0[:, None]) & (columns < stop0[:, None])
    if KEPT == 0:
        seen = seen & (columns < 0)
        low, high = span
        for i in range(low, high):
            start, stop = load_intervals(starts, stops, i, rows, count)
            seen = seen | ((columns >= start[:, None]) & (columns < stop[:, None]))
    if KEPT == 2:
        seen = seen | ((columns >= start1[:, None]) & (columns < stop1[:, None]))
    return seen


@triton.jit
def logits(qk, scale_log2, cap_log2, SOFTCAP: tl.constexpr):
    """Scores in base 2. Under a soft cap ``cap * tanh(s / cap)``, with ``scale_log2 = scale / cap``, and the
    tanh."""
    if SOFTCAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(qk * (2.0 * LOG2E * scale_log2)))
        return t * cap_log2, t
    return qk * scale_log2, qk


@triton.jit(do_not_specialize=COUNTS)
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
    scale_log2,
    cap_log2,
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
    """``OUT [b, tq, h, DV]`` (contiguous) and ``LSE [b, h, tq]``.

    Grid: lines of the table x batch x heads, the heaviest lines first and the heads that share keys beside
    each other.
    """
    pid = tl.program_id(0)
    line = lines + (pid // batch_heads) * 5
    bh = pid % batch_heads
    b, h = bh // heads, bh % heads
    hk = h // group
    first_row = tl.load(line) * BM
    rows = first_row + tl.arange(0, BM)
    q = load_rows(at(at(Q, b, q_batch), h, q_head), q_stride, first_row, tq, BM, D, DP, True)
    if not TMA:
        K = at(at(K, b, k_batch), hk, k_head)
        V = at(at(V, b, v_batch), hk, v_head)

    acc = tl.zeros([BM, DVP], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for MASKED in tl.static_range(2):  # the FULL runs, then the PARTIAL ones
        start0, stop0, start1, stop1 = keep_intervals(starts, stops, rows, tq, KEPT, MASKED)
        for r in range(tl.load(line + 1 + MASKED), tl.load(line + 2 + MASKED)):
            begin, end = run_at(runs, r)
            span = reached(runs, r)
            for block in range(begin, end):
                first = block * BN
                k = load_block(K, b, hk, k_stride, first, tk, BN, D, DP, MASKED, TMA)
                s = dot(q, tl.trans(k), None, UPCAST)
                if SOFTCAP or MASKED:
                    s, _ = logits(s, scale_log2, cap_log2, SOFTCAP)
                    if MASKED:
                        keys = first + tl.arange(0, BN)
                        seen = visible(
                            keys, start0, stop0, start1, stop1, starts, stops, rows, tq, span, KEPT
                        )
                        s = tl.where(seen, s, float("-inf"))
                    m_new = tl.maximum(m, tl.max(s, 1))
                    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                    p = tl.exp2(s - shift[:, None])
                else:  # scaling folds into one fused multiply-add with the subtraction
                    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
                    shift = m_new
                    p = tl.exp2(s * scale_log2 - shift[:, None])
                alpha = tl.exp2(m - shift)
                m = m_new
                total = total * alpha + tl.sum(p, 1)
                acc = acc * alpha[:, None]
                v = load_block(V, b, hk, v_stride, first, tk, BN, DV, DVP, MASKED, TMA)
                acc = dot(p.to(v.dtype), v, acc, UPCAST)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), (m + tl.log2(total)) * LN2)
    tl.store(at(LSE, bh, tq) + rows, lse, mask=rows < tq)
    out = at(OUT, b, tq * heads * DV) + h * DV
    store_rows(out, heads * DV, first_row, tq, acc, BM, DV, DVP)
