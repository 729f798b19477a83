"""The part that holds the planner's predictions beside what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lcab_plugin import kernels as kernel_table
from lcab_plugin import layout, masks, planner
from lcab_plugin.bench.cp import SINGLE
from lcab_plugin.context_parallel.topology import PLACEMENTS, axis_sizes
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask
from lcab_plugin.planner import predict, split, traffic
from lcab_plugin.planner.hardware import Hardware
from lcab_plugin.planner.shape import ITEMSIZE
from lcab_plugin.planner.speeds import Heads, Speed, assumed, table
from lcab_plugin.planner.work import work
from lcab_plugin.report import kernels, parallel, pictures, training
from lcab_plugin.report.section import Section, Text
from lcab_plugin.report.sources import Source, latest
from lcab_plugin.report.tables import Table, Value, value
from lcab_plugin.training.batch_mask import with_mask
from lcab_plugin.training.data import Batch
from lcab_plugin.training.schema import Record

GPUS = 8  # of a node, where a record does not say
_SHAPE = ("layers", "hidden", "ffn", "vocab", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Predicted:
    """One timing. ``who`` runs attention how, ``step``: a pass, or ``step`` of training; ``speed``: where the
    planner has the kernel's from; ``hardware`` that the device is taken as."""

    kind: str
    who: str
    mask: str
    seqlen: int
    world: int
    step: str
    measured_ms: float
    predicted_ms: float
    speed: str
    hardware: str

    @property
    def error(self) -> float:
        """Relative to what was measured; above 0 the prediction is the slower."""
        return self.predicted_ms / self.measured_ms - 1


class _LeftOutError(Exception):
    """Why a timing is not predicted, to follow a number of them."""


def section(cells: dict[str, list[Record]], runs: Iterable[Source]) -> Section | None:
    """Of measured ``cells`` of `lcab bench kernels` and `cp`, and of training ``runs``; None without any."""
    timed: list[tuple[Record, Callable[[Record], Predicted]]] = [
        *((r, _kernel) for r in latest(cells["kernels"], kernels.IDENTITY) if r["status"] == "ok"),
        *((r, _shared) for r in latest(cells["cp"], parallel.IDENTITY) if r["status"] == "ok"),
        *((row, _trained) for source in runs if (row := training.summary(source)) is not None),
    ]
    if not timed:
        return None
    found: list[Predicted] = []
    left: Counter[str] = Counter()
    for record, of in timed:
        try:
            found.append(of(record))
        except _LeftOutError as why:
            left[str(why)] += 1
        except (LcabError, ImportError) as error:
            left[f"that the planner refuses ({str(error).rstrip('.')})"] += 1
    made = Section("predictions", "Predictions against measurements")
    if found:
        made.blocks.append(
            Text(
                "What lcab plan predicts by the speeds that ship with it, beside what was measured; the "
                "error is relative to the measurement. Speeds were fitted to docs/results/2026-11-29-h200, "
                "an H100's of fa4 and sdpa_flash to 2026-11-23-h100: of these records this is no "
                f"test. Where a record does not say how many nodes there were, they are taken to have {GPUS} "
                "devices."
            )
        )
    if left:
        reasons = "; ".join(f"{count} {why}" for why, count in left.items())
        made.blocks.append(Text(f"{left.total()} of {len(timed)} timings are not predicted: {reasons}."))
    made.blocks += [_summary(found), _all(found)] if found else []
    return made


def _summary(found: Sequence[Predicted]) -> Table:
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for p in found:
        groups.setdefault((p.kind, p.who, p.step, p.speed), []).append(abs(p.error))
    rows = []
    for key, errors in sorted(groups.items()):
        middle, p90 = np.quantile(errors, (0.5, 0.9)).tolist()
        rows.append(
            [
                *map(value, key[:3]),
                value(len(errors)),
                *map(_percent, (middle, p90, max(errors))),
                value(key[3]),
            ]
        )
    columns = ["what", "attention", "pass", ">timings", ">median error", ">p90", ">largest", "speed"]
    return Table("predictions-errors", "How far off predictions are, without sign", columns, rows)


