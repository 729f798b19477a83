"""Seconds of a step and bytes of a rank for one candidate, by terms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lcab_plugin.context_parallel.group_cast import at_once
from lcab_plugin.masks import AttentionMask
from lcab_plugin.planner import memory, split, traffic
from lcab_plugin.planner.hardware import Hardware
from lcab_plugin.planner.shape import Cluster, Model
from lcab_plugin.planner.speeds import PASSES, Heads, Speed
from lcab_plugin.planner.split import Block
from lcab_plugin.planner.traffic import Sent, Span
from lcab_plugin.planner.work import Work

CAST_MERGES = {"fwd": 2, "bwd": 3}  # of group cast in two stages; in backward the own keys are two blocks


@dataclass(frozen=True)
class Call:
    """One attention call of one pass on the slowest rank, seconds: ``compute``, of it ``waiting`` for the
    imbalance (what it would take less if all ranks had the mean area), and communication that no kernel
    hides of the ``transfer`` there is, with what packing and merging take (``exposed``). ``sent``: bytes."""

    compute: float
    waiting: float
    exposed: float
    transfer: float
    sent: Sent


@dataclass(frozen=True)
class Setting:
    """What all candidates share."""

    mask: AttentionMask
    model: Model
    cluster: Cluster
    hardware: Hardware


@dataclass(frozen=True)
class Plan:
    """A way to compute attention over ``axes``, with ``kernel`` at ``speed`` on the slowest ``block``."""

    strategy: str
    axes: tuple[tuple[str, Span], ...]
    kernel: str
    speed: Speed
    block: Block

    @property
    def spans(self) -> dict[str, Span]:
        """By name, innermost first."""
        return dict(self.axes)

    @property
    def ulysses(self) -> int:
        """Its degree."""
        return self.spans["ulysses"].size if "ulysses" in self.spans else 1

    @property
    def cast(self) -> tuple[float, float]:
        """Rows that group cast sends and receives."""
        block = self.block
        return traffic.cast_rows(block.layout, block.mask) if self.strategy == "group_cast" else (0.0, 0.0)


def heads_of(model: Model, ulysses: int) -> Heads:
    """Of the rank that is dealt most."""
    q, kv = traffic.deal(model.heads, model.kv_heads, ulysses)
    most = [max(len(range(model.heads)[s]) for s in slices) for slices in (q, kv)]
    return Heads(1, most[0], most[1], model.head_dim, model.itemsize)


def call(plan: Plan, setting: Setting, step: str) -> Call:
    """One attention call of the slowest rank."""
    model, hardware, block = setting.model, setting.hardware, plan.block
    heads = heads_of(model, plan.ulysses)
    sent = traffic.sent(plan.strategy, plan.spans, model, block.rows, plan.cast, step == "bwd")
    compute, hidden_in = _compute(plan, setting, step, heads)
    exposed = transfer = 0.0
    if plan.ulysses > 1:
        exposed = transfer = plan.spans["ulysses"].all_to_all(sent.heads, hardware)
    rings = [span for name, span in plan.axes if name != "ulysses" and span.size > 1]
    if rings and plan.strategy == "ring_all_gather":
        shards = sent.keys + sent.gradients, rings[0].size - 1
        gathers = 2 if step == "bwd" else 1
        time = rings[0].gather(shards[0] / shards[1] / gathers, hardware) * gathers
        exposed, transfer = exposed + time, transfer + time
    elif rings and plan.strategy == "group_cast":
        cast = _cast_at_once if cast_at_once(plan, model) else _cast
        hidden, whole = cast(rings[0], sent, hidden_in, hardware)
        exposed, transfer = exposed + hidden, transfer + whole
    elif rings:
        kv, sums = traffic.block_bytes(model, block.rows, plan.ulysses)
        hidden, whole = _rings(rings, kv, sums if step == "bwd" else 0.0, hidden_in, hardware)
        exposed, transfer = exposed + hidden, transfer + whole
    exposed += _handled(plan, setting, step, hidden_in) / hardware.stream
    return Call(compute, compute * (1 - 1 / block.imbalance), exposed, transfer, sent)


def cast_at_once(plan: Plan, model: Model) -> bool:
    """Whether group cast awaits all keys and computes one block."""
    row = model.head_dim * model.itemsize
    return at_once(plan.cast[1] * 2 * model.kv_heads * row, plan.block.rows * model.heads * row)


def _handled(plan: Plan, setting: Setting, step: str, parts: _Parts) -> float:
    """Bytes that a rank reads and writes beside the kernels' own: heads packed for Ulysses once each way, and
    softmaxes merged (in backward gradients of the queries added up) in float32, block by block."""
    model, rows, e = setting.model, plan.block.rows, setting.model.itemsize
    moved = 0.0
    if plan.ulysses > 1:
        moved += packed(model, rows)
    merges = 0.0
    if plan.strategy == "group_cast" and not cast_at_once(plan, model):
        merges = CAST_MERGES[step]
    elif plan.strategy not in ("none", "ulysses", "ring_all_gather", "group_cast"):
        ranks = len(plan.block.layout.ranges) // len(plan.block.ranks)
        merges = (ranks - 1) * parts.busy
    if merges:
        each = e + 4 + 12 if step == "fwd" else e + 8  # its part in float32, and three passes; or one sum
        moved += rows * model.heads * (2 * (e + 4) + merges * each)  # into float32 once, and back
    return moved * model.head_dim


def packed(model: Model, rows: int) -> float:
    """Bytes, over head_dim, that Ulysses reads and writes to pack q, k, v and out once each way."""
    return 4 * model.itemsize * rows * (model.heads + model.kv_heads)


@dataclass(frozen=True)
class _Parts:
    """Seconds of the call on the own keys, of one on others', and the share of those that see anything."""

    own: float
    other: float
    busy: float


