"""Cross-attention over a group: other numbers of keys than of queries, each with a layout of its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import errors, inputs, reference
from cp_cells import compositions
from distributed import run

import lcab_plugin as lcab
from lcab_plugin import layout as layouts
from lcab_plugin import masks
from lcab_plugin.bench import cp_volume
from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.ulysses import fits
from lcab_plugin.layout import LAYOUTS, View
from lcab_plugin.masks import AttentionMask

LENGTHS = [(37, 61), (61, 23), (33, 3), (1, 40), (50, 50)]  # every rank's uneven; fewer than four ranks
HEADS = [(8, 4), (8, 8), (4, 1), (10, 5)]


def cross_masks(q_len: int, k_len: int) -> dict[str, AttentionMask]:
    """An encoder's and a decoder's masks; the last leaves rows without keys and keys without rows."""
    q, k = q_len // 3, k_len // 2
    return {
        "full": AttentionMask(q_len, k_len, [(0, q_len, 0, k_len)]),
        "causal to the end": AttentionMask(q_len, k_len, [(0, q_len, 0, k_len, None, k_len - q_len)]),
        "documents": AttentionMask(q_len, k_len, [(0, q, 0, k), (q, q_len, k, k_len)]),
        "some": AttentionMask(q_len, k_len, [(q, q_len, k_len // 4, k + 1, -2, 9)]),
    }


def exchanged(cp, x, mask, kernel="naive") -> tuple[dict[str, torch.Tensor], list[int]]:
    """out and gradients of this rank's rows, and the bytes it sent forward and backward."""
    q, dout = (cp.shard(t, 1).detach() for t in (x[0], x[3]))
    k, v = (cp.keys.shard(t, 1).detach().requires_grad_() for t in x[1:3])
    collectives.reset_bytes()
    out = lcab.attention(q.requires_grad_(), k, v, mask, kernel=kernel, cp=cp)
    sent = [sum(collectives.bytes_sent().values())]
    collectives.reset_bytes()
    out.backward(dout)
    sent.append(sum(collectives.bytes_sent().values()))
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}, sent


