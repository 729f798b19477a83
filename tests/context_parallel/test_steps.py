"""Steps of training over a context-parallel group are one process's: every loss, gradient and parameter.

Under activation checkpointing, over micro-batches, in groups beside each other, with another mask every step;
and they repeat bit by bit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from cases import inputs
from cp_cells import Composition, attend, compositions, masks_of
from distributed import run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.context_parallel import collectives
from lcab_plugin.layout import LAYOUTS
from lcab_plugin.masks import AttentionMask

HEADS, KV_HEADS, DIM, VOCABULARY = 8, 4, 8, 32


class Batch(NamedTuple):
    """One micro-batch: two rows of ``n`` tokens drawn from ``n``, under one mask."""

    mask: str
    n: int
    layout: str

    @property
    def tokens(self) -> Tensor:
        """Int64 ``[2, n + 1]``: inputs, and labels one to the right."""
        return torch.randint(VOCABULARY, (2, self.n + 1), generator=torch.Generator().manual_seed(self.n))


KINDS = (
    "causal_document",
    "islands",
    "prefix_lm_document",
    "sliding_window",
    "global_sliding_window",
    "share_question",
    "causal",
    "block_causal_document",
)
BATCHES = [
    Batch(mask, 96 + 3 * i, layout)
    for i, (mask, layout) in enumerate(zip(KINDS, itertools.cycle(LAYOUTS), strict=False))
]
Run = Callable[..., Tensor]  # of a block


def plain(block: nn.Module, *args: object) -> Tensor:
    return block(*args)


def recomputed(block: nn.Module, *args: object) -> Tensor:
    return checkpoint(block, *args, use_reentrant=False)


def kept(block: nn.Module, *args: object) -> Tensor:
    return checkpoint(block, *args, use_reentrant=False, context_fn=lcab.keep_attention)


def reentrant_kept(block: nn.Module, *args: object) -> Tensor:
    return checkpoint(lcab.KeepAttention(block), *args, use_reentrant=True)


class Block(nn.Module):
    """Attention with rotary positions around projections; a second one of another mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = nn.Linear(HEADS * DIM, 32)

    def forward(
        self, x: Tensor, positions: Tensor, mask: AttentionMask, cp: lcab.ContextParallel | None
    ) -> Tensor:
        for own in (mask, masks.sliding_window_causal(mask.q_len, 13)):
            q, k, v = self.qkv(x).unflatten(2, (-1, DIM)).split((HEADS, KV_HEADS, KV_HEADS), 2)
            q, k = (rotated(t, positions) for t in (q, k))
            x = x + self.out(lcab.attention(q, k, v, own, cp=cp).flatten(2)).tanh()
        return x


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE at these global positions."""
    angle = positions[:, None, None] * 10.0 ** -torch.arange(DIM // 2, dtype=x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


class Model(nn.Module):
    """Next-token prediction in float64, the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, VOCABULARY)
        self.double()

    def losses(self, batch: Batch, group: lcab.ContextParallel | None = None, how: Run = plain) -> Tensor:
        """Of this rank's tokens, ``[2, tokens]``."""
        mask = masks_of(batch.n)[batch.mask]
        tokens, positions, cp = batch.tokens, torch.arange(batch.n), None
        given, labels = tokens[:, :-1], tokens[:, 1:]
        if group is not None:
            cp = group.with_layout(batch.layout, mask=mask)
            given, labels, positions = cp.shard(given), cp.shard(labels), cp.positions()
        x = self.embed(given)
        for block in self.blocks:
            x = how(block, x, positions, mask, cp)
        return nn.functional.cross_entropy(self.head(x).mT, labels, reduction="none")

    def take_gradients(self) -> list[Tensor]:
        found = [p.grad for p in self.parameters()]
        self.zero_grad(set_to_none=True)
        return found


@cache
def model() -> Model:
    return Model()


