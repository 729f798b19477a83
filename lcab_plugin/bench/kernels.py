"""Times kernels x masks x lengths x passes on one device, checks each against float64, and loses nothing.

What is timed is what a user's training step pays: ``fwd`` is the public call under ``torch.no_grad()``,
``bwd`` is autograd's gradient of q, k and v of a saved forward, ``fwd+bwd`` is both. The cells of one mask,
length and pass are measured in turn (see `timing`), so that their ratios hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lcab_plugin import masks
from lcab_plugin.bench import accuracy, cells, contenders, timing, trial
from lcab_plugin.bench.accuracy import Case, Sample
from lcab_plugin.bench.cells import Record
from lcab_plugin.bench.contenders import Contender
from lcab_plugin.bench.settings import DTYPES, Group, Settings
from lcab_plugin.bench.trial import Ending, Entry, Machine
from lcab_plugin.errors import LcabError
from lcab_plugin.training import machine, records
from lcab_plugin.training.records import RunLog

Found = dict[str, timing.Timing | Exception]

_NO_PEAK = "not measured: torch counts no allocations on the CPU"


def run(
    settings: Settings,
    log: RunLog,
    recorded: Iterable[Record] = (),
    watch: Callable[[str], None] = lambda text: None,
) -> Iterator[Record]:
    """Measure, yielding every cell's record once it is on disk.

    ``recorded``: cells of an earlier run, of which those that are settled are not measured again. ``watch``
    is told what comes next.

    Raises:
        LcabError: the device does not answer any more; what was measured is in the log.
    """
    known = list(recorded)
    settled = {cells.key(record) for record in known if cells.settled(record)}
    bench = _Bench(settings, known)
    log.write(
        "run", **bench.environment, **bench.noise, settings=asdict(settings), limits=asdict(bench.limits)
    )
    watch(str(bench.floor))
    for group in settings.groups:
        what = f"{group.label} {group.seqlen}"
        watch(what)
        for record in bench.group(group, settled):
            log.write("cell", **record)
            yield record
            if record["fatal"]:
                raise LcabError(
                    f"the device does not answer after {record['kernel']}, {what}, {record['pass']} "
                    f"({record['reason']}); --resume goes on without that cell."
                )
        log.write("machine", after=what, **machine.state(bench.machine.device))


class _Bench:
    """One device, and what was learnt on it so far."""

    def __init__(self, settings: Settings, known: Iterable[Record]) -> None:
        self.settings, self.machine = settings, Machine(settings.device)
        self.limits = timing.Limits(seconds=settings.cell_seconds)
        self.environment = records.environment(self.machine.device)
        self.floor = timing.noise_of(self.machine.device, self.machine.clock)
        self.noise = self.floor.record()
        shape = settings.shape
        self.same: Record = {
            **{name: getattr(shape, name) for name in ("batch", "heads", "kv_heads", "head_dim", "dtype")},
            "hardware": self.environment["device"],
        }
        self.longest: dict[tuple[str, str, str], Record] = {}  # of (kernel, mask, pass), measured so far
        self.causal: dict[tuple[str, int, str], float] = {}  # of (kernel, length, pass): ns per 1000 cells
        for record in known:
            if record["status"] == "ok" and self.same.items() <= record.items():
                self._remember(record)

    def group(self, group: Group, settled: set[tuple[Any, ...]]) -> Iterator[Record]:
        """The cells of one mask and length."""
        name, parameters = group.mask, self.settings.parameters(group)
        mask = masks.from_name(name, group.seqlen, **parameters)
        facts = self._facts(name, parameters, mask)
        entries, wanted = self._entries(facts, settled)
        case: Case | None = None
        sample: Sample | None = None
        try:
            if entries:
                case = self._case(mask)
                self._refuse(entries, name, case)
            if case is not None and any(entry.open() for entry in entries):
                sample = accuracy.sample(case, self.settings.seed)
        except Exception as error:
            for entry in entries:
                entry.end(entry.open(), trial.ending(error))
        for record in self._measure(entries, facts, case, sample):
            if (record["kernel"], record["pass"]) in wanted:
                yield record
        self.machine.release()

    def _measure(
        self, entries: list[Entry], facts: Record, case: Case | None, sample: Sample | None
    ) -> Iterator[Record]:
        """The cells that end before they are timed as they do, then those that are timed."""
        for entry in entries:
            if case is not None and sample is not None:
                trial.first_calls(entry, case, sample, self.machine)
            for step in entry.ended:
                yield self._record(facts, entry, step, case, sample)
        if case is None or sample is None:
            return
        for step in self.settings.steps:
            racing = [entry for entry in entries if step in entry.open()]
            found, host = self._race(racing, step, case)
            for entry in racing:
                record = self._record(facts, entry, step, case, sample)
                result = found.get(entry.contender.name)
                if isinstance(result, timing.Timing):
                    self._fill(record, result, found)
                    record["host_us"] = host.get(entry.contender.name)
                    self._remember(record)
                yield record

    def _entries(self, facts: Record, settled: set[tuple[Any, ...]]) -> tuple[list[Entry], set[Any]]:
        """What takes part, and the (kernel, pass) to record. A recorded baseline is measured again where
        another kernel is to be compared with it."""
        wanted = {
            (kernel, step)
            for kernel in self.settings.contenders
            for step in self.settings.steps
            if cells.key({**facts, "kernel": kernel, "pass": step}) not in settled
        }
        entries = []
        for kernel in self.settings.contenders:
            compared = {step for _, step in wanted} if kernel == self.settings.baseline else set()
            steps = [s for s in self.settings.steps if (kernel, s) in wanted or s in compared]
            if steps:
                entries.append(Entry(contenders.find(kernel), steps))
        return entries, wanted

    def _case(self, mask: masks.AttentionMask) -> Case:
        shape, device = self.settings.shape, self.machine.device
        g = torch.Generator(device).manual_seed(self.settings.seed)

        def draw(tokens: int, heads: int) -> Tensor:
            size = shape.batch, tokens, heads, shape.head_dim
            return torch.randn(size, generator=g, device=device, dtype=DTYPES[shape.dtype])

        q, k, v = (draw(mask.q_len, n) for n in (shape.heads, shape.kv_heads, shape.kv_heads))
        return Case(q, k, v, draw(mask.q_len, shape.heads), mask, shape.head_dim**-0.5)

    def _refuse(self, entries: list[Entry], mask: str, case: Case) -> None:
        """End the passes that are known not to run, or not to end in time."""
        for entry in entries:
            for step in entry.steps:
                reason = entry.contender.refuses(case, step != "fwd")
                refusal = (
                    ("unsupported", reason) if reason else self._too_much(entry.contender, mask, step, case)
                )
                if refusal:
                    entry.end([step], refusal)

    def _too_much(self, contender: Contender, mask: str, step: str, case: Case) -> Ending | None:
        """More memory than there is, or a single call longer than a cell may take."""
        settings, dense = self.settings, contender.dense_bytes(case, step)
        room = self.machine.room() if settings.dense_gib is None else settings.dense_gib * 2**30
        if dense > room:
            return "capped", (
                f"its [q, k] tensors need about {dense / 2**30:.2g} GiB, {room / 2**30:.2g} GiB are allowed; "
                "--dense-gib allows more"
            )
        before = self.longest.get((contender.name, mask, step))
        if before is None or before["seqlen"] >= case.mask.q_len:
            return None
        grown = (case.mask.q_len / before["seqlen"]) ** 2 if dense else case.mask.area / before["area"]
        expected = before["min_ms"] * grown * 1e-3
        if expected <= settings.cell_seconds:
            return None
        return "capped", (
            f"one call would take about {expected:.2g} s, judging by {before['min_ms'] * 1e-3:.2g} s at "
            f"{before['seqlen']}; --cell-seconds allows more"
        )

    def _race(self, racing: list[Entry], step: str, case: Case) -> tuple[Found, dict[str, float]]:
        """Times by name, and the host's microseconds of a forward where they are apart from the device's."""
        calls = {}
        for entry in racing:
            try:
                calls[entry.contender.name] = trial.call(entry.bound(case), case, step)
            except Exception as error:
                entry.end([step], trial.ending(error))
        calls |= self._controls(racing, step, case)
        clock, host = self.machine.clock, {}
        try:
            found = timing.measure(calls, clock, self.limits)
            if self.machine.cuda and step == "fwd":
                timed = [e.contender.name for e in racing]
                timed = [name for name in timed if isinstance(found.get(name), timing.Timing)]
                host = {name: timing.host_us(calls[name], clock) for name in timed}
        except Exception as error:  # of work that was enqueued: whose, nobody can tell
            found = dict.fromkeys(calls, error.with_traceback(None))
        calls.clear()  # the graphs of a backward go
        for entry in racing:
            result = found.get(entry.contender.name)
            if isinstance(result, Exception):
                entry.end([step], trial.ending(result))
                entry.fatal = not self.machine.answers()
        return found, host

    def _controls(self, racing: list[Entry], step: str, case: Case) -> dict[str, timing.Call]:
        """The causal attention of each kernel on the same tensors, where it is asked for and can be had."""
        causal = masks.causal(case.mask.q_len)
        if not self.settings.control or case.mask == causal:
            return {}
        calls, case = {}, replace(case, mask=causal)
        for entry in racing:
            if step in entry.open() and not entry.contender.refuses(case, step != "fwd"):
                with suppress(Exception):  # then the record has no relative time
                    calls[_control(entry.contender.name)] = trial.call(entry.contender.bind(case), case, step)
        return calls

    def _fill(self, record: Record, result: timing.Timing, found: Found) -> None:
        """The times and what follows from them."""
        step, shape = record["pass"], self.settings.shape
        record |= result.record()
        pairs = record["area"] * shape.batch * shape.heads
        record |= cells.rates(step, result.median, pairs, shape.head_dim)
        unit = record["ns_per_1000_cells"]
        causal = self.causal.get((record["kernel"], record["seqlen"], step))
        control = found.get(_control(record["kernel"]))
        if record["mask"] == "causal":
            causal = unit
        elif isinstance(control, timing.Timing):
            pairs = masks.causal(record["seqlen"]).area * shape.batch * shape.heads
            causal = cells.rates(step, control.median, pairs, shape.head_dim)["ns_per_1000_cells"]
            record["causal_in_turn"] = True
        record["relative_to_causal"] = unit / causal if unit and causal else None
        baseline = found.get(self.settings.baseline or "")
        if isinstance(baseline, timing.Timing):
            record["ratio"] = result.median / baseline.median

    def _facts(self, name: str, parameters: dict[str, Any], mask: masks.AttentionMask) -> Record:
        """What all cells of a group share."""
        shown = {key: value for key, value in parameters.items() if key not in ("lengths", "prefixes")}
        if "lengths" in parameters:
            count = len(parameters["lengths"])
            shown |= {"documents": self.settings.documents, "seed": self.settings.seed, "count": count}
        if "prefixes" in parameters:
            shown["prefixes"] = "a quarter of each document"
        return {
            **dict.fromkeys(cells.FIELDS),
            "schema": cells.SCHEMA,
            "mask": name,
            "parameters": shown,
            "digest": mask.digest,
            "area": mask.area,
            "fraction": mask.area / (mask.q_len * mask.k_len),
            "seqlen": mask.q_len,
            "baseline": self.settings.baseline,
            **self.same,
            **self.noise,
            **{key: self.environment[key] for key in ("torch", "lcab_plugin", "git")},
        }

    def _record(
        self, facts: Record, entry: Entry, step: str, case: Case | None, sample: Sample | None
    ) -> Record:
        status, reason = entry.ended.get(step, ("ok", None))
        record = {**facts, "kernel": entry.contender.name, "pass": step, "status": status, "reason": reason}
        record |= {
            "fatal": entry.fatal and status == "error",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if status in ("unsupported", "capped") or case is None:
            return record
        with suppress(Exception):  # a kernel whose library is half there, a device that does not answer
            record["version"] = entry.contender.version()
            record["backend"] = entry.contender.backend(case)
            record["computed"] = entry.contender.computed(case)
        names = ("out",) if step == "fwd" else ("out", "dq", "dk", "dv")
        record |= {f"error_{name}": entry.errors.get(name) for name in names}
        record["error_samples"] = sample.what if sample is not None and entry.errors else None
        record["first_call_s"] = entry.first_call_s
        record |= entry.memory.get(step, {})
        record["peak_memory_note"] = None if self.machine.cuda else _NO_PEAK
        return record

    def _remember(self, record: Record) -> None:
        kernel, mask, step = record["kernel"], record["mask"], record["pass"]
        before = self.longest.get((kernel, mask, step))
        if before is None or before["seqlen"] <= record["seqlen"]:
            self.longest[kernel, mask, step] = record
        if mask == "causal":
            self.causal[kernel, record["seqlen"], step] = record["ns_per_1000_cells"]


def _control(kernel: str) -> str:
    """The name under which a kernel's causal attention takes its turn."""
    return f"{kernel} causal"
