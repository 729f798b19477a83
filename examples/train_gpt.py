"""Train a GPT on real text through DeepSpeed; the config's "lcab" section chooses its attention.

    deepspeed examples/train_gpt.py                                       # preset tiny, one process
    deepspeed --num_gpus 2 examples/train_gpt.py --deepspeed_config examples/configs/zero3.json
    deepspeed --num_gpus 2 examples/train_gpt.py --strategy ring_p2p      # two ranks share each sequence
    deepspeed --num_gpus 2 examples/train_gpt.py --kernel auto --strategy auto   # the fastest by prediction
    torchrun --nproc-per-node 8 examples/train_gpt.py --preset 1b --dtype bf16 --strategy ulysses

Set DS_ACCELERATOR=cpu where there is no GPU. Records go to runs/<name>/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad, safe_set_full_fp32_param, set_z3_leaf_modules
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

import lcab_plugin as lcab
from lcab_plugin.adapters import deepspeed as lcab_deepspeed
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask
from lcab_plugin.training import arguments, evaluation, loop
from lcab_plugin.training.batch_mask import Window, read_window
from lcab_plugin.training.data import Text, window_samples
from lcab_plugin.training.gpt import NORM_EPSILON, ROPE_BASE, GPTConfig
from lcab_plugin.training.measure import StepTimer
from lcab_plugin.training.settings import Settings

DEFAULT_CONFIG = Path(__file__).with_name("configs") / "zero1.json"
LOGITS_AT_ONCE = 2**27  # elements: 512 MiB in float32


def rope(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [b, t, 1, head_dim / 2] at each token's own position, whichever rows this rank holds."""
    frequencies = float(ROPE_BASE) ** -(
        torch.arange(0, head_dim, 2, device=positions.device).double() / head_dim
    )
    angles = positions[:, :, None, None] * frequencies  # float64: float32 is coarse past a million tokens
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + head_dim / 2) by its angle (arXiv 2104.09864)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class SelfAttention(nn.Module):
    """Grouped-query attention around the slot that the plug-in binds."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = nn.Linear(config.hidden, width, bias=False)
        self.key = nn.Linear(config.hidden, kv_width, bias=False)
        self.value = nn.Linear(config.hidden, kv_width, bias=False)
        self.attention = lcab.Attention()
        self.out = nn.Linear(width, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, cp: Any) -> Tensor:
        q = self.query(x).unflatten(-1, (-1, self.head_dim))  # [b, t, heads, head_dim]
        k = self.key(x).unflatten(-1, (-1, self.head_dim))
        v = self.value(x).unflatten(-1, (-1, self.head_dim))
        return self.out(self.attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask, cp).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = (
            nn.RMSNorm(config.hidden, eps=NORM_EPSILON),
            SelfAttention(config),
        )
        self.ffn_norm, self.ffn = nn.RMSNorm(config.hidden, eps=NORM_EPSILON), SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, cp: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cp)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    """Decoder-only transformer; its output head shares no weights with the embedding."""

    def __init__(
        self, config: GPTConfig, seed: int, activation_checkpointing: bool, keep_attention: bool = False
    ) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.kept = {"context_fn": lcab.keep_attention} if keep_attention else {}
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=NORM_EPSILON)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        with torch.no_grad():  # the same on every rank, whatever the degrees
            for name, parameter in self.named_parameters():
                parameter.copy_(config.initial(name, seed))

    def forward(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, mask: AttentionMask, cp: lcab.ContextParallel
    ) -> Tensor:
        """Cross entropy of each of this rank's tokens, float32 [b, t]; in evaluation with whether the label
        was the likeliest token, [2, b, t].

        tokens, labels and positions [b, t] are this rank's rows; mask is the whole sequence's, cp its layout.
        """
        x = self.embedding(tokens)
        cos, sin = rope(positions, self.config.head_dim)
        for block in self.blocks:
            x = maybe_checkpoint(self.activation_checkpointing, block, x, cos, sin, mask, cp, **self.kept)
        # The logits of a long sequence do not fit at once. Every rank takes as many parts, even where ranks
        # hold different numbers of rows: ZeRO 3 gathers the head for each part.
        parts = math.ceil(len(tokens) * mask.q_len * self.config.vocab / cp.size / LOGITS_AT_ONCE)
        pairs = zip(x.tensor_split(parts, dim=1), labels.tensor_split(parts, dim=1), strict=True)
        return torch.cat([maybe_checkpoint(parts > 1, self.losses, *pair) for pair in pairs], dim=-1)

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(x)).float()
        if not self.training:
            return evaluation.scores(logits, labels)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def maybe_checkpoint(recompute: bool, function: Callable[..., Tensor], *inputs: Any, **how: Any) -> Tensor:
    """Call ``function``; if ``recompute``, once more in the backward pass instead of keeping activations."""
    return checkpoint(function, *inputs, use_reentrant=False, **how) if recompute else function(*inputs)


class Shard(NamedTuple):
    """This rank's rows of one micro-batch: what the model's forward takes, and marks of the tokens, [b, t]:
    which of them count, or into which cell each falls."""

    inputs: tuple[Tensor, Tensor, Tensor, AttentionMask, lcab.ContextParallel]
    marks: Tensor


class Trainer:
    """One run: the engine that DeepSpeed and the plug-in made of the model."""

    parts = ("forward", "backward", "optimizer")

    def __init__(self, engine: Any) -> None:
        self.engine, self.cp = engine, engine.lcab.cp.size
        self.device: torch.device = engine.device
        self.identity: dict[str, Any] = {}

    def attentions(self) -> Iterable[nn.Module]:
        """The modules that the plug-in has bound."""
        return [module for module in self.engine.module.modules() if isinstance(module, lcab.Attention)]

    def read(self, step: int, text: Text) -> Window:
        """The samples of this data-parallel rank, whole."""
        engine, plugin = self.engine, self.engine.lcab
        sizes = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()
        samples = window_samples(step, *sizes, plugin.dp_rank, plugin.dp_size)
        return read_window(text, plugin.config.mask, samples)

    def shards(self, window: Window, marks: Sequence[Tensor]) -> list[Shard]:
        """The rows of this context-parallel rank; ``marks``: of each micro-batch, as its tokens."""
        shards = []
        for (batch, mask), marked in zip(window.batches, marks, strict=True):
            cp = self.engine.lcab.cp.with_layout(mask=mask)
            tokens, labels, positions, own = (
                cp.shard(x, dim=1).to(self.device)
                for x in (batch.tokens, batch.labels, batch.positions, marked)
            )
            shards.append(Shard((tokens, labels, positions, mask, cp), own))
        return shards

    def step(self, window: Window, step: int, timer: StepTimer, gradients: Path | None) -> loop.Step:
        """One optimizer step."""
        engine, rate = self.engine, self.engine.get_lr()[0]
        shards = self.shards(window, [batch.loss_mask for batch, _ in window.batches])
        losses = engine.lcab.window([shard.marks for shard in shards])
        for shard in shards:
            with timer("forward"):
                loss = losses.loss(engine(*shard.inputs))
            with timer("backward"):
                engine.backward(loss)
            if gradients is not None and engine.is_gradient_accumulation_boundary():
                self.save_gradients(gradients)
            with timer("optimizer"):
                engine.step()
        return loop.Step(losses.mean(), losses.tokens, float(engine.get_global_grad_norm()), rate)

    @torch.no_grad()
    def tally(self, window: Window, cells: Sequence[Tensor], size: int) -> Tensor:
        """Losses, hits and tokens of every cell, over all ranks."""
        self.engine.eval()
        totals = torch.zeros(size, 3, dtype=torch.float64, device=self.device)
        for shard in self.shards(window, cells):
            totals += evaluation.tally(self.engine(*shard.inputs), shard.marks, size)
        self.engine.train()
        return collectives.all_reduce_sum(totals)

    def save_gradients(self, path: Path) -> None:
        """Write every parameter's gradient, averaged over all tokens, whole and not clipped."""
        parameters = self.engine.module.named_parameters()
        loop.save_whole({name: safe_get_full_grad(p) for name, p in parameters}, path)

    def save(self, directory: str, done: int) -> None:
        """Write a DeepSpeed checkpoint."""
        state = {"step": done, "identity": self.identity}
        self.engine.save_checkpoint(directory, tag=f"step{done}", client_state=state)


