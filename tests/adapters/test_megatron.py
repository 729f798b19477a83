"""The plug-in in a real GPTModel's core-attention slot equals Megatron's own attention in one process: loss,
every gradient and the gradient norm of a first step, under every strategy and mask, on gloo."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("megatron.core")

from tests import distributed

BOUNDS = {"loss": 1e-6, "norm": 1e-5, "gradients": 5e-5}


def cells() -> list[Any]:
    """What four ranks run in one launch; ranks left over by the degrees repeat the same batch."""
    from lcab_plugin import masks
    from tests.adapters.megatron_model import LENGTH, Cell

    documents = masks.causal_document([13, 40, 11])
    prefix = masks.prefix_lm_causal(LENGTH, 21)
    question = masks.share_question([20, 30, 14])
    sinks = {"softmax_type": "learnable"}
    window = {"window_size": (9, 0), "window_attn_skip_freq": 2}
    ring, gather, ulysses = {"strategy": "ring_p2p"}, {"strategy": "ring_all_gather"}, {"strategy": "ulysses"}
    usp = {"strategy": "usp", "ulysses": 2, "ring": 2}
    double = {"strategy": "loongtrain", "ulysses": 1, "ring": 4, "inner_ring": 2}
    own = {"mask": "causal_document"}
    windowed = {
        "settings": {"window_size": (9, 0)},
        "want": masks.AttentionMask(
            LENGTH, LENGTH, [(a, b, a, b, -9, 0) for a, b in ((0, 13), (13, 53), (53, 64))]
        ),
        "want_settings": {},
    }
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    selective = {"recompute_granularity": "selective"}
    # head sizes of queries and keys 8 + 4, of values 8
    mla: dict[str, Any] = {
        "settings": {
            "multi_latent_attention": True,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 8,
            "rope_type": "rope",
        },
        "spec": {"multi_latent_attention": True},
    }
    mla_kernel = {"kernel": "sdpa_math"}
    return [
        Cell("causal"),
        Cell("math kernel", lcab={"kernel": "sdpa_math"}, how="provider"),
        Cell("documents", mask=documents, lcab=own),
        Cell("packed", mask="packed", batch=1),
        Cell("sinks", settings=sinks),
        Cell("off by one", settings={"softmax_type": "off-by-one"}),
        Cell("window", settings=window),
        Cell("given causal mask, cp 1", how="dense"),
        Cell("tp 2 sinks", 1, 2, settings=sinks),
        *(
            Cell(f"{s['strategy']} 4", 4, 1, s)
            for s in (ring, gather, ulysses, usp, double, {"strategy": "group_cast"})
        ),
        *(Cell(f"{s['strategy']} 2", 2, 1, s, how="provider") for s in (ring, gather, ulysses)),
        Cell("usp context_first", 4, 1, {**usp, "placement": "context_first"}),
        Cell("documents ring", 4, 1, {**ring, **own}, documents),
        Cell("documents usp", 4, 1, {**usp, **own}, documents),
        Cell("prefix ulysses", 4, 1, {**ulysses, "mask": "prefix_lm_causal"}, prefix),
        Cell("question group_cast", 4, 1, {"strategy": "group_cast", "mask": "share_question"}, question),
        Cell("one row", 4, 1, {**ring, **own}, documents, 1),
        Cell("one row thd", 4, 1, {**ring, **own}, documents, 1, qkv_format="thd"),
        *(
            Cell(f"packed {s['strategy']} 4", 4, 1, s, "packed", 1)
            for s in (ring, gather, ulysses, usp, double)
        ),
        *(Cell(f"packed {s['strategy']} 2", 2, 1, s, "packed", 1) for s in (ring, ulysses)),
        Cell("tp 2 cp 2 ring", 2, 2, ring),
        Cell("tp 2 cp 2 ulysses", 2, 2, ulysses, documents),
        Cell("tp 2 cp 2 packed", 2, 2, gather, "packed", 1),
        Cell("sinks ring", 4, 1, ring, settings=sinks),
        Cell("sinks usp", 4, 1, usp, settings=sinks),
        Cell("sinks tp 2 cp 2", 2, 2, ulysses, settings=sinks),
        Cell("off by one ring", 4, 1, ring, settings={"softmax_type": "off-by-one"}),
        Cell("window ring", 4, 1, ring, settings=window),
        Cell("window documents", 4, 1, {**ring, **own}, documents, **windowed),
        Cell("two alive, full recompute", 4, 1, {**ring, **own}, (documents, prefix), settings=full),
        Cell("two alive, kept", 4, 1, {**usp, **own}, (documents, prefix), settings=full, keep=True),
        Cell("selective recompute", 4, 1, {**gather, **own}, (documents, prefix), settings=selective),
        Cell("tp 2 cp 2 packed, full", 2, 2, ring, "packed", 1, settings=full),
        Cell("given causal mask", 4, 1, ring, how="dense"),
        Cell("MLA", 1, 1, mla_kernel, **mla),
        Cell("MLA ring", 4, 1, {**ring, **mla_kernel}, **mla),
        Cell("MLA packed ulysses", 4, 1, {**ulysses, **mla_kernel}, "packed", 1, **mla),
    ]


def work(rank: int, world: int) -> None:
    """Every cell, the references first: Megatron's groups are made once for each pair of
    degrees, as gloo's cost threads that stay."""
    from tests.adapters import megatron_model as model

    todo = [cell for cell in cells() if model.known(cell)]
    todo.sort(key=lambda cell: (cell.tp, cell.cp))
    model.start_megatron()
    wants = [model.reference(cell) for cell in todo]
    degrees, wrong = (1, 1), {}
    for cell, want in zip(todo, wants, strict=True):
        if degrees != (cell.tp, cell.cp):
            degrees = cell.tp, cell.cp
            model.start_megatron(*degrees)
        off = model.difference(model.run(cell), want)
        if any(not off[what] <= bound for what, bound in BOUNDS.items()):
            wrong[cell.name] = off
    assert not wrong, wrong


def kept(rank: int, world: int) -> None:
    """``keep_attention`` sends no more than a step without recomputation."""
    from lcab_plugin.context_parallel import collectives
    from tests.adapters import megatron_model as model

    ring = {"strategy": "ring_p2p"}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    sent = []
    for settings, keep in (({}, False), (full, False), (full, True)):
        collectives.reset_bytes()
        model.run(model.Cell("", 2, 2, ring, settings=settings, keep=keep))
        sent.append(sum(collectives.bytes_sent().values()))
    once, again, with_kept = sent
    assert once == with_kept < again


def everything(rank: int, world: int) -> None:
    work(rank, world)
    kept(rank, world)  # in the groups of the last cell, 2 x 2


def test_a_step_equals_megatrons_own_attention() -> None:
    distributed.run(everything, 4)
