"""What every rank of `lcab bench cp` does: strategies x layouts x masks x lengths x passes on one group.

The strategies of one mask, length and pass take turns (A B C A B C ...) with plain attention on one rank and
with their own kernel calls alone. Every repeat starts on all ranks together and counts for as long as its
slowest rank took, so that all ranks take the same decisions.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lcab_plugin import kernels, masks
from lcab_plugin import layout as layouts
from lcab_plugin.attention import attention
from lcab_plugin.bench import accuracy, cells, contenders, cp_volume, timing, trial
from lcab_plugin.bench.accuracy import Case
from lcab_plugin.bench.cells import Record
from lcab_plugin.bench.cp import SINGLE, Settings, degrees
from lcab_plugin.bench.cp_counts import MEMORY, Counts, Recorder
from lcab_plugin.bench.cp_ranks import RankLostError, SlowestRank, host, nodes, or_lost
from lcab_plugin.bench.settings import DTYPES
from lcab_plugin.bench.trial import Ending, Machine
from lcab_plugin.context_parallel import ContextParallel, collectives, context_parallel
from lcab_plugin.errors import LcabError
from lcab_plugin.kernels.contract import KernelOptions, accumulation_dtype
from lcab_plugin.training import machine, records
from lcab_plugin.training.records import RunLog

_NO_PEAK = "not measured: torch counts no allocations on the CPU"
_RESULTS = ("out", "dq", "dk", "dv")


def run(settings: Settings, device: torch.device, log: RunLog) -> list[Record]:
    """Measure on every rank of the process group; rank 0 writes each record to ``log`` once it is known.

    Returns every cell's record, on all ranks.

    Raises:
        RankLostError: this rank failed alone; the others wait for it in vain and must be ended.
    """
    return Bench(settings, device).run(log)


class Reference(Protocol):
    """The right results, or some of them."""

    @property
    def what(self) -> str:
        """What is compared, for a record."""

    def errors(self, **results: Tensor) -> dict[str, float]:
        """Of ``out``, ``dq``, ``dk``, ``dv`` of the whole sequence: largest difference over largest value."""


@dataclass
class Entry:
    """A strategy under a layout, or the single process (``cp`` None), among those of one mask and length.

    ``case``: this rank's shards under the global mask; None where this rank has nothing to do. ``attend``:
    the public call on them. ``ended``: why passes are not measured. ``sent``, ``memory``: of this rank, by
    pass.
    """

    strategy: str
    layout: str | None
    cp: ContextParallel | None = None
    case: Case | None = None
    attend: contenders.Attend | None = None
    ended: dict[str, Ending] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    recorder: Recorder | None = None

    @property
    def name(self) -> str:
        """Unique among the entries of a group."""
        return f"{self.strategy}/{self.layout}"

    def bound(self) -> contenders.Attend:
        """The public call, which was placed."""
        assert self.attend is not None
        return self.attend


class Bench:
    """One group of ranks."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.machine = settings, Machine(device)
        self.clock = SlowestRank(self.machine.clock, device)
        self.limits = timing.Limits(seconds=settings.cell_seconds)
        self.rank = collectives.rank()
        self.environment = records.environment(device)
        self.nodes = nodes(collectives.all_gather_object(host()))
        self.groups: dict[str, ContextParallel] = {}  # by strategy: process groups are made once

    def run(self, log: RunLog) -> list[Record]:
        """All cells; rank 0 writes each to ``log`` once it is known."""
        floor = timing.noise_of(self.machine.device, self.clock)
        settings = {"job": self.settings.job, **asdict(self.settings)}
        log.write("run", **self.environment, **floor.record(), settings=settings, limits=asdict(self.limits))
        log.write("next", at=str(floor))
        found = []
        for mask, seqlen in self.settings.groups:
            for record in self.group(mask, seqlen, log):
                log.write("cell", **record)
                found.append(record)
            if self.rank == 0:
                log.write("machine", after=f"{mask} {seqlen}", **machine.state(self.machine.device))
        return found

    def group(self, name: str, seqlen: int, log: RunLog) -> Iterator[Record]:
        """The cells of one mask and length."""
        settings = self.settings
        parameters = settings.parameters(name, seqlen)
        mask = masks.from_name(name, seqlen, **parameters)
        facts = self._facts(name, parameters, mask)
        entries = self._entries(facts, parameters)
        if not entries:
            return
        log.write("group", **facts)
        log.write("next", at=f"{name} {seqlen}, float64")
        whole = self._whole(mask)
        right = self._reference(whole)
        for entry in entries:
            called = f"{entry.strategy} {entry.layout}" if entry.layout else entry.strategy
            log.write("next", at=f"{name} {seqlen}, first calls of {called}")
            self._first_calls(entry, whole, right)
            for step in settings.passes:
                if step in entry.ended:
                    yield self._record(facts, entry, step, mask, right)
        for step in settings.passes:
            log.write("next", at=f"{name} {seqlen}, {step}, all strategies in turn")
            racing = [entry for entry in entries if step not in entry.ended]
            found = timing.measure(self._calls(racing, step), self.clock, self.limits)
            for entry in racing:
                record = self._record(facts, entry, step, mask, right)
                self._fill(record, entry, found)
                yield record
        entries.clear()
        self.machine.release()

    def _entries(self, facts: Record, parameters: dict[str, Any]) -> list[Entry]:
        """What is measured in turn under a mask, none where nothing is left to do."""
        return [Entry(strategy, layout) for strategy, layout in self.settings.rows(facts["mask"])]

    def _reference(self, whole: Case) -> Reference | None:
        """None on a rank that compares nothing."""
        return accuracy.sample(whole, self.settings.seed) if self.rank == 0 else None

    def _whole(self, mask: masks.AttentionMask) -> Case:
        """The same tensors on every rank."""
        shape, device = self.settings.shape, self.machine.device
        g = torch.Generator(device).manual_seed(self.settings.seed)
        sizes = [
            (shape.batch, mask.q_len, heads, shape.head_dim)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        ]
        dtype = DTYPES[shape.dtype]
        q, k, v, dout = (torch.randn(size, generator=g, device=device, dtype=dtype) for size in sizes)
        return Case(q, k, v, dout, mask, shape.head_dim**-0.5)

    def _first_calls(self, entry: Entry, whole: Case, right: Reference | None) -> None:
        """Whether it runs and is right, what it sends and holds, and its kernel calls."""
        for action in (
            lambda: self._place(entry, whole),
            lambda: self._refuse_dense(entry, whole),
            lambda: self._check(entry, right),
            lambda: self._count(entry),
        ):
            ending = self._agreed(action, self._alone(entry))
            if ending is not None:
                entry.case = entry.attend = entry.recorder = None
                entry.ended = dict.fromkeys(self.settings.passes, ending)
                self.machine.release()
                return

    def _alone(self, entry: Entry) -> bool:
        """Whether the ranks can go on from any exception in its first calls."""
        return entry.strategy == SINGLE

    def _agreed(self, action: Callable[[], None], alone: bool) -> Ending | None:
        """Run it; the first rank's ending, where it raised what all ranks can go on from: anything, where
        ``alone``.

        Raises:
            RankLostError: it raised anything else.
        """
        ending: Ending | None = None
        try:
            action()
        except collectives.TransferError as error:
            raise RankLostError(f"{type(error).__name__}: {error}") from error
        except LcabError as error:
            ending = "unsupported", str(error).strip().splitlines()[0]
        except _CappedError as error:
            ending = "capped", str(error)
        except _WrongError as error:
            ending = "error", str(error)
        except Exception as error:
            if not alone:
                raise RankLostError(f"{type(error).__name__}: {error}") from error
            ending = trial.ending(error)
        endings = collectives.all_gather_object(ending)
        return next((found for found in endings if found is not None), None)

    def _place(self, entry: Entry, whole: Case) -> None:
        """Its group and layout, and this rank's shards."""
        if entry.strategy == SINGLE:
            if self.rank == 0:
                entry.case, entry.attend = whole, self._public(whole, None)
            return
        if entry.strategy not in self.groups:
            settings = self.settings
            axes = settings.ulysses, settings.inner_ring
            chosen: dict[str, Any] = {**degrees(entry.strategy, settings.world, *axes)}
            if chosen:
                chosen["placement"] = settings.placement
            self.groups[entry.strategy] = context_parallel(entry.strategy, **chosen)
        cp = self.groups[entry.strategy].with_layout(entry.layout, mask=whole.mask)
        entry.cp = cp
        q, k, v, dout = (cp.shard(x) for x in (whole.q, whole.k, whole.v, whole.dout))
        entry.case = Case(q, k, v, dout, whole.mask, whole.scale)
        entry.attend = self._public(entry.case, cp)

    def _public(self, case: Case, cp: ContextParallel | None) -> contenders.Attend:
        """What users call."""
        kernel = self.settings.kernel
        return lambda q, k, v: attention(q, k, v, case.mask, kernel=kernel, scale=case.scale, cp=cp)

    def _refuse_dense(self, entry: Entry, whole: Case) -> None:
        """A kernel that holds [q, k] does not start where that is more than there is."""
        found = contenders.find(self.settings.kernel)
        need = max(found.dense_bytes(whole, step) for step in self.settings.passes)
        if entry.strategy != SINGLE and self.machine.cuda:
            need //= self.settings.world
        self._require_room(need)

    def _require_room(self, need: float) -> None:
        """Raises _CappedError where these bytes are more than there is."""
        room = self.machine.room()
        if need > room:
            raise _CappedError(
                f"its [q, k] tensors need about {need / 2**30:.2g} GiB, {room / 2**30:.2g} GiB are free"
            )

    def _check(self, entry: Entry, right: Reference | None) -> None:
        """One call. Raises _WrongError where its results are: what is wrong has no speed."""
        case, cp = entry.case, entry.cp
        if case is None:
            return
        backward = self.settings.passes != ("fwd",)
        results = self._results(entry, case, backward)
        if cp is not None:
            results = [cp.unshard(x) for x in results]
        if right is None:
            return
        entry.errors = right.errors(**dict(zip(_RESULTS, results, strict=False)))
        worst = max(entry.errors, key=entry.errors.__getitem__)
        if not entry.errors[worst] <= accuracy.GROSS[case.q.dtype]:
            raise _WrongError(
                f"wrong result: {worst} is off by {entry.errors[worst]:.1e} of its largest value"
            )

    def _results(self, entry: Entry, case: Case, backward: bool) -> list[Tensor]:
        """out, and dq, dk and dv; of a strategy the kernel calls are kept."""
        q, k, v = leaves = [x.detach().requires_grad_(backward) for x in (case.q, case.k, case.v)]
        if entry.cp is None:
            out = entry.bound()(q, k, v)
        else:
            entry.recorder = Recorder(kernels.get(self.settings.kernel))
            recorder: Any = entry.recorder
            out = entry.cp.attend(q, k, v, case.mask, recorder, KernelOptions(case.scale), False)[0]
        return [out.detach(), *(torch.autograd.grad(out, leaves, case.dout) if backward else ())]

    @trial.collector_waits()
    def _count(self, entry: Entry) -> None:
        """Bytes sent and memory of a second call: the first also compared settings and compiled."""
        case = entry.case
        if case is None:
            return
        attend, counts = entry.bound(), Counts(self.machine)
        if self.settings.passes != ("fwd",):
            backward = counts.count("fwd", lambda: trial.call(attend, case, "bwd"))
            counts.count("bwd", backward)
            counts.join()
        counts.count("fwd", trial.call(attend, case, "fwd"))
        if entry.recorder is not None:
            counts.split(entry.recorder)
        entry.sent, entry.memory = counts.sent, counts.memory

    def _calls(self, racing: Sequence[Entry], step: str) -> dict[str, timing.Call]:
        """What takes turns: every entry, then the strategies' kernel calls."""
        calls: dict[str, timing.Call] = {}
        for entry in racing:
            calls[entry.name] = _idle
            if entry.case is not None:
                calls[entry.name] = or_lost(trial.call(entry.bound(), entry.case, step))
        for entry in racing:
            if entry.recorder is not None:
                calls[f"{entry.name} kernels"] = or_lost(partial(entry.recorder.again, step))
        gc.collect()
        return calls

    def _fill(self, record: Record, entry: Entry, found: dict[str, Any]) -> None:
        """The times and what follows from them."""
        result, shape, step = found[entry.name], self.settings.shape, record["pass"]
        ranks = 1 if entry.strategy == SINGLE else self.settings.world
        record |= result.record()
        pairs = record["area"] * shape.batch * shape.heads
        flops = cells.rates(step, result.median, pairs, shape.head_dim)["tflops"]
        record["tflops_per_rank"] = flops / ranks if flops is not None else None
        alone = found.get(f"{entry.name} kernels")
        if alone is not None:
            record |= {"kernels_ms": alone.median, "exposed_ms": result.median - alone.median}
        single = next((t for name, t in found.items() if name.startswith(f"{SINGLE}/")), None)
        if single is not None and entry.strategy != SINGLE:
            record["single_ms"] = single.median
            record["efficiency"] = single.median / (ranks * result.median)

    def _facts(self, name: str, parameters: dict[str, Any], mask: masks.AttentionMask) -> Record:
        """What all cells of a group share."""
        settings, shape = self.settings, self.settings.shape
        shown = {key: value for key, value in parameters.items() if key not in ("lengths", "prefixes")}
        if "lengths" in parameters:
            count = len(parameters["lengths"])
            shown |= {"documents": settings.documents, "seed": settings.seed, "count": count}
        same = {name: getattr(shape, name) for name in ("batch", "heads", "kv_heads", "head_dim", "dtype")}
        return {
            **dict.fromkeys(settings.fields),
            "schema": cells.SCHEMA,
            "mask": name,
            "parameters": shown,
            "digest": mask.digest,
            "area": mask.area,
            "fraction": mask.area / (mask.q_len * mask.k_len),
            "seqlen": mask.q_len,
            "world": settings.world,
            "nodes": self.nodes,
            "kernel": settings.kernel,
            "backend": "nccl" if self.machine.cuda else "gloo",
            "threads": torch.get_num_threads(),
            "hardware": self.environment["device"],
            **same,
            **{key: self.environment[key] for key in ("torch", "lcab_plugin", "git")},
        }

    def _record(
        self, facts: Record, entry: Entry, step: str, mask: masks.AttentionMask, right: Reference | None
    ) -> Record:
        """What is known but for the times; collective where the cell was measured."""
        status, reason = entry.ended.get(step, ("ok", None))
        cp = entry.cp
        record = {
            **facts,
            "strategy": entry.strategy,
            "degrees": cp.degrees if cp is not None else None,
            "placement": cp.placement if cp is not None else None,
            "layout": entry.layout,
            "pass": step,
            "status": status,
            "reason": reason,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if status != "ok":
            return record
        names = _RESULTS[:1] if step == "fwd" else _RESULTS
        record |= {f"error_{name}": entry.errors.get(name) for name in names}
        record["error_samples"] = right.what if right is not None else None
        counted = collectives.all_gather_object((entry.sent.get(step), entry.memory.get(step, {})))
        record["peak_memory_note"] = None if self.machine.cuda else _NO_PEAK
        for name in MEMORY:
            if name in record:
                record[name] = max((memory[name] for _, memory in counted if name in memory), default=None)
        if cp is not None and "sent_bytes" in record:
            record["sent_bytes"] = max(sent for sent, _ in counted)
            record["closed_form_bytes"] = self._closed_form(cp, mask, step)
            record["imbalance"] = layouts.imbalance(cp.layout, mask)
        return record

    def _closed_form(self, cp: ContextParallel, mask: masks.AttentionMask, step: str) -> int:
        """Of the rank that sends most, as ``sent_bytes`` is."""
        shape, dtype = self.settings.shape, DTYPES[self.settings.shape.dtype]
        sizes = dtype.itemsize, accumulation_dtype(dtype).itemsize
        call = cp_volume.Call(
            shape.batch, shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim, *sizes
        )
        return max(
            sum(
                cp_volume.sent_bytes(cp.strategy, cp.degrees, cp.layout, mask, call, rank, part == "bwd")
                for part in step.split("+")
            )
            for rank in range(cp.size)
        )


class _WrongError(Exception):
    """A result too far from float64's."""


class _CappedError(Exception):
    """More memory than there is."""


def _idle() -> None:
    pass