def own(cp, want: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's part of a whole answer."""
    return {
        name: (cp.keys if name in ("dk", "dv") else cp).shard(t, 2 if name == "lse" else 1)
        for name, t in want.items()
    }


def closed_forms(cp, x, mask) -> list[int]:
    (b, _, heads, dim), kv_heads, bits = x[0].shape, x[1].shape[2], x[0].element_size()
    call = cp_volume.Call(b, heads, kv_heads, dim, x[2].shape[3], bits, max(bits, 4))
    given = cp.strategy, cp.degrees, cp.layout, mask, call, cp.rank
    return [cp_volume.sent_bytes(*given, backward, cp.keys.layout) for backward in (False, True)]


def with_sinks(cp, x, mask) -> dict[str, torch.Tensor]:
    """out, lse and gradients, the sinks' too, over the group or (None) on one process."""
    q, k, v, dout = (t.detach().clone() for t in x)
    if cp is not None:
        q, k, v, dout = cp.shard(q), cp.keys.shard(k), cp.keys.shard(v), cp.shard(dout)
    sink = torch.linspace(-1, 2, q.shape[2], dtype=q.dtype)
    leaves = [t.requires_grad_() for t in (q, k, v, sink)]
    out, lse = lcab.attention(*leaves[:3], mask, kernel="naive", cp=cp, sink=sink, return_lse=True)
    out.backward(dout)
    got = {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    dsink = sink.grad if cp is None else collectives.all_reduce_sum(sink.grad)
    return got | {"dsink": dsink}


def conformance(rank: int, world: int, each: int) -> None:
    """Every ``each``-th group in turn under every layout and lengths."""
    groups = [c.group() for composed in compositions(world).values() for c in composed]
    for number, ((a, (q_len, k_len)), (b, layout)) in enumerate(
        itertools.product(enumerate(LENGTHS), enumerate(LAYOUTS))
    ):
        name, mask = list(cross_masks(q_len, k_len).items())[(a + b) % 4]
        heads = HEADS[(3 * a + b) % 4]
        x = list(inputs(q_len, k_len, *heads, 8, torch.float64, value_dim=12, seed=number))
        want, sinks = reference(*x, mask), with_sinks(None, x, mask)
        for group in groups[number % each :: each]:
            if not fits(*heads, group.degrees.get("ulysses", 1)):
                continue
            cell = (q_len, k_len), name, heads, layout, group.composition
            cp = group.with_layout(layout, mask=mask)
            assert torch.equal(x[1][:, cp.keys.positions()], cp.keys.shard(x[1]))
            got, sent = exchanged(cp, x, mask)
            assert max(errors(got, own(cp, {t: want[t] for t in got})).values()) < 1e-12, cell
            assert sent == closed_forms(cp, x, mask), cell
            assert errors({"dk": cp.keys.unshard(got["dk"])}, want)["dk"] < 1e-12, cell
            got = with_sinks(cp, x, mask)
            wrong = errors(got, own(cp, {t: sinks[t] for t in want}) | {"dsink": sinks["dsink"]})
            assert max(wrong.values()) < 1e-12, (cell, wrong)


def in_bfloat16(rank: int, world: int) -> None:
    """Gradients of keys travel in float32, and results repeat to the bit."""
    mask = cross_masks(37, 61)["causal to the end"]
    x = inputs(37, 61, 8, 4, 32, torch.bfloat16)
    want = reference(*x, mask)
    for composed in compositions(world).values():
        cp = composed[-1].group().with_layout(mask=mask)
        got, sent = exchanged(cp, x, mask, "sdpa_flash")
        again, _ = exchanged(cp, x, mask, "sdpa_flash")
        assert all(torch.equal(got[t], again[t]) for t in got), cp.composition
        assert sent == closed_forms(cp, x, mask), cp.composition
        assert max(errors(got, own(cp, {t: want[t] for t in got})).values()) < 2**-7, cp.composition


def encoder_and_decoder(rank: int, world: int) -> None:
    """Layouts that each have from their own masks, put together for the attention between them."""
    source, target = masks.full_document((9, 30, 1)), masks.causal_document((25, 8))
    mask = AttentionMask(33, 40, [(0, 25, 0, 39), (25, 33, 39, 40)])
    x = inputs(33, 40, 4, 2, 8, torch.float64)
    want = reference(*x, mask)
    for strategy in ("ulysses", "ring_p2p", "ring_all_gather", "group_cast"):
        group = lcab.context_parallel(strategy, layout="balanced")
        encoder, decoder = (group.with_layout(mask=m) for m in (source, target))
        cp = decoder.holding(decoder.layout, encoder.layout)
        assert (cp.layout, cp.keys.layout) == (decoder.layout, encoder.layout)
        got, sent = exchanged(cp, x, mask)
        assert sent == closed_forms(cp, x, mask)
        assert max(errors(got, own(cp, {t: want[t] for t in got})).values()) < 1e-12, strategy
        assert cp.holding(decoder.layout, encoder.layout) is cp


def bound_module(rank: int, world: int) -> None:
    """The drop-in module makes both layouts from the mask of the call."""
    mask = cross_masks(37, 61)["full"]
    x = inputs(37, 61, 4, 2, 8, torch.float32)
    group = lcab.context_parallel("ring_p2p")
    cp = group.with_layout(mask=mask)
    out = lcab.Attention(cp=group)(cp.shard(x[0]), cp.keys.shard(x[1]), cp.keys.shard(x[2]), mask)
    assert errors({"out": out}, {"out": cp.shard(reference(*x, mask)["out"])})["out"] < 1e-5


def refused(rank: int, world: int) -> None:
    def expect(message: str, call, *args) -> None:
        with pytest.raises(lcab.LcabError, match=message):
            call(*args)
        collectives.barrier()

    mask, square = cross_masks(40, 64)["full"], masks.full(40)
    group = lcab.context_parallel("ring_p2p")
    cp, itself = group.with_layout(mask=mask), group.with_layout(mask=square)
    assert itself.keys is itself
    q, k, v, _ = inputs(40, 64, 4, 2, 8, torch.float32)
    expect("has 64 tokens, the layout 40.* keys and values with cp.keys.shard", cp.shard, k)
    expect("has 40 tokens, the layout 64.* shard queries with cp.shard", cp.keys.shard, q)
    part, keys, values = cp.shard(q), cp.keys.shard(k), cp.keys.shard(v)
    n, m = part.shape[1], keys.shape[1]
    expect(f"has {m} rows, this rank's shard {n}; .* cp.keys.unshard", cp.unshard, keys)
    shapes = (
        f"holds {n} of 40 queries and {m} of 64 keys, but q has {n} rows and k {n}; shard q with cp.shard"
    )
    expect(f"{shapes}.*k and v with cp.keys.shard", attended, cp, part, part[:, :, :2], part[:, :, :2], mask)
    lengths = "the mask is for 40 queries and 64 keys, the layout for 40 and 40; use cp.with_layout"
    expect(lengths, attended, itself, part, keys, values, mask)
    lengths = "the mask is for 40 queries and 40 keys, the layout for 40 and 64; use cp.with_layout"
    expect(lengths, attended, cp, part, keys, values, square)
    expect("a layout for 3 ranks, in a group of 2", group.holding, cp.layout, layouts.make("zigzag", 3, 64))
    other = cp if rank else cp.holding(cp.layout, layouts.make("striped", world, 64))
    fresh = lcab.context_parallel("ring_p2p").holding(other.layout, other.keys.layout)
    moved = fresh.shard(q), fresh.keys.shard(k), fresh.keys.shard(v)
    expect("ranks disagree on the attention call", attended, fresh, *moved, mask)


def attended(cp, q, k, v, mask):
    return lcab.attention(q, k, v, mask, kernel="naive", cp=cp)


def two(rank: int, world: int) -> None:
    conformance(rank, world, 3)
    in_bfloat16(rank, world)
    encoder_and_decoder(rank, world)
    bound_module(rank, world)
    refused(rank, world)


def four(rank: int, world: int) -> None:
    conformance(rank, world, 3)
    in_bfloat16(rank, world)


def every(rank: int, world: int) -> None:
    conformance(rank, world, 1)
    encoder_and_decoder(rank, world)


@pytest.mark.parametrize(
    ("checks", "world"),
    [(two, 2), (four, 4), *(pytest.param(every, n, marks=pytest.mark.nightly) for n in (2, 4))],
)
def test_on_processes(checks, world):
    run(checks, world)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_keys(layout):
    mask = cross_masks(37, 61)["documents"]
    keys = layouts.make_keys(layout, 4, mask)
    assert keys is layouts.make("striped" if layout == "balanced" else layout, 4, 61)
    square = masks.causal(37)
    assert layouts.make_keys(layout, 4, square) is layouts.make(layout, 4, 37, square)
    queries = layouts.make(layout, 4, 37, mask)
    view = View(mask, queries, (1,), (2, 3), keys)
    rows, columns = queries.positions(1), torch.cat([keys.positions(2), keys.positions(3)]).sort().values
    assert torch.equal(view.local().to_dense(), mask.to_dense()[rows][:, columns])