def _compute(plan: Plan, setting: Setting, step: str, heads: Heads) -> tuple[float, _Parts]:
    """Seconds of all calls, and what of them transfers hide behind."""
    dim, device, block = setting.model.head_dim, setting.hardware.device, plan.block
    ranks = len(block.layout.ranges) // len(block.ranks)
    seconds = plan.speed.seconds
    whole = plan.strategy == "group_cast" and cast_at_once(plan, setting.model)
    if ranks == 1 or whole or plan.strategy == "ring_all_gather":
        time = seconds(step, split.whole(plan.kernel, block, dim, device), heads)
        return time, _Parts(time, 0.0, 0.0)
    met = split.ring(plan.kernel, block, dim, device)
    own = seconds(step, met.own, heads)
    if plan.strategy == "group_cast":
        stages = _stages(met, ranks - 1)
        other = seconds(step, stages, heads)
        return own + 2 * other, _Parts(own, other, 1.0)
    other = seconds(step, met.other, heads)
    return own + (ranks - 1) * met.busy * other, _Parts(own, other, met.busy)


def _stages(met: split.Ring, peers: int) -> Work:
    """Of group cast: half of all that is not the own keys', in one call."""
    half = met.other.scaled(met.busy * peers / 2)
    return Work(**{**vars(half), "calls": met.other.calls, "rows": met.own.rows})


def _cast_at_once(span: Span, sent: Sent, parts: _Parts, hardware: Hardware) -> tuple[float, float]:
    """Nothing is hidden."""
    whole = span.all_to_all(sent.keys, hardware)
    whole += span.all_to_all(sent.gradients, hardware) if sent.gradients else 0.0
    return whole, whole


def _cast(span: Span, sent: Sent, parts: _Parts, hardware: Hardware) -> tuple[float, float]:
    """Two stages, the first behind the own keys, the second behind the first; in backward gradients go home
    meanwhile, the last behind half of the own keys."""
    keys = span.all_to_all(sent.keys, hardware) / 2
    home = span.all_to_all(sent.gradients, hardware) / 2 if sent.gradients else 0.0
    own = parts.own if not home else parts.own / 2
    exposed = max(0.0, keys - own) + max(0.0, keys + home - parts.other)
    if home:
        exposed += max(0.0, home - own)
    return exposed, 2 * (keys + home)


