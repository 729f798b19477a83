"""What must fit in a device: bytes of a rank by what they are for."""

from __future__ import annotations

import math

from lcab_plugin.context_parallel.group_cast import SHARDS
from lcab_plugin.planner.shape import Cluster, Model
from lcab_plugin.planner.traffic import SUM_ITEMSIZE, Span, block_bytes

# Not ours to give: the driver's context, libraries' workspaces, and what an allocator cannot use.
RESERVED, USABLE = 1.5e9, 0.95
LOGITS_AT_ONCE = 1 << 28  # elements, as examples/train_gpt.py cuts them


def model_states(model: Model, cluster: Cluster) -> float:
    """Weights, gradients and Adam's state: 2 + 2 + 12 bytes a parameter in 16 bits (4 + 4 + 8 in float32),
    sharded from the ZeRO stage that says so; stage 3 gathers the weights of two layers at a time."""
    e, world = model.itemsize, cluster.world
    states = 12 if e == 2 else 8
    sharded = [world if cluster.zero >= stage else 1 for stage in (3, 2, 1)]
    held = model.parameters * sum(x / n for x, n in zip((e, e, states), sharded, strict=True))
    gathered = 2 * max(model.layer_parameters, model.vocab * model.hidden) * e if cluster.zero == 3 else 0
    return held + min(gathered, model.parameters * e)


def activations(model: Model, cluster: Cluster, tokens: int) -> float:
    """Kept for the backward of all layers. A layer keeps its input, two norms' outputs and the residual
    between (4 hidden), q, k and v before and after RoPE but v once (2 heads, 3 kv_heads), out and lse, and
    gate, up, activation and product (4 ffn)."""
    e, d = model.itemsize, model.head_dim
    attention = (2 * model.heads + 3 * model.kv_heads) * d * e + model.heads * (d * e + 4)
    layer = tokens * (4 * model.hidden * e + attention + 4 * model.ffn * e)
    if cluster.checkpointing == "none":
        return model.layers * layer
    kept = model.hidden * e
    if cluster.checkpointing == "keep_attention":
        kept += model.heads * (d * e + 4)
    return model.layers * tokens * kept + layer


def kept_by_ulysses(model: Model, cluster: Cluster, tokens: int, ulysses: int) -> float:
    """What ``keep_attention`` keeps besides under Ulysses: q, k and v as the all-to-all left them."""
    if ulysses == 1 or cluster.checkpointing != "keep_attention":
        return 0.0
    q = tokens * model.heads * model.head_dim * model.itemsize
    return model.layers * (q + block_bytes(model, tokens, ulysses)[0])


def attention(model: Model, tokens: int, ulysses: int) -> float:
    """Alive in the backward of one call: q, out, dout, dq and its float32 sum; k, v, dk, dv and sums."""
    q = tokens * model.heads * model.head_dim
    kv, sums = block_bytes(model, tokens, ulysses)
    return q * (4 * model.itemsize + SUM_ITEMSIZE) + 2 * kv + sums


def communication(
    strategy: str, axes: dict[str, Span], model: Model, tokens: int, cast: tuple[float, float]
) -> float:
    """Buffers of transfers alive at once (docs/context_parallel.md, Memory of a rank)."""
    ulysses = axes["ulysses"].size if "ulysses" in axes else 1
    kv, sums = block_bytes(model, tokens, ulysses)
    moved = 0.0
    if ulysses > 1:  # what is sent and what arrives, once
        moved += 2 * (tokens * model.heads * model.head_dim * model.itemsize + kv)
    rings = [span.size for name, span in axes.items() if name != "ulysses"]
    if math.prod(rings) == 1:
        return moved
    if strategy == "ring_all_gather":
        return moved + rings[0] * (kv + sums)
    if strategy == "group_cast":
        rows = min(cast[1], 2 * SHARDS * tokens)
        return moved + rows * (kv + sums) / (tokens * ulysses)
    return moved + 2 * (kv + sums) * sum(size > 1 for size in rings)


def logits(model: Model, tokens: int) -> float:
    """Of the part of the sequence whose loss is computed at once: in the model's dtype, in float32, and their
    gradient."""
    return min(tokens * model.vocab, LOGITS_AT_ONCE) * (model.itemsize + 8)
