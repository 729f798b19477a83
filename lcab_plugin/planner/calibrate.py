"""Speeds fitted to records, and their error on records held back."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lcab_plugin import kernels, masks
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask
from lcab_plugin.planner import links
from lcab_plugin.planner.hardware import HOST_MOST, Hardware, find
from lcab_plugin.planner.links import Fitted, Transfer
from lcab_plugin.planner.shape import ITEMSIZE
from lcab_plugin.planner.speeds import (
    COSTS,
    PASSES,
    Floats,
    Heads,
    Speed,
    assumed,
    features,
    least_squares,
    table,
)
from lcab_plugin.planner.work import work

Record = dict[str, Any]

HELD_OUT = 4  # one in so many (mask, length) pairs is held back, all its kernels and passes with it
LEAST = 10  # records of a kernel and pass that are worth fitting


@dataclass(frozen=True)
class Error:
    """Of predictions, relative to what was measured: ``fitted`` records, ``held`` back ones, and of the
    latter the median, the ninth decile and the largest, with the cell it belongs to."""

    what: str
    fitted: int
    held: int
    median: float
    p90: float
    largest: float
    where: str


@dataclass
class Calibration:
    """Fitted ``speeds`` by kernel, the ``links`` inside and between nodes, the ``linear_share`` of the peak
    (None without records of it), their ``errors`` on held-out records, and how many records were left aside
    and why."""

    speeds: dict[str, Speed] = field(default_factory=dict)
    links: dict[str, Fitted] = field(default_factory=dict)
    linear_share: float | None = None
    errors: list[Error] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def applied(self, hardware: Hardware, given: Collection[str]) -> Hardware:
        """``hardware`` as fitted, but for the links ``inside`` or ``between`` nodes that were ``given``."""
        if self.linear_share is not None:
            hardware = replace(hardware, linear_share=self.linear_share)
        for name, fitted in self.links.items():
            if fitted.link is not None and name not in given:
                hardware = hardware.with_link(name, fitted.link, f"fitted to {fitted.records} records")
        return hardware

    def told(self, hardware: Hardware, given: Collection[str]) -> list[str]:
        """Of each link of ``hardware``, which this was applied to, where it is from."""
        sentences = []
        for name, fitted in self.links.items():
            link = getattr(hardware, name)
            speed = f"{link.bandwidth / 1e9:.4g} GB/s and {link.latency * 1e6:.3g} us a message"
            if name in given:
                origin = "as given"
            elif fitted.link is not None:
                origin = f"fitted to {fitted.records} records"
            else:
                origin = f"not fitted ({fitted.reason}), the default of {hardware.name} is kept"
            sentences.append(f"Link {name} nodes: {speed}, {origin}.")
        return sentences


def measured(lines: Iterable[Record]) -> list[Record]:
    """The measured cells and the training steps of one file's records. A step is given its ``run``."""
    found: list[Record] = []
    run: Record | None = None
    for record in lines:
        kind = record["type"]
        if kind == "run":
            run = record
        elif kind == "cell" and record["status"] == "ok":
            found.append(record)
        elif kind == "step" and run is not None and "model" in run and record["step"] > run["first_step"]:
            found.append({**record, "run": run})  # a run's first step compiles and allocates
    return found


def fit(records: Iterable[Record], hardware: Hardware, dtype: str) -> Calibration:
    """Fits kernels, links and the matrices' share to the records of this hardware and width of numbers."""
    result = Calibration()
    kernel_cells: dict[tuple[str, str], list[Record]] = defaultdict(list)
    link_cells, steps = [], []
    for record in records:
        if "run" in record:
            steps.append(record)
            continue
        reason = _left_out(record, hardware, dtype)
        if reason:
            result.left_out[reason] += 1
        elif "strategy" in record:
            link_cells.append(record)
        else:
            kernel_cells[record["kernel"], record["pass"]].append(record)
    fitted: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for (kernel, step), cells in sorted(kernel_cells.items()):
        known = [(r, mask) for r in cells if (mask := mask_of(r)) is not None]
        result.left_out["a mask that cannot be made again"] += len(cells) - len(known)
        if len(known) < LEAST:
            result.left_out[f"fewer than {LEAST} records of a kernel's pass"] += len(known)
            continue
        costs, error = _fitted_kernel(kernel, step, known, hardware.device)
        fitted[kernel][step] = costs
        result.errors.append(error)
    for kernel, passes in fitted.items():
        if len(passes) == len(PASSES):
            result.speeds[kernel] = Speed(passes["fwd"], passes["bwd"], f"fitted on {hardware.name}")
    _fit_links(link_cells, hardware, result)
    if steps:
        _fit_linear(steps, hardware, dtype, result)
    result.left_out = +result.left_out
    return result


