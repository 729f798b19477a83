"""A small GPT with an attention slot, uneven batches, and its training in one process without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcab_plugin
from lcab_plugin import masks

VOCABULARY, WIDTH, HEADS, KV_HEADS, LAYERS, LEARNING_RATE = 61, 32, 4, 2, 2, 0.5


@dataclass
class Case:
    """One training run. ``deepspeed`` is merged into the DeepSpeed config, ``lcab`` is its section;
    ``tamper`` multiplies every loss that is backpropagated."""

    name: str
    dp: int = 2
    lcab: dict[str, Any] = field(default_factory=dict)
    stage: int = 0
    gas: int = 1
    clip: float = 0.0
    deepspeed: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"
    steps: int = 3
    seqlen: int = 32
    batch: int = 4
    documents: bool = False
    distributed_attention: bool = False
    tamper: float = 1.0

    def config(self) -> dict[str, Any]:
        """The whole DeepSpeed config."""
        return {
            "train_micro_batch_size_per_gpu": self.batch // self.dp,
            "gradient_accumulation_steps": self.gas,
            "gradient_clipping": self.clip,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "bf16": {"enabled": self.dtype == "bf16"},
            **self.deepspeed,
            "zero_optimization": {"stage": self.stage, **self.deepspeed.get("zero_optimization", {})},
            "lcab": self.lcab,
        }


@dataclass
class Micro:
    """A global micro-batch: tokens, labels and loss mask [batch, tokens], documents of every row."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    lengths: list[int]

    @property
    def mask(self) -> masks.AttentionMask:
        return masks.causal_document(self.lengths)

    def dense_mask(self) -> Tensor:
        n = self.tokens.shape[1]
        document = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        return (document[:, None] == document[None, :]) & torch.ones(n, n, dtype=torch.bool).tril()


def window(case: Case, step: int) -> list[Micro]:
    """The micro-batches of one optimizer step. Early tokens, early samples and odd micro-batches have few
    unmasked tokens, so that every rank and micro-batch has another count, some none."""
    generator = torch.Generator().manual_seed(1000 + step)
    out = []
    for index in range(case.gas):
        stream = torch.randint(VOCABULARY, (case.batch, case.seqlen + 1), generator=generator)
        kept = torch.linspace(-0.3, 1, case.seqlen) * (0.3 if index % 2 else 1)
        kept = kept * torch.linspace(0.2, 1, case.batch)[:, None]
        loss_mask = torch.rand(case.batch, case.seqlen, generator=generator) < kept
        cut = 5 + step + index
        lengths = [cut, case.seqlen - cut] if case.documents else [case.seqlen]
        out.append(Micro(stream[:, :-1], stream[:, 1:], loss_mask, lengths))
    return out


class DenseAttention(nn.Module):
    """The reference: dense scores under a dense mask, key/value heads repeated."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, attention: nn.Module, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (heads + 2 * kv_heads) * (WIDTH // heads))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.attn = attention

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, self.heads + 2 * self.kv_heads, -1)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        x = x + self.project(self.attn(q, k, v, mask).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    """Tokens [b, t] at global positions [t] to logits [b, t, vocabulary]."""

    def __init__(self, attention: Any = lcab_plugin.Attention, heads: int = HEADS, seqlen: int = 64) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(seqlen, WIDTH)
        kv_heads = min(heads, KV_HEADS)
        self.layers = nn.ModuleList(Block(attention(), heads, kv_heads) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Any) -> Tensor:
        x = self.embedding(tokens) + self.position(positions)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))


def initial_model(attention: Any = lcab_plugin.Attention) -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT(attention)


def per_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [b, t] in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(
        labels.shape
    )


@dataclass
class Result:
    """Per step: mean loss, and gradient norm before clipping; the parameters at the end, by name."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def train_reference(case: Case) -> Result:
    """Train ``case`` in one process: SGD on the mean over all unmasked tokens of the window."""
    model = initial_model(DenseAttention)
    if case.dtype == "bf16":  # DeepSpeed rounds the weights it is given before it copies them to float32
        model.bfloat16().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses, norms = [], []
    for step in range(case.steps):
        micros = window(case, step)
        tokens = sum(int(m.loss_mask.sum()) for m in micros)
        total = torch.zeros(())
        for m in micros:
            logits = model(m.tokens, torch.arange(case.seqlen), m.dense_mask())
            total = total + per_token_loss(logits, m.labels)[m.loss_mask].sum()
        optimizer.zero_grad()
        (total / tokens).backward()
        losses.append(total.item() / tokens)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), case.clip or float("inf")).item())
        optimizer.step()
    return Result(losses, norms, {n: p.detach().float() for n, p in model.named_parameters()})


def deviations(case: Case, result: Result, reference: Result) -> dict[str, float]:
    """Largest relative deviation of losses and gradient norms, and of parameters relative to the largest
    update that training made."""
    start = dict(initial_model().named_parameters())

    def relative(got: list[float], want: list[float]) -> float:
        return max(abs(a / b - 1) for a, b in zip(got, want, strict=True))

    update = max((p - start[name]).abs().max().item() for name, p in reference.parameters.items())
    errors = [
        (result.parameters[name] - p).abs().max().item() / update for name, p in reference.parameters.items()
    ]
    return {
        "loss": relative(result.losses, reference.losses),
        "norm": relative(result.norms, reference.norms),
        "parameters": max(errors),
    }
