"""Activation checkpointing that keeps attention: the same gradients, and attention computed once."""

from __future__ import annotations

import pytest
import torch
from cases import inputs
from distributed import run as run_processes
from torch.utils.checkpoint import checkpoint

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.context_parallel import collectives
from lcab_plugin.kernels import get

MASK = masks.causal_document([20, 30, 14])


class Block(torch.nn.Module):
    """Two attentions of different masks around projections, as a block of a model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96, dtype=torch.float64)
        self.out = torch.nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, x):
        for mask in (MASK, masks.causal(64)):
            q, k, v = self.qkv(x).unflatten(2, (12, 8)).chunk(3, dim=2)
            x = x + self.out(lcab.attention(q, k, v, mask, kernel="sdpa_flash").flatten(2))
        return x


@pytest.fixture
def forwards(monkeypatch):
    """How often the kernel's forward ran."""
    kernel, ran = get("sdpa_flash"), []
    forward = type(kernel).forward
    monkeypatch.setattr(type(kernel), "forward", lambda self, *a: ran.append(1) or forward(self, *a))
    return ran


def plain(block, x):
    return block(x)


def torch_kept(block, x):
    return checkpoint(block, x, use_reentrant=False, context_fn=lcab.keep_attention)


def torch_recomputed(block, x):
    return checkpoint(block, x, use_reentrant=False)


def reentrant_kept(block, x):
    return checkpoint(lcab.KeepAttention(block), x, use_reentrant=True)


def gradients(run, blocks, x):
    x = x.clone().requires_grad_()
    y = x
    for block in blocks:
        y = run(block, y)
    wanted = [x, *(p for block in blocks for p in block.parameters())]
    y.square().sum().backward()
    found = [p.grad.clone() for p in wanted]
    for p in wanted:
        p.grad = None
    return found


@pytest.mark.parametrize(
    ("run", "runs"), [(plain, 4), (torch_kept, 4), (reentrant_kept, 4), (torch_recomputed, 8)]
)
def test_the_same_gradients_and_attention_once(forwards, run, runs):
    torch.manual_seed(0)
    blocks, x = [Block(), Block()], torch.randn(2, 64, 32, dtype=torch.float64)
    want = gradients(plain, blocks, x)
    forwards.clear()
    for a, b in zip(gradients(run, blocks, x), want, strict=True):
        assert torch.equal(a, b)
    assert len(forwards) == runs


def test_micro_batches_in_any_order(forwards):
    """Several first passes before the first backward, and backward in the other order."""
    torch.manual_seed(0)
    block = Block()
    xs = [torch.randn(1, 64, 32, dtype=torch.float64) for _ in range(3)]
    want = [gradients(plain, [block], x) for x in xs]
    leaves = [x.clone().requires_grad_() for x in xs]
    losses = [torch_kept(block, x).square().sum() for x in leaves]
    forwards.clear()
    for i in (2, 0, 1):
        losses[i].backward()
        torch.testing.assert_close(leaves[i].grad, want[i][0], rtol=0, atol=0)
    assert not forwards


def test_a_second_backward_recomputes_again(forwards):
    block = Block()
    x = torch.randn(1, 64, 32, dtype=torch.float64, requires_grad=True)
    loss = torch_kept(block, x).square().sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    assert len(forwards) == 2


def test_an_output_changed_in_place_is_noticed():
    def careless(q):
        out = lcab.attention(q, q, q, MASK)
        with torch.no_grad():
            out += 1.0
        return out.square()

    q = torch.randn(1, 64, 2, 8, requires_grad=True)
    loss = checkpoint(careless, q, use_reentrant=False, context_fn=lcab.keep_attention).sum()
    with pytest.raises(lcab.LcabError, match="changed in place after the first pass"):
        loss.backward()


def test_a_recomputation_that_does_more_is_noticed():
    calls = []

    def growing(q):
        calls.append(1)
        for _ in calls:
            q = q + lcab.attention(q, q, q, MASK)
        return q.sin()

    q = torch.randn(1, 64, 2, 8, requires_grad=True)
    loss = checkpoint(growing, q, use_reentrant=False, context_fn=lcab.keep_attention).sum()
    with pytest.raises(
        (lcab.LcabError, RuntimeError), match=r"more often than the first|different number|Recomputed"
    ):
        loss.backward()


def test_outside_checkpointing_nothing_is_kept(forwards):
    q = torch.randn(1, 64, 2, 8)
    for _ in range(2):
        lcab.attention(q, q, q, MASK)
    assert len(forwards) == 2


def communicate(rank, world):
    """Bytes that a step of one checkpointed attention sends, under every strategy and way to recompute."""
    q, k, v, dout = inputs(96, 96, 4, 4, 8, torch.float64, batch=1)
    mask = masks.causal(96)
    found = {}
    for strategy in ("ulysses", "ring_p2p", "ring_all_gather", "group_cast"):
        cp = lcab.context_parallel(strategy, mask=mask)
        local = [cp.shard(x) for x in (q, k, v, dout)]

        def attend(q, k, v, cp=cp):
            return lcab.attention(q, k, v, mask, cp=cp).sin()

        lcab.attention(*local[:3], mask, cp=cp)  # the ranks compare their first call
        grads, sent = [], []
        for how in (None, {}, {"context_fn": lcab.keep_attention}):
            leaves = [x.clone().requires_grad_() for x in local[:3]]
            collectives.reset_bytes()
            out = attend(*leaves) if how is None else checkpoint(attend, *leaves, use_reentrant=False, **how)
            out.backward(local[3])
            sent.append(sum(collectives.bytes_sent().values()))
            grads.append([x.grad for x in leaves])
        for other in grads[1:]:
            assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
        found[strategy] = sent
    for strategy, (plain, recomputed, kept_bytes) in found.items():
        assert kept_bytes == plain < recomputed, (strategy, found[strategy])


def test_nothing_is_sent_twice():
    run_processes(communicate, 2)
