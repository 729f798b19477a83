"""What is trained, and on how many devices."""

from __future__ import annotations

from dataclasses import dataclass

from lcab_plugin.errors import LcabError, unknown

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
CHECKPOINTING = ("none", "block", "keep_attention")


@dataclass(frozen=True)
class Model:
    """A decoder with gated feed-forward layers. ``layers=1, hidden=0, ffn=0, vocab=0`` is attention alone.

    Raises:
        LcabError: a number makes no sense.
    """

    layers: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise LcabError(
                f"layers {self.layers}, heads {self.heads}:{self.kv_heads} and head_dim {self.head_dim} must "
                "be at least 1, and the heads a multiple of the key/value heads, as in 32:8."
            )
        if min(self.hidden, self.ffn, self.vocab) < 0:
            raise LcabError(
                f"hidden {self.hidden}, ffn {self.ffn}, vocab {self.vocab}: none may be negative."
            )
        if self.dtype not in ITEMSIZE:
            raise unknown("dtype", self.dtype, ITEMSIZE)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer."""
        return self.hidden * (2 * (self.heads + self.kv_heads) * self.head_dim + 3 * self.ffn)

    @property
    def matrix_parameters(self) -> int:
        """Of all matrices that multiply every token: layers and head."""
        return self.layers * self.layer_parameters + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All, the embedding and the norms too."""
        return self.matrix_parameters + self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden


MODELS: dict[str, Model] = {
    "attention": Model(1, 0, 0, 0, 64, 8, 128),  # the Long-Context Attention Benchmark's, arXiv 2510.17896
    "llama3-8b": Model(32, 4096, 14336, 128256, 32, 8, 128),  # arXiv 2407.21783, table 3
    "llama3-70b": Model(80, 8192, 28672, 128256, 64, 8, 128),
    "llama3-405b": Model(126, 16384, 53248, 128256, 128, 8, 128),
}


def model(name: str) -> Model:
    """The model of that name.

    Raises:
        LcabError: there is none.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]


@dataclass(frozen=True)
class Cluster:
    """``batch`` sequences a step on ``nodes`` of ``gpus`` devices each; ``zero``: stage of ZeRO, over all
    devices; ``checkpointing`` of activations: ``none``, every ``block``, or ``keep_attention`` (blocks, but
    ``lcab_plugin.recompute`` keeps what attention computed and received).

    Raises:
        LcabError: a number makes no sense.
    """

    nodes: int = 1
    gpus: int = 8
    batch: int = 1
    zero: int = 3
    checkpointing: str = "keep_attention"

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "batch"):
            if getattr(self, name) < 1:
                raise LcabError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.zero not in range(4):
            raise LcabError(f"zero={self.zero} is no stage of ZeRO; give 0, 1, 2 or 3.")
        if self.checkpointing not in CHECKPOINTING:
            raise unknown("checkpointing", self.checkpointing, CHECKPOINTING)

    @property
    def world(self) -> int:
        """Devices."""
        return self.nodes * self.gpus