def _left_out(record: Record, hardware: Hardware, dtype: str) -> str | None:
    if "kernel" not in record or "median_ms" not in record or record["median_ms"] is None:
        return "not a timing"
    if record["kernel"] not in kernels.names():
        return f"{record['kernel']!r} is no kernel here"
    if record["pass"] not in PASSES:
        return "forward and backward together"
    if record["dtype"] not in ITEMSIZE or ITEMSIZE[record["dtype"]] != ITEMSIZE[dtype]:
        return f"dtype {record['dtype']}"
    return None if _same(record["hardware"], hardware) else f"measured on {record['hardware']}"


def _same(name: str, hardware: Hardware) -> bool:
    """Whether a device of that name is this hardware; every name that is none of the GPUs' is a processor."""
    try:
        return find(name).name == hardware.name
    except LcabError:
        return hardware.device == "cpu"


def mask_of(record: Record) -> AttentionMask | None:
    """The mask of a record, made again from its parameters; None where its digest is another."""
    given = dict(record["parameters"])
    given.pop("count", None)
    if (documents := given.pop("documents", None)) is not None:
        given["lengths"] = masks.sample_lengths(record["seqlen"], documents, given.pop("seed", 0))
    if isinstance(given.get("prefixes"), str):  # "a quarter of each document"
        given["prefixes"] = [length // 4 for length in given["lengths"]]
    try:
        mask = masks.from_name(record["mask"], record["seqlen"], **given)
    except LcabError:
        return None
    return mask if mask.digest == record["digest"] else None


def held_out(record: Record) -> bool:
    """Whether a record is held back, by its mask and length: the same on every machine and in every run."""
    name = f"{record['mask']} {record['seqlen']}".encode()
    return hashlib.blake2b(name, digest_size=8).digest()[0] % HELD_OUT == 0


def _fitted_kernel(
    kernel: str, step: str, known: list[tuple[Record, AttentionMask]], device: str
) -> tuple[tuple[float, ...], Error]:
    """Costs fitted to all but the held-out records, and the error on those. What a cell costs whatever the
    head_dim shows between two of them; of one it is part of what its FLOPs cost."""
    amounts = np.array(
        [features(step, work(kernel, mask, r["head_dim"], device), _heads(r)) for r, mask in known]
    )
    seconds = np.array([r["median_ms"] / 1e3 for r, _ in known])
    held = np.array([held_out(r) for r, _ in known])
    if len({r["head_dim"] for (r, _), back in zip(known, held, strict=True) if not back}) < 2:
        amounts[:, COSTS.index("cells")] = 0.0
    costs = least_squares(amounts[~held], seconds[~held])
    names = [f"{r['mask']} {r['seqlen']}" for r, _ in known]
    return tuple(costs.tolist()), _error(f"{kernel} {step}", amounts @ costs, seconds, held, names)


def _heads(record: Record) -> Heads:
    itemsize = ITEMSIZE[record["dtype"]]
    return Heads(record["batch"], record["heads"], record["kv_heads"], record["head_dim"], itemsize)


def _error(what: str, predicted: Floats, measured: Floats, held: Floats, names: list[str]) -> Error:
    relative = np.abs(predicted / measured - 1)
    at = np.flatnonzero(held)
    if not len(at):
        return Error(what, len(measured), 0, float("nan"), float("nan"), float("nan"), "-")
    worst = at[relative[at].argmax()]
    median, p90 = np.quantile(relative[at], (0.5, 0.9)).tolist()
    return Error(what, len(measured) - len(at), len(at), median, p90, float(relative[worst]), names[worst])


def _fit_links(cells: list[Record], hardware: Hardware, result: Calibration) -> None:
    """From the strategies that hide nothing: what a call takes beyond its kernels is its transfers'. The link
    inside nodes from records of one node, then, with it, the link between them from records of several."""
    found: dict[str, list[Transfer]] = {name: [] for name in links.NAMES}
    for record in cells:
        transfer = links.transfer(record, hardware, held_out(record))
        if isinstance(transfer, str):
            result.left_out[transfer] += 1
        else:
            found[transfer.link].append(transfer)
    for name, transfers in found.items():
        if all(t.held for t in transfers):  # too few to hold any back
            transfers = [replace(t, held=False) for t in transfers]
        fitted = result.links[name] = links.fit(name, transfers, hardware)
        if fitted.link is None:
            continue
        hardware = hardware.with_link(name, fitted.link, "fitted")
        predicted = np.array([t.seconds(hardware) for t in transfers])
        taken, held = np.array([t.exposed for t in transfers]), np.array([t.held for t in transfers])
        what = f"link {name} nodes (ulysses, ring_all_gather)"
        error = _error(what, predicted, taken, held, [t.where for t in transfers])
        result.errors.append(replace(error, fitted=fitted.records))


def _fit_linear(steps: list[Record], hardware: Hardware, dtype: str, result: Calibration) -> None:
    """The share of the peak that matrices reach: what a step takes beyond its attention, at the kernel's own
    speed, is theirs. Transfers, the optimizer and recomputation count as theirs too, waiting for the host
    does not. One step in ``HELD_OUT`` is held back."""
    speeds = table(hardware, dtype, result.speeds)
    rest, linear, measured, names = [], [], [], []
    for step in steps:
        run = step["run"]
        if run["dtype"] != dtype or not _same(run["device"], hardware):
            result.left_out[f"training in {run['dtype']} on {run['device']}"] += 1
            continue
        shape = run["model"]
        matrices = run["parameters"] - shape["vocab"] * shape["hidden"]
        flops = 6 * matrices * step["tokens"] / run["world"]
        area = (step["model_tflops"] * 1e12 / run["world"] - flops) / 3  # attention's FLOPs, forward
        speed = speeds.get(run["attention"]["kernel"], assumed(hardware, dtype))
        head_dim = shape.get("head_dim") or shape["hidden"] // shape["heads"]
        costs = {p: dict(zip(COSTS, getattr(speed, p), strict=True)) for p in PASSES}
        attention = area * sum(
            PASSES[p] * of["computed"] + of["cells"] / (4 * head_dim) for p, of in costs.items()
        )
        ideal = flops / hardware.peak_of(dtype)
        if hardware.device == "cuda" and attention + ideal / hardware.linear_share < _host(run):
            result.left_out["training steps so short that GPUs may have waited for the host"] += 1
            continue
        rest.append(attention)
        linear.append(ideal)
        measured.append(step["step_ms"] / 1e3)
        names.append(f"{run['name']} step {step['step']}")
    times, ideals, seconds = map(np.array, (rest, linear, measured))
    held = np.arange(len(seconds)) % HELD_OUT == HELD_OUT - 1
    known = ~held & (seconds > times) if len(seconds) else held
    if not known.any():
        return
    share = float(np.median(ideals[known] / (seconds[known] - times[known])))
    result.linear_share = share
    result.errors.append(_error("training step", times + ideals / share, seconds, held, names))


def _host(run: Record) -> float:
    """Seconds that a step of this run may have taken for the host alone."""
    each = HOST_MOST[run.get("zero_stage") or 0]  # Megatron's runs name no stage
    return float(each * run["model"]["layers"] * run.get("accumulation_steps", 1))
