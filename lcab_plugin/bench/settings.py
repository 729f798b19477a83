"""What `lcab bench kernels` is asked to measure, and what it measures when asked for nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lcab_plugin import masks
from lcab_plugin.bench import contenders
from lcab_plugin.bench.cells import PASSES, Record
from lcab_plugin.errors import LcabError, unknown

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_WINDOW = 1024
_BLOCK = 1024


@dataclass(frozen=True)
class Shape:
    """Of every cell's tensors. ``dtype`` is a name of `DTYPES`."""

    batch: int = 1
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if min(self.batch, self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise LcabError(
                f"batch {self.batch}, heads {self.heads}:{self.kv_heads} and head_dim {self.head_dim} must "
                "be at least 1, and the heads a multiple of the key/value heads, as in 64:8."
            )


@dataclass(frozen=True)
class Settings:
    """What to measure. ``cell_seconds``: running time of one cell, and the longest single call that is
    started at all. ``dense_gib``: the most that [q, k] tensors may take (None: what the device has free).
    ``control``: every kernel's causal attention takes its turn with every other mask, so that the time
    relative to causal's holds on a machine whose speed drifts.

    Raises:
        LcabError: a name is unknown or a number makes no sense; the message says which.
    """

    kernels: tuple[str, ...]
    masks: tuple[str, ...]
    seqlens: tuple[int, ...]
    passes: tuple[str, ...]
    shape: Shape = field(default_factory=Shape)
    device: str = "cpu"
    documents: str = "pile"
    seed: int = 0
    cell_seconds: float = 5.0
    baseline: str | None = None
    dense_gib: float | None = None
    control: bool = False

    def __post_init__(self) -> None:
        for name in (*self.kernels, *([self.baseline] if self.baseline else [])):
            contenders.find(name)
        for kind, chosen, table in (
            ("mask", self.masks, masks.names()),
            ("pass", self.passes, PASSES),
            ("document length distribution", (self.documents,), masks.distributions()),
        ):
            for name in chosen:
                if name not in table:
                    raise unknown(kind, name, table)
        if not self.seqlens or min(self.seqlens) < 1:
            raise LcabError(f"sequence lengths {list(self.seqlens)} must be at least 1.")
        if self.cell_seconds <= 0:
            raise LcabError(f"cell_seconds {self.cell_seconds} must be above 0.")

    @property
    def contenders(self) -> tuple[str, ...]:
        """The kernels, the baseline among them, each once."""
        return tuple(dict.fromkeys((*([self.baseline] if self.baseline else []), *self.kernels)))

    @property
    def steps(self) -> tuple[str, ...]:
        """The passes, each once."""
        return tuple(dict.fromkeys(self.passes))

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(mask, length) in the order of work: short before long, so that a long cell's time is foreseen;
        causal first, since the others' time per cell is stated relative to it."""
        chosen = sorted(dict.fromkeys(self.masks), key=lambda mask: mask != "causal")
        return [(mask, n) for n in sorted(set(self.seqlens)) for mask in chosen]

    def asks(self, record: Record) -> bool:
        """Whether a record is of one of these cells."""
        return (
            record["kernel"] in self.contenders
            and record["pass"] in self.steps
            and (record["mask"], record["seqlen"]) in self.groups
            and all(record[name] == value for name, value in asdict(self.shape).items())
        )

    @property
    def total(self) -> int:
        """Cells."""
        return len(self.groups) * len(self.contenders) * len(self.steps)


def defaults(device: str) -> dict[str, Any]:
    """`Settings` of a run that names nothing: the paper's (arXiv 2510.17896) on a GPU, minutes on a CPU."""
    common = {"kernels": tuple(contenders.available()), "masks": masks.names(), "device": device}
    if device == "cuda":
        lengths = tuple(1024 << i for i in range(7))
        return {**common, "seqlens": lengths, "passes": ("fwd", "bwd"), "shape": Shape(), "cell_seconds": 5.0}
    small = Shape(heads=8, kv_heads=2, head_dim=64, dtype="fp32")
    return {
        **common,
        "seqlens": (1024, 2048, 4096),
        "passes": ("fwd", "bwd"),
        "shape": small,
        "cell_seconds": 0.5,
    }


def default_parameters(mask: str, seqlen: int, documents: str = "pile", seed: int = 0) -> dict[str, Any]:
    """Parameters of a mask family at a length, for ``masks.from_name``.

    Windows and blocks are 1024 tokens and at most a quarter of the length, so that they stay what they are in
    a short sequence; 256 global tokens at most; prefixes are a quarter of the sequence or of each document.
    """
    quarter = max(1, seqlen // 4)
    window, block = min(_WINDOW, quarter), min(_BLOCK, quarter)
    made: dict[str, Any] = {
        "sliding_window": {"left": window, "right": window},
        "sliding_window_causal": {"left": window},
        "prefix_lm_causal": {"prefix": quarter},
        "global_sliding_window": {"global_tokens": max(1, window // 4), "window": window},
        "block_causal_document": {"block": block},
    }.get(mask, {})
    if masks.needs_lengths(mask):
        made["lengths"] = masks.sample_lengths(seqlen, documents, seed)
    if mask == "prefix_lm_document":
        made["prefixes"] = [length // 4 for length in made["lengths"]]
    return made