def prepare(args: argparse.Namespace) -> tuple[Trainer, loop.Job]:
    """Read config and text, build the model, let DeepSpeed and the plug-in wrap it, load a checkpoint."""
    lcab_deepspeed.init_distributed()
    settings = collectives.together(lambda: Settings(args.deepspeed_config))
    if args.dtype is None and not {"bf16", "fp16"} & settings.config.keys():
        args.dtype = "fp32" if get_accelerator().device_name() == "cpu" else "bf16"
    settings.apply(vars(args))
    texts = loop.open_texts(args)
    text = texts[0]
    config = arguments.model_config(args, text.corpus.vocab)
    model = GPT(config, args.seed, args.activation_checkpointing, args.keep_attention)
    set_z3_leaf_modules(model, [Block])  # ZeRO 3 gathers each whole, with one hook for thirteen
    first = {name: parameter.data for name, parameter in model.named_parameters()}
    attention = lcab.AttentionConfig.from_dict(settings.config["lcab"])
    workload = loop.workload(text, config, attention.mask, settings.dtype) if attention.undecided else None
    engine, _, _, _ = lcab_deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=settings.config,
        workload=workload,
        lr_scheduler=None if "scheduler" in settings.config else partial(warm_up, steps=args.warmup),
    )
    messages = list(settings.overrides)
    if settings.dtype != "fp32" and not begin_exactly(engine, first):
        messages.append(
            "the optimizer's float32 parameters begin rounded, as DeepSpeed has them under ZeRO 0"
        )
    trainer = Trainer(engine)
    global_batch = engine.train_batch_size()
    trainer.identity = loop.identity(args, config, global_batch, text)
    first_step = 0
    if args.resume:
        path, state = engine.load_checkpoint(args.resume)
        first_step = loop.require_same_run(args, trainer.identity, state if path else None)
    facts = {"data": text.corpus.facts(), **settings.resolved(engine)}
    dtype, dp = settings.dtype, engine.lcab.dp_size
    job = loop.Job(args, config, global_batch, dtype, dp, trainer.identity, facts, texts)
    return trainer, replace(job, first_step=first_step, messages=messages)


