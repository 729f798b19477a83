"""The GPT that both examples train: its sizes, its parameters by name, their first values, its work."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lcab_plugin.training.flops import training_flops

SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "seqlen")
PRESETS = {  # 1b and 7b are the shapes of Llama 3.2 1B and Mistral 7B
    "tiny": (4, 128, 8, 4, 384, 512),
    "125m": (12, 768, 12, 4, 3072, 2048),
    "1b": (16, 2048, 32, 8, 8192, 8192),
    "7b": (32, 4096, 32, 8, 14336, 32768),
}
# Learning rates, after ten steps of warm-up: less the wider the model, for Adam's first steps change a
# matrix's every entry by the rate, and outputs by as many of them as it has columns. At 1e-3 125m in bf16 lay
# 9% from float32 after a batch in which six tokens count; at 3e-4 it stays within 0.1%, and ends lower.
RATES = {"tiny": 1e-3, "125m": 3e-4, "1b": 1e-4, "7b": 5e-5}
ROPE_BASE = 500_000
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model."""

    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by name. Matrices are ``[out, in]``."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block: dict[str, tuple[int, ...]] = {
            "attention_norm.weight": (self.hidden,),
            "attention.query.weight": (width, self.hidden),
            "attention.key.weight": (kv_width, self.hidden),
            "attention.value.weight": (kv_width, self.hidden),
            "attention.out.weight": (self.hidden, width),
            "ffn_norm.weight": (self.hidden,),
            "ffn.gate.weight": (self.ffn, self.hidden),
            "ffn.up.weight": (self.ffn, self.hidden),
            "ffn.down.weight": (self.hidden, self.ffn),
        }
        blocks = {f"blocks.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}
        table = (self.vocab, self.hidden)
        return {"embedding.weight": table, **blocks, "norm.weight": (self.hidden,), "head.weight": table}

    @property
    def parameters(self) -> int:
        """Their number."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def flops(self, tokens: int, area: int) -> int:
        """Of a forward and backward pass over so many tokens and (query, key) pairs."""
        matrices = self.parameters - self.vocab * self.hidden  # the embedding is looked up
        return training_flops(
            matrices, tokens, area, layers=self.layers, heads=self.heads, head_dim=self.head_dim
        )

    def initial(self, name: str, seed: int) -> Tensor:
        """First value of a parameter, float32 on the CPU.

        It depends on nothing but the shape, the name and the seed, so a rank may draw just what it holds, and
        the model is the same in every framework and under all degrees. Norms begin at 1, embeddings normal
        with standard deviation 1, matrices with 0.02, less into the residual stream (GPT-2). Embeddings of
        0.02 would be small beside what the first block adds: its gradients are large then, and the loss
        spikes (arXiv 2312.16903).
        """
        shape = self.shapes()[name]
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        std = 0.02
        if name == "embedding.weight":
            std = 1.0
        elif name.endswith(("out.weight", "down.weight")):
            std /= math.sqrt(2 * self.layers)
        return torch.randn(shape, generator=generator) * std