@lru_cache(maxsize=32)
def alone(batches: tuple[Batch, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """What one process finds: the losses of every batch, and the gradients of their mean over all tokens."""
    losses = [model().losses(batch) for batch in batches]
    (sum(x.sum() for x in losses) / tokens(batches)).backward()
    return [x.detach() for x in losses], model().take_gradients()


def tokens(batches: Iterable[Batch]) -> int:
    return sum(2 * batch.n for batch in batches)


def summed(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Over all ranks, in one all-reduce."""
    flat = torch.cat([x.flatten() for x in gradients])
    dist.all_reduce(flat)
    return [x.view_as(y) for x, y in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor], what: object) -> None:
    """Tensor by tensor and in their norm, to what float64 rounds."""
    for a, b in zip(got, want, strict=True):
        off = (a - b).abs().max().item() / b.abs().max().clamp_min(1e-3).item()
        assert off < 1e-10, (what, tuple(a.shape), off)
    norms = [torch.cat([x.flatten() for x in side]).norm().item() for side in (got, want)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12), what


@cache
def groups(world: int) -> dict[Composition, lcab.ContextParallel]:
    """One of every strategy, with as many axes as the world has room for."""
    chosen = {name: max(composed, key=axes_in_use) for name, composed in compositions(world).items()}
    return {c: c.group() for c in chosen.values()}


def axes_in_use(c: Composition) -> tuple[int, str]:
    return sum(d > 1 for d in (c.ulysses, c.inner, c.outer)), str(c)


def shards_make_the_whole(rank: int, world: int) -> None:
    """The union of the ranks' losses is one process's, token by token, for every strategy and layout."""
    for (composition, group), layout in itertools.product(groups(world).items(), LAYOUTS):
        batch = BATCHES[len(layout) % len(BATCHES)]._replace(layout=layout)
        with torch.no_grad():
            own = model().losses(batch, group)
        want = alone((batch,))[0][0]
        cp = group.with_layout(layout, mask=masks_of(batch.n)[batch.mask])
        assert_equal([own], [want[:, cp.positions()]], (composition, layout))
        total = own.sum()
        dist.all_reduce(total)
        assert total.item() == pytest.approx(want.sum().item(), rel=1e-12)


def checkpointed(rank: int, world: int) -> None:
    """Recomputed or kept, gradients are bit by bit those without; what is kept is not sent again."""
    for (composition, group), batch in zip(groups(world).items(), itertools.cycle(BATCHES), strict=False):
        found, sent = {}, {}
        for how in (plain, recomputed, kept, reentrant_kept):
            collectives.reset_bytes()
            (model().losses(batch, group, how).sum() / tokens([batch])).backward()
            sent[how] = collectives.bytes_sent()
            found[how] = model().take_gradients()
        assert_equal(summed(found[plain]), alone((batch,))[1], (composition, batch))
        for how, gradients in found.items():
            assert all(map(torch.equal, gradients, found[plain])), (composition, how)
        assert sent[kept] == sent[reentrant_kept] == sent[plain], composition
        assert sum(sent[recomputed].values()) > sum(sent[plain].values()), composition


def accumulated(rank: int, world: int) -> None:
    """Micro-batches of other masks, lengths and layouts add up to the whole batch's gradient: backward after
    each, and all forwards first with backwards in another order."""
    batches = tuple(BATCHES[:3])
    for composition, group in groups(world).items():
        for how in (plain, kept):
            for batch in batches:
                (model().losses(batch, group, how).sum() / tokens(batches)).backward()
            assert_equal(summed(model().take_gradients()), alone(batches)[1], (composition, how))
            waiting = [model().losses(batch, group, how).sum() / tokens(batches) for batch in batches]
            for i in (1, 2, 0):
                waiting[i].backward()
            assert_equal(summed(model().take_gradients()), alone(batches)[1], (composition, how))


def a_mask_every_step(rank: int, world: int) -> None:
    """The parameters of one process after every step of SGD, with the same groups throughout."""
    start = {name: p.clone() for name, p in Model().state_dict().items()}
    for composition, group in groups(world).items():
        one, many = Model(), Model()
        one.load_state_dict(start)
        many.load_state_dict(start)
        for batch in BATCHES[3:]:
            for trained, over in ((one, None), (many, group)):
                (trained.losses(batch, over).sum() / tokens([batch])).backward()
                gradients = trained.take_gradients()
                with torch.no_grad():
                    for p, g in zip(
                        trained.parameters(), summed(gradients) if over else gradients, strict=True
                    ):
                        p -= 0.5 * g
            assert_equal([*many.state_dict().values()], [*one.state_dict().values()], (composition, batch))


def side_by_side(rank: int, world: int) -> None:
    """Groups beside each other (data parallel), each with its own mask, length and layout: neighbours, and
    ranks taken in turn."""
    for size in (d for d in range(2, world) if world % d == 0):
        count = world // size
        cut = [list(range(i * size, (i + 1) * size)) for i in range(count)]
        dealt = [list(range(i, world, count)) for i in range(count)]
        for members in (cut, dealt):
            made = [dist.new_group(ranks) for ranks in members]
            mine = next(i for i, ranks in enumerate(members) if rank in ranks)
            chosen = [max(composed, key=axes_in_use) for composed in compositions(size).values()]
            for j, composition in enumerate(chosen):
                batches = tuple(BATCHES[(i + j) % len(BATCHES)] for i in range(count))
                group = composition.group(made[mine])
                assert (group.size, group.rank) == (size, members[mine].index(rank))
                for how in (plain, recomputed):
                    (model().losses(batches[mine], group, how).sum() / tokens(batches)).backward()
                    got = summed(model().take_gradients())
                    assert_equal(got, alone(batches)[1], (composition, members, batches, how))


def repeated(rank: int, world: int) -> dict[str, str]:
    """A digest of out, lse and gradients in float32 and bfloat16 for every strategy; the same twice."""
    found = {}
    for (composition, group), dtype in itertools.product(
        groups(world).items(), (torch.float32, torch.bfloat16)
    ):
        digest = [hashlib.blake2b(), hashlib.blake2b()]
        for batch in BATCHES:
            mask = masks_of(batch.n)[batch.mask]
            x = inputs(batch.n, batch.n, HEADS, KV_HEADS, 16, dtype)
            cp = group.with_layout(batch.layout, mask=mask)
            for seen in digest:
                for t in attend(cp, x, mask, "sdpa_flash").values():
                    seen.update(t.detach().float().contiguous().numpy().tobytes())
        assert digest[0].digest() == digest[1].digest(), (composition, dtype)
        found[f"{composition} {dtype}"] = digest[0].hexdigest()
    return found


def steps(rank: int, world: int) -> dict[str, str]:
    for check in (shards_make_the_whole, checkpointed, accumulated, a_mask_every_step, side_by_side):
        check(rank, world)
    return repeated(rank, world)


@pytest.mark.parametrize(
    "world", [4, pytest.param(2, marks=pytest.mark.nightly), pytest.param(8, marks=pytest.mark.nightly)]
)
def test_steps_are_one_process_s_and_repeat_bitwise(world):
    """Two launches: the second starts from nothing and finds the same bits."""
    first = run(steps, world)
    assert first == run(repeated, world)
    assert all(len(digests) == 2 * len(compositions(world)) for digests in first)