def begin_exactly(engine: Any, first: Mapping[str, Tensor]) -> bool:
    """Let the optimizer's float32 parameters begin with the ``first`` values, of which DeepSpeed gives them
    what the low precision kept: in the middle between two of its roundings, where small first updates of a
    rising learning rate change no weight (`1b`: a loss 8% off float32 after one step). False where DeepSpeed
    has no function for that: without ZeRO."""
    if not engine.zero_optimization():
        return False
    for name, parameter in engine.module.named_parameters():
        safe_set_full_fp32_param(parameter, first[name].to(engine.device))
    return True


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A learning rate that rises over so many steps and stays."""
    return LambdaLR(optimizer, partial(loop.warm, steps=steps))


def main() -> None:
    """Train as the command line says."""
    args = parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    loop.run(*prepare(args))


def parse_args() -> argparse.Namespace:
    """Flags, with the preset's sizes where they were left out."""
    parser = arguments.parser(__doc__)
    add = parser.add_argument_group("activations").add_argument
    add("--activation-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    add("--keep-attention", action="store_true", help="but neither attention nor its communication")
    group = parser.add_argument_group("training, over the DeepSpeed config")
    group.add_argument("--deepspeed_config", metavar="FILE", default=DEFAULT_CONFIG, help="(zero1.json)")
    arguments.add_training(group)
    arguments.add_attention(parser.add_argument_group('attention, over the section "lcab" of the config'))
    arguments.add_run(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = arguments.parse(parser)
    if args.keep_attention and not args.activation_checkpointing:
        parser.error("--keep-attention says what --activation-checkpointing leaves out: give both")
    return args


if __name__ == "__main__":
    try:
        main()
    except LcabError as error:
        sys.exit(f"train_gpt.py: {error}")
    torch.distributed.destroy_process_group()
