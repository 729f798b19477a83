"""What a record must hold, as docs/records.md says: checked when a file is read, not where it is used."""

from __future__ import annotations

import math
from typing import Any

from lcab_plugin.errors import LcabError

Record = dict[str, Any]

_TEXTS = (
    "kernel",
    "version",
    "backend",
    "mask",
    "digest",
    "dtype",
    "pass",
    "status",
    "reason",
    "baseline",
    "peak_memory_note",
    "error_samples",
    "hardware",
    "torch",
    "lcab_plugin",
    "git",
    "date",
    "strategy",
    "placement",
    "layout",
    "package",
    "device",
    "batch_digest",
    "data_digest",
    "name",
    "framework",
)
_COUNTS = (
    "schema",
    "area",
    "computed",
    "seqlen",
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "repeats",
    "world",
    "threads",
    "sent_bytes",
    "closed_form_bytes",
    "step",
    "loss_tokens",
    "tokens",
    "global_batch",
    "steps",
    "first_step",
)
_NUMBERS = (
    "fraction",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "min_ms",
    "relative_ci",
    "tflops",
    "ns_per_1000_cells",
    "relative_to_causal",
    "ratio",
    "peak_memory_gib",
    "error_out",
    "error_dq",
    "error_dk",
    "error_dv",
    "host_us",
    "first_call_s",
    "noise_empty_ms",
    "noise_same_relative",
    "tflops_per_rank",
    "kernels_ms",
    "exposed_ms",
    "single_ms",
    "efficiency",
    "imbalance",
    "cpu_ms",
    "ideal_ms",
    "over_ideal",
    "cpu_over_ideal",
    "loss",
    "grad_norm",
    "lr",
    "step_ms",
    "tokens_per_s",
    "model_tflops",
    "mfu",
    "time",
)
_CHECKS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    **dict.fromkeys(_TEXTS, ("text", str)),
    **dict.fromkeys(_COUNTS, ("a whole number", int)),
    **dict.fromkeys(_NUMBERS, ("a number", (int, float))),
    "command": ("a list of words", list),
    "degrees": ("degrees by axis", dict),
    "attention": ("the attention's settings", dict),
    "model": ("the model's sizes", dict),
    "memory": ("GiB of every rank by what held them", dict),
    **dict.fromkeys(("recall", "by_document_position", "by_sequence_position"), ("a table", dict)),
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


def check(record: Record) -> str:
    """The record's kind, once it is known to hold what that kind must.

    Raises:
        LcabError: it does not; the message names the field, its value and what it should be.
    """
    what = kind(record)
    if what not in REQUIRED:  # of a type that no reader here uses
        return what
    required = REQUIRED[what]
    if what == "run" and "attention" in record:
        required = (*required, *REQUIRED["training"])
    for name in required:
        if record.get(name) is None:
            raise LcabError(f"{what} has no {name}")
    for name, value in record.items():
        if value is not None and name in _CHECKS:
            words, type_ = _CHECKS[name]
            if isinstance(value, bool) or not isinstance(value, type_):
                raise LcabError(f"{what} has {name} {value!r}, which is not {words}")
    if record["type"] == "cell":
        _check_ending(record)
    return what


def _check_ending(record: Record) -> None:
    """A cell was measured, or says why not."""
    status, median = record["status"], record.get("median_ms")
    if status not in STATUSES:
        raise LcabError(f"cell has status {status!r}, which is none of {', '.join(STATUSES)}")
    if status == "ok" and not (median is not None and math.isfinite(median) and median > 0):
        raise LcabError(f"cell has status ok and median_ms {median}, which is not above 0")
    if status != "ok" and not record.get("reason"):
        raise LcabError(f"cell has status {status} and no reason")