def _all(found: Sequence[Predicted]) -> Table:
    columns = ["what", "attention", "mask", ">tokens", ">ranks", "pass", ">measured ms", ">predicted ms"]
    columns += [">error", "speed", "hardware"]
    rows = [
        [
            *map(value, (p.kind, p.who, p.mask, p.seqlen, p.world, p.step, p.measured_ms, p.predicted_ms)),
            _percent(p.error, "+"),
            value(p.speed),
            value(p.hardware),
        ]
        for p in sorted(found, key=lambda p: -abs(p.error))
    ]
    caption = f"All {len(rows)} predictions, the farthest off first; errors are fractions in the CSV"
    return Table("predictions-all", caption, columns, rows, folded=True)


def _percent(error: float, sign: str = "") -> Value:
    return Value(error, f"{error:{sign}.1%}")


def _hardware(name: str) -> Hardware:
    """What the planner knows of a device. Processors' speeds it only assumes."""
    try:
        known = planner.find(name)
    except LcabError:
        known = None
    if known is None or known.device == "cpu":
        raise _LeftOutError(f"on {name}, whose speed the planner does not know")
    return known


def _speed(kernel: str, hardware: Hardware, dtype: str) -> Speed:
    if kernel not in kernel_table.names():
        raise _LeftOutError(f"of {kernel}, which is no kernel of the planner's")
    if dtype not in ITEMSIZE:
        raise _LeftOutError(f"in {dtype}, which the planner does not know")
    return table(hardware, dtype).get(kernel) or assumed(hardware, dtype)


def _mask(record: Record) -> AttentionMask:
    mask = pictures.rebuild(record)
    if mask is None:
        raise _LeftOutError("under a mask that the record's parameters do not make again")
    return mask


def _passes(record: Record) -> Iterator[str]:
    """What the planner knows by itself; both together are taken as their sum."""
    yield from record["pass"].split("+")


def _beside(
    kind: str, who: str, record: Record, seconds: float, speed: Speed, hardware: Hardware
) -> Predicted:
    where = record["mask"], record["seqlen"], record.get("world", 1), record["pass"]
    return Predicted(kind, who, *where, record["median_ms"], seconds * 1e3, speed.origin, hardware.name)


def _kernel(record: Record, kind: str = "kernel") -> Predicted:
    """One call on one device."""
    hardware = _hardware(record["hardware"])
    speed = _speed(record["kernel"], hardware, record["dtype"])
    done = work(record["kernel"], _mask(record), record["head_dim"], hardware.device)
    shape = {name: record[name] for name in ("batch", "heads", "kv_heads", "head_dim")}
    heads = Heads(**shape, itemsize=ITEMSIZE[record["dtype"]])
    seconds = sum(speed.seconds(step, done, heads) for step in _passes(record))
    return _beside(kind, record["kernel"], record, seconds, speed, hardware)


def _shared(record: Record) -> Predicted:
    """One call over the ranks of a sequence; the single process beside them is one device's."""
    if record["strategy"] == SINGLE:
        return _kernel({**record, "world": 1}, "single")
    hardware = _hardware(record["hardware"])
    speed = _speed(record["kernel"], hardware, record["dtype"])
    if record["batch"] > 1:
        raise _LeftOutError("of context parallelism with a batch above 1")
    if not record.get("degrees") or not record.get("layout"):
        raise _LeftOutError("of context parallelism whose record has no degrees or layout")
    mask, degrees, world = _mask(record), dict(record["degrees"]), record["world"]
    if "outer_ring" in degrees:  # sizes of axes, and the planner takes the whole ring
        degrees["ring"] = degrees.pop("outer_ring") * degrees["inner_ring"]
    placement = record.get("placement") or PLACEMENTS[0]
    shape = {name: record[name] for name in ("heads", "kv_heads", "head_dim", "dtype")}
    model = planner.Model(layers=1, hidden=0, ffn=0, vocab=0, **shape)
    cluster = _cluster(world, record.get("nodes"))
    setting = planner.setting(mask, model, cluster, hardware)
    dealt = layout.make(record["layout"], world, record["seqlen"], mask)
    block = split.block(dealt, mask, degrees.get("ulysses", 1), placement)
    axes = tuple(traffic.spans(degrees, placement, cluster.gpus).items())
    plan = predict.Plan(record["strategy"], axes, record["kernel"], speed, block)
    calls = [predict.call(plan, setting, step) for step in _passes(record)]
    seconds = sum(call.compute + call.exposed for call in calls)
    return _beside("cp", f"{record['kernel']} {parallel.label(record)}", record, seconds, speed, hardware)


