"""What `lcab bench kernels` is asked to measure, and what it measures when asked for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch

from lcab_plugin import masks
from lcab_plugin.bench import contenders
from lcab_plugin.bench.cells import PASSES, Record, mask_label
from lcab_plugin.errors import LcabError, unknown

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_WINDOW = 1024
_BLOCK = 1024
_SPARSE_BLOCK, _KEEP = 128, 0.2


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


class Group(NamedTuple):
    """Cells of one mask and length, measured in turn. ``block`` and ``keep``: of block_sparse alone."""

    mask: str
    seqlen: int
    block: int | None = None
    keep: float | None = None

    @classmethod
    def of(cls, record: Record) -> Group:
        """The group of a record."""
        sparse = record["parameters"] if record["mask"] == "block_sparse" else {}
        return cls(record["mask"], record["seqlen"], sparse.get("block"), sparse.get("keep"))

    @property
    def label(self) -> str:
        """The mask as tables call it."""
        return mask_label(self.mask, {"block": self.block, "keep": self.keep})


@dataclass(frozen=True)
class Settings:
    """What to measure. ``blocks``, ``keeps``: of block_sparse, every one with every other (empty: that of
    `default_parameters`). ``cell_seconds``: running time of one cell, and the longest single call that is
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
    blocks: tuple[int, ...] = ()
    keeps: tuple[float, ...] = ()
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
        for block in self.blocks:
            masks.block_sparse(0, block, 1.0)
        for keep in self.keeps:
            masks.block_sparse(0, 1, keep)
        if (self.blocks or self.keeps) and "block_sparse" not in self.masks:
            raise LcabError("blocks and keeps are of block_sparse, which is not among the masks; name it.")
        if not self.cell_seconds > 0:  # nor is it nan
            raise LcabError(f"cell_seconds {self.cell_seconds} must be above 0.")
        if self.dense_gib is not None and not self.dense_gib >= 0:
            raise LcabError(f"dense_gib {self.dense_gib} must be at least 0.")

    @property
    def contenders(self) -> tuple[str, ...]:
        """The kernels, the baseline among them, each once."""
        return tuple(dict.fromkeys((*([self.baseline] if self.baseline else []), *self.kernels)))

    @property
    def steps(self) -> tuple[str, ...]:
        """The passes, each once."""
        return tuple(dict.fromkeys(self.passes))

    @property
    def groups(self) -> list[Group]:
        """In the order of work: short before long, so that a long cell's time is foreseen; causal first,
        since the others' time per cell is stated relative to it."""
        chosen = sorted(dict.fromkeys(self.masks), key=lambda mask: mask != "causal")
        return [group for n in sorted(set(self.seqlens)) for mask in chosen for group in self._of(mask, n)]

    def _of(self, mask: str, seqlen: int) -> Iterator[Group]:
        if mask != "block_sparse":
            yield Group(mask, seqlen)
            return
        usual = default_parameters(mask, seqlen)
        for pair in product(self.blocks or [usual["block"]], self.keeps or [usual["keep"]]):
            yield Group(mask, seqlen, *pair)

    def parameters(self, group: Group) -> dict[str, Any]:
        """Of the group's mask, for ``masks.from_name``."""
        made = default_parameters(group.mask, group.seqlen, self.documents, self.seed)
        if group.block is not None:
            made |= {"block": group.block, "keep": group.keep}
        return made

    def asks(self, record: Record) -> bool:
        """Whether a record is of one of these cells."""
        return (
            record["kernel"] in self.contenders
            and record["pass"] in self.steps
            and Group.of(record) in self.groups
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
    block_sparse keeps a fifth of its blocks, of 128 tokens each and at most a quarter of the length.
    """
    quarter = max(1, seqlen // 4)
    window, block = min(_WINDOW, quarter), min(_BLOCK, quarter)
    sizes: dict[str, dict[str, Any]] = {
        "sliding_window": {"left": window, "right": window},
        "sliding_window_causal": {"left": window},
        "prefix_lm_causal": {"prefix": quarter},
        "global_sliding_window": {"global_tokens": max(1, window // 4), "window": window},
        "block_causal_document": {"block": block},
        "block_sparse": {"block": min(_SPARSE_BLOCK, quarter), "keep": _KEEP, "seed": seed},
    }
    made = sizes.get(mask, {})
    if masks.needs_lengths(mask):
        made["lengths"] = masks.sample_lengths(seqlen, documents, seed)
    if mask == "prefix_lm_document":
        made["prefixes"] = [length // 4 for length in made["lengths"]]
    return made