def _rings(
    rings: list[Span], kv: float, sums: float, parts: _Parts, hardware: Hardware
) -> tuple[float, float]:
    """(exposed, all) of a ring, or of one inside another. A block travels while one is computed; in backward
    the gradients of others' blocks follow a step behind, and their last hop nothing hides."""
    inner, *outer = rings
    n = inner.size
    hop = inner.hop(kv, hardware)
    home = inner.hop(sums, hardware) if sums else 0.0
    busy = parts.busy

    def behind_other(time: float) -> float:
        return busy * max(0.0, time - parts.other) + (1 - busy) * time

    def once(first: float) -> float:
        """Exposed in one round whose first block takes ``first`` seconds."""
        exposed = max(0.0, hop - first)
        if not sums:
            return exposed + (n - 2) * behind_other(hop)
        if n > 2:
            exposed += behind_other(hop) + (n - 3) * behind_other(hop + home) + behind_other(home)
        return exposed + home

    exposed, whole = once(parts.own), (n - 1) * (hop + home)
    if not outer:
        return exposed, whole
    rounds = outer[0].size
    far, far_home = outer[0].hop(kv, hardware), outer[0].hop(sums, hardware) if sums else 0.0
    later = once(busy * parts.other)
    round_time = n * busy * parts.other + later
    exposed += (rounds - 1) * (later + max(0.0, far + far_home - round_time)) + far_home
    return exposed, rounds * whole + (rounds - 1) * (far + far_home)


@lru_cache(maxsize=256)
def training(setting: Setting, tokens: int, micro_steps: int) -> dict[str, float]:
    """Seconds of a step outside attention: matrices on the longest shard, gradients and weights that no
    computation hides (left to the caller to hide), and Adam."""
    model, cluster, hardware = setting.model, setting.cluster, setting.hardware
    again = 0 if cluster.checkpointing == "none" else 1
    flops = 2 * tokens * ((3 + again) * model.layers * model.layer_parameters)
    flops += 2 * tokens * 3 * model.vocab * model.hidden
    linear = micro_steps * flops / (hardware.linear_share * hardware.peak_of(model.dtype))
    world, weights = cluster.world, model.parameters * model.itemsize
    near = min(world, cluster.gpus)
    span = Span(world, 1, near)
    once = span.gather(weights / world, hardware)
    passes = 2 if cluster.zero < 3 else 3 * micro_steps
    adam = model.parameters * 28 / (world if cluster.zero else 1) / hardware.stream
    return {"linear": linear, "parameters": passes * once if weights else 0.0, "optimizer": adam}


def terms(plan: Plan, setting: Setting, micro_steps: int) -> tuple[dict[str, float], dict[str, Call]]:
    """Seconds of a step by what takes them, and the attention call of each pass. ``parameters`` are the
    gradients and weights whose transfer all computation of the step does not hide."""
    cluster, layers = setting.cluster, setting.model.layers
    calls = {step: call(plan, setting, step) for step in PASSES}
    rest = training(setting, plan.block.rows, micro_steps)
    again = cluster.checkpointing == "block"
    times = {"fwd": (2 if again else 1) * layers * micro_steps, "bwd": layers * micro_steps}
    attention = sum(times[step] * (c.compute - c.waiting) for step, c in calls.items())
    waiting = sum(times[step] * c.waiting for step, c in calls.items())
    exposed = sum(times[step] * c.exposed for step, c in calls.items())
    parameters = max(0.0, rest["parameters"] - attention - rest["linear"])
    return {
        "attention": attention,
        "imbalance": waiting,
        "exposed": exposed,
        "linear": rest["linear"],
        "parameters": parameters,
        "optimizer": rest["optimizer"],
    }, calls


def footprint(plan: Plan, setting: Setting) -> dict[str, float]:
    """Bytes of a rank by what they are for."""
    model, cluster, tokens = setting.model, setting.cluster, plan.block.rows
    kept = memory.kept_by_ulysses(model, cluster, tokens, plan.ulysses)
    return {
        "states": memory.model_states(model, cluster),
        "activations": memory.activations(model, cluster, tokens) + kept,
        "attention": memory.attention(model, tokens, plan.ulysses),
        "communication": memory.communication(plan.strategy, plan.spans, model, tokens, plan.cast),
        "logits": memory.logits(model, tokens),
    }