def _cluster(world: int, nodes: int | None = None) -> planner.Cluster:
    """That many nodes; if unknown whole ones, or one that is not full."""
    if nodes:
        return planner.Cluster(nodes, world // nodes)
    return planner.Cluster(world // GPUS, GPUS) if world % GPUS == 0 else planner.Cluster(1, world)


def _trained(row: Record) -> Predicted:
    """A step of training; ``row``: a run's summary."""
    run, attention = row["run"], row["run"]["attention"]
    hardware = _hardware(run["device"])
    _speed(attention["kernel"], hardware, run["dtype"])
    if any((run.get(axis) or 1) > 1 for axis in ("tp", "pp")):
        raise _LeftOutError("of training with tensor or pipeline parallelism")
    try:
        shape = {name: run["model"][name] for name in _SHAPE}
        cp, degrees = run["cp"], run["degrees"]
    except KeyError as error:
        raise _LeftOutError(f"of training whose record has no {error.args[0]}") from None
    cluster = replace(
        _cluster(run["world"]),
        batch=run["global_batch"],
        zero=run.get("zero_stage") or int(run.get("optimizer_shards", 1) > 1),
        checkpointing=_checkpointing(run),
    )
    model = planner.Model(**shape, dtype=run["dtype"])
    setting = planner.setting(_batch_mask(run), model, cluster, hardware)
    kernel, strategy, dealt = ((attention[name],) for name in ("kernel", "strategy", "layout"))
    choice = planner.Choice(kernel, strategy, dealt, cp=(cp,), trivial=True)
    placement = PLACEMENTS[0] if degrees.get("ulysses", 1) == 1 else attention.get("placement", PLACEMENTS[0])
    for found in planner.rank(setting, choice):
        c = found.candidate
        same = cp == 1 or axis_sizes(dict(c.degrees), c.placement) == degrees
        if found.terms and same and c.placement == placement:
            where = attention["mask"], run["seqlen"], run["world"], "step"
            who, times = row["label"], (row["step_ms"], found.seconds * 1e3)
            return Predicted("training", who, *where, *times, found.speed, hardware.name)
    raise _LeftOutError("of training that the planner says cannot run")


def _checkpointing(run: Record) -> str:
    """Of activations: a field of Megatron's runs, in the command of DeepSpeed's."""
    if run.get("recompute") == "selective":
        raise _LeftOutError("of training that recomputes attention alone")
    if run.get("keep_attention") or "--keep-attention" in run["command"]:
        return "keep_attention"
    whole = run.get("recompute") == "full" or "--activation-checkpointing" in run["command"]
    return "block" if whole else "none"


def _batch_mask(run: Record) -> AttentionMask:
    """Of one sequence of the run; lengths of documents are sampled anew."""
    family, n, documents = run["attention"]["mask"], run["seqlen"], str(run.get("doc_lengths"))
    known = documents in masks.distributions()
    if masks.needs_lengths(family) and not known:
        raise _LeftOutError("of training whose documents' lengths are not in its record")
    lengths = masks.sample_lengths(n, documents, run.get("seed") or 0) if known else [n]
    row = torch.zeros(1, 1, dtype=torch.int64).expand(1, n)
    batch = Batch(row, row, row.bool(), row, (np.asarray(lengths, dtype=np.int64),), {})
    return with_mask(batch, family)[1]
