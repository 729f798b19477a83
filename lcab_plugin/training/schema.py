"""What a record must hold, as docs/records.md says: checked when a file is read, not where it is used."""

from __future__ import annotations

import math
from typing import Any

from lcab_plugin.errors import LcabError

SCHEMA = 1
DESCRIBED = "docs/records.md of lcab_plugin describes the records"

Record = dict[str, Any]

_TEXTS = (
    *("kernel", "strategy", "layout", "placement", "mask", "digest", "dtype", "pass", "baseline"),
    *("version", "package", "backend", "kernel_version", "hardware", "device", "host"),
    *("torch", "lcab_plugin", "python", "deepspeed", "megatron_core", "numpy", "git", "date"),
    *("status", "reason", "peak_memory_note", "error_samples"),
    *("batch_digest", "data_digest", "name", "framework", "id", "kind", "records", "at", "after"),
)
_COUNTS = (
    *("schema", "area", "computed", "seqlen", "batch", "heads", "kv_heads", "head_dim", "repeats"),
    *("world", "threads", "dp", "cp", "tp", "pp", "cpus", "zero_stage", "sent_bytes", "closed_form_bytes"),
    *("nodes", "step", "loss_tokens", "tokens", "global_batch", "micro_batch", "steps", "first_step"),
    *("warm_up_steps", "tries", "seed"),
)
_NUMBERS = (
    *("fraction", "median_ms", "p10_ms", "p90_ms", "min_ms", "relative_ci", "tflops", "tflops_per_rank"),
    *("ns_per_1000_cells", "relative_to_causal", "ratio", "kernels_ms", "exposed_ms", "single_ms"),
    *("efficiency", "imbalance", "cpu_ms", "cpu_p10_ms", "cpu_p90_ms", "cpu_min_ms", "ideal_ms"),
    *("ideal_cpu_ms", "over_ideal", "over_ideal_p10", "over_ideal_p90", "cpu_over_ideal"),
    *("cpu_over_ideal_p10", "cpu_over_ideal_p90", "least_cpu_over_ideal"),
    *("peak_memory_gib", "peak_reserved_gib", "peak_rss_gib", "kernels_memory_gib"),
    *("communication_memory_gib", "error_out", "error_dq", "error_dk", "error_dv"),
    *("host_us", "first_call_s", "noise_empty_ms", "noise_same_relative"),
    *("loss", "validation_loss", "accuracy", "grad_norm", "lr", "step_ms", "tokens_per_s"),
    *("model_tflops", "mfu", "time"),
)
_TABLES = ("recall", "by_document_position", "by_sequence_position")
# What a field must be, in words, and the types of JSON that are it; null is none of a field's business.
_CHECKS: dict[str, tuple[str, frozenset[type]]] = {
    **dict.fromkeys(_TEXTS, ("text", frozenset({str}))),
    **dict.fromkeys(_COUNTS, ("a whole number", frozenset({int}))),
    **dict.fromkeys(_NUMBERS, ("a number", frozenset({int, float}))),
    **dict.fromkeys(("fatal", "causal_in_turn", "settled"), ("true or false", frozenset({bool}))),
    **dict.fromkeys(_TABLES, ("a table", frozenset({dict}))),
    "command": ("a list of words", frozenset({list})),
    "auto": ("the planner's choice", frozenset({dict})),
    "degrees": ("degrees by axis", frozenset({dict})),
    "attention": ("the attention's settings", frozenset({dict})),
    "model": ("the model's sizes", frozenset({dict})),
    "memory": ("GiB of every rank by what held them", frozenset({dict})),
    "times": ("times by part of a step", frozenset({dict})),
    # of a mask in a cell; in a run their number
    "parameters": ("the mask's parameters, or the model's number of them", frozenset({dict, int})),
}
_CELL = ("mask", "digest", "seqlen", "batch", "heads", "kv_heads", "head_dim", "dtype", "pass", "status")
_WHERE = ("hardware", "torch")
# The fields of each kind that are there and not null.
REQUIRED: dict[str, tuple[str, ...]] = {
    "kernels": (*_CELL, "kernel", *_WHERE),
    "cp": (*_CELL, "strategy", "kernel", "world", "backend", *_WHERE),
    "peers": (*_CELL, "strategy", "kernel", "world", "backend", *_WHERE),
    "run": ("schema", "lcab_plugin", "torch", "device", "command"),
    "training": ("attention", "world", "seqlen", "global_batch", "dtype", "data_digest", "model"),
    "step": ("step", "loss", "grad_norm", "step_ms", "tokens_per_s", "peak_memory_gib", "batch_digest"),
    "eval": ("step",),
    "end": ("step",),
    "study_cell": ("id", "kind", "mask", "seqlen", "kernel"),
}
STATUSES = ("ok", "unsupported", "capped", "oom", "error")


def kind(record: Record) -> str:
    """Of a record: ``run``, ``step``, ``eval``, another type of line, or which benchmark's cell it is.

    Raises:
        LcabError: a cell of no benchmark.
    """
    if record["type"] != "cell":
        return record["type"]
    if "over_ideal" in record:
        return "peers"
    if "strategy" in record:
        return "cp"
    if "kernel" in record:
        return "kernels"
    raise LcabError("it is a cell of no benchmark: it names neither a kernel nor a strategy")


def check(record: Record) -> None:
    """That a record holds what its kind must, and that its fields are what they are said to be.

    Raises:
        LcabError: it does not; the message names the field, its value and what it should be.
    """
    version = record.get("schema", SCHEMA)
    if type(version) is int and version > SCHEMA:
        raise LcabError(f"it has schema {version}, this version reads up to {SCHEMA}")
    what = kind(record)
    required = REQUIRED.get(what)
    if required is None:  # of a type that no reader here uses
        return
    if what == "run" and "attention" in record:
        required = (*required, *REQUIRED["training"])
    for name in required:
        if record.get(name) is None:
            raise LcabError(f"{what} has no {name}")
    for name, value in record.items():
        known = _CHECKS.get(name)
        if known is not None and value is not None and type(value) not in known[1]:
            raise LcabError(f"{what} has {name} {value!r}, which is not {known[0]}")
    if record["type"] == "cell":
        _check_ending(record)


def _check_ending(record: Record) -> None:
    """A cell was measured, or says why not."""
    status, median = record["status"], record.get("median_ms")
    if status not in STATUSES:
        raise LcabError(f"cell has status {status!r}, which is none of {', '.join(STATUSES)}")
    if status == "ok" and not (median is not None and math.isfinite(median) and median > 0):
        raise LcabError(f"cell has status ok and median_ms {median}, which is not above 0")
    if status != "ok" and not record.get("reason"):
        raise LcabError(f"cell has status {status} and no reason")


def check_parity(found: Any) -> None:
    """That ``found`` is what `lcab parity` writes.

    Raises:
        LcabError: it is not; the message names the field.
    """
    for name, type_ in (("settings", dict), ("environment", dict), ("cells", list), ("passed", bool)):
        if not isinstance(found, dict) or not isinstance(found.get(name), type_):
            raise LcabError(f"it has no {name} as `lcab parity` writes it")
    for number, cell in enumerate(found["cells"], start=1):
        if not isinstance(cell, dict) or not {"cell", "status", "name"} <= cell.keys():
            raise LcabError(f"cell {number} lacks cell, status or name")
    if type(found.get("asked", 0)) is not int:
        raise LcabError(f"it has asked {found['asked']!r}, which is not a whole number")
    check({"type": "run", "schema": SCHEMA, **found["environment"]})
