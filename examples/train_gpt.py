"""Train a GPT on real text through DeepSpeed; the config's "lcab" section chooses its attention.

    deepspeed examples/train_gpt.py                                       # preset tiny, one process
    deepspeed --num_gpus 2 examples/train_gpt.py --deepspeed_config examples/configs/zero3.json
    deepspeed --num_gpus 2 examples/train_gpt.py --strategy ring_p2p      # two ranks share each sequence
    torchrun --nproc-per-node 8 examples/train_gpt.py --preset 1b --dtype bf16 --strategy ulysses

Set DS_ACCELERATOR=cpu where there is no GPU. Records go to runs/<name>/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

import lcab_plugin as lcab
from lcab_plugin.adapters import deepspeed as lcab_deepspeed
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask, distributions
from lcab_plugin.training.batch_mask import with_mask
from lcab_plugin.training.data import LOSS_MASKS, PackedText, batch_digest, open_corpus, window_samples
from lcab_plugin.training.display import Progress
from lcab_plugin.training.flops import mfu, peak_flops, training_flops
from lcab_plugin.training.measure import StepTimer, peak_memory_gib
from lcab_plugin.training.records import RunLog, device_name, environment
from lcab_plugin.training.settings import ATTENTION, DEGREES, DTYPES, OPTIMIZERS, Settings

SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "seqlen")
PRESETS = {  # 1b and 7b are the shapes of Llama 3.2 1B and Mistral 7B
    "tiny": (4, 128, 8, 4, 384, 512),
    "125m": (12, 768, 12, 4, 3072, 2048),
    "1b": (16, 2048, 32, 8, 8192, 8192),
    "7b": (32, 4096, 32, 8, 14336, 32768),
}
DEFAULT_CONFIG = Path(__file__).with_name("configs") / "zero1.json"
ROPE_BASE = 500_000.0
LOGITS_AT_ONCE = 2**27  # elements: 512 MiB in float32


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


def rope(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [b, t, 1, head_dim / 2] at each token's own position, whichever rows this rank holds."""
    frequencies = ROPE_BASE ** -(torch.arange(0, head_dim, 2, device=positions.device).double() / head_dim)
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
        self.attention_norm, self.attention = nn.RMSNorm(config.hidden, eps=1e-6), SelfAttention(config)
        self.ffn_norm, self.ffn = nn.RMSNorm(config.hidden, eps=1e-6), SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, cp: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cp)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    """Decoder-only transformer; its output head shares no weights with the embedding."""

    def __init__(
        self, config: GPTConfig, activation_checkpointing: bool, keep_attention: bool = False
    ) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.kept = {"context_fn": lcab.keep_attention} if keep_attention else {}
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if into_residual else 0.02)
        self.parameter_count = sum(p.numel() for p in self.parameters())  # ZeRO 3 will take them apart

    def forward(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, mask: AttentionMask, cp: lcab.ContextParallel
    ) -> Tensor:
        """Cross entropy of each of this rank's tokens, float32 [b, t].

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
        return torch.cat([maybe_checkpoint(parts > 1, self.losses, *pair) for pair in pairs], dim=1)

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    def flops(self, tokens: int, area: int) -> int:
        """Of a forward and backward pass over so many tokens and (query, key) pairs."""
        c = self.config
        matrices = self.parameter_count - c.vocab * c.hidden  # the embedding is looked up
        return training_flops(matrices, tokens, area, layers=c.layers, heads=c.heads, head_dim=c.head_dim)


def maybe_checkpoint(recompute: bool, function: Callable[..., Tensor], *inputs: Any, **how: Any) -> Tensor:
    """Call ``function``; if ``recompute``, once more in the backward pass instead of keeping activations."""
    return checkpoint(function, *inputs, use_reentrant=False, **how) if recompute else function(*inputs)


class Shard(NamedTuple):
    """This rank's rows of one micro-batch: what the model's forward takes, and which tokens count."""

    inputs: tuple[Tensor, Tensor, Tensor, AttentionMask, lcab.ContextParallel]
    loss_mask: Tensor


class Window(NamedTuple):
    """The micro-batches that this rank reads in one optimizer step."""

    shards: list[Shard]
    digests: dict[int, str]
    area: int  # (query, key) pairs that attend in the whole sequences


def read_window(engine: Any, text: PackedText, step: int) -> Window:
    """Read the samples of this data-parallel rank and keep the rows of this context-parallel rank."""
    plugin, shards, digests, area = engine.lcab, [], {}, 0
    global_batch, micro_batch = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()
    for samples in window_samples(step, global_batch, micro_batch, plugin.dp_rank, plugin.dp_size):
        batch, mask = with_mask(text.batch(samples), plugin.config.mask)
        cp = plugin.cp.with_layout(mask=mask)
        tokens, labels, positions, loss_mask = (
            cp.shard(x, dim=1).to(engine.device)
            for x in (batch.tokens, batch.labels, batch.positions, batch.loss_mask)
        )
        shards.append(Shard((tokens, labels, positions, mask, cp), loss_mask))
        digests |= batch.digests
        area += mask.area * len(batch.tokens)
    return Window(shards, digests, area)


def train_step(engine: Any, window: Window, timer: StepTimer, gradients: Path | None) -> tuple[float, int]:
    """One optimizer step; returns the mean loss of its unmasked tokens over all ranks, and their number."""
    losses = engine.lcab.window([shard.loss_mask for shard in window.shards])
    for shard in window.shards:
        with timer("forward"):
            loss = losses.loss(engine(*shard.inputs))
        with timer("backward"):
            engine.backward(loss)
        if gradients is not None and engine.is_gradient_accumulation_boundary():
            save_gradients(engine, gradients)
        with timer("optimizer"):
            engine.step()
    return losses.mean(), losses.tokens


@torch.no_grad()
def evaluate(engine: Any, text: PackedText, batches: int) -> float:
    """Mean loss of the unmasked tokens in the first global batches of a text."""
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for step in range(batches):
        for shard in read_window(engine, text, step).shards:
            total[0] += engine(*shard.inputs).where(shard.loss_mask, 0.0).sum()
            total[1] += shard.loss_mask.sum()
    engine.train()
    loss, tokens = collectives.all_reduce_sum(total).tolist()
    return loss / tokens


def save_gradients(engine: Any, path: Path) -> None:
    """Write every parameter's gradient, averaged over all tokens, whole and not clipped: {name: float32}."""
    gradients = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    if collectives.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: gradient.float().cpu() for name, gradient in gradients.items()}, path)


def measure(engine: Any, window: Window, timer: StepTimer, seqlen: int, dtype: str) -> dict[str, Any]:
    """What a step took: time of the slowest rank, memory of the fullest, work of all together."""
    took = timer.take() | {"peak_memory_gib": peak_memory_gib(engine.device)}
    most = torch.tensor(list(took.values()), dtype=torch.float64, device=engine.device)
    took = dict(zip(took, collectives.all_reduce_max(most).tolist(), strict=True))
    shares = collectives.all_gather_object((window.digests, window.area))
    tokens, seconds = engine.train_batch_size() * seqlen, took["step_ms"] / 1e3
    flops = engine.module.flops(tokens, sum(area for _, area in shares) // engine.lcab.cp.size)
    peak = peak_flops(device_name(engine.device), dtype)
    return took | {
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "model_tflops": flops / 1e12,
        "mfu": mfu(flops, seconds, collectives.world_size(), peak),
        "batch_digest": batch_digest(digests for digests, _ in shares),
    }


class Run(NamedTuple):
    """Everything a run needs before its first step."""

    engine: Any
    settings: Settings
    text: PackedText
    validation_text: PackedText
    identity: dict[str, Any]
    first_step: int


def prepare(args: argparse.Namespace) -> Run:
    """Read config and text, build the model, let DeepSpeed and the plug-in wrap it, load a checkpoint."""
    lcab_deepspeed.init_distributed()
    settings = collectives.together(lambda: Settings(args.deepspeed_config))
    if args.dtype is None and not {"bf16", "fp16"} & settings.config.keys():
        args.dtype = "fp32" if get_accelerator().device_name() == "cpu" else "bf16"
    settings.apply(vars(args))
    corpora = collectives.together(lambda: open_corpus(args.data, args.vocab).split())
    options = {"seed": args.seed, "doc_lengths": args.doc_lengths, "loss_mask": args.loss_mask}
    text, validation_text = (PackedText(corpus, args.seqlen, **options) for corpus in corpora)

    torch.manual_seed(args.seed)  # the same weights on every rank, whatever the degrees
    shape = (args.layers, args.hidden, args.heads, args.kv_heads, args.head_dim, args.ffn)
    model = GPT(GPTConfig(text.corpus.vocab, *shape), args.activation_checkpointing, args.keep_attention)
    engine, _, _, _ = lcab_deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=settings.config,
        lr_scheduler=None if "scheduler" in settings.config else partial(warm_up, steps=args.warmup),
    )
    identity = {  # what a resumed run must have in common with the one that it continues
        "model": asdict(model.config),
        "global_batch": engine.train_batch_size(),
        "data_digest": text.corpus.digest,
        **{key: getattr(args, key) for key in ("seqlen", "doc_lengths", "loss_mask", "seed")},
    }
    first_step = resume(engine, args.resume, identity) if args.resume else 0
    if first_step >= args.steps:
        raise LcabError(f"--resume {args.resume} has done {first_step} steps; give more --steps than that.")
    return Run(engine, settings, text, validation_text, identity, first_step)


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A learning rate that rises over so many steps and stays."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps)))


def resume(engine: Any, directory: str, identity: dict[str, Any]) -> int:
    """Load the latest checkpoint; returns the number of steps it has done."""
    path, state = engine.load_checkpoint(directory)
    if path is None:
        raise LcabError(f"--resume {directory} holds no checkpoint; give the folder that --save wrote.")
    saved = state.get("identity", {})
    for key, value in identity.items():
        if saved.get(key) != value:
            raise LcabError(f"--resume {directory} has {key} {saved.get(key)}, this run {value}.")
    return state["step"]


def main() -> None:
    """Train as the command line says."""
    args = parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, settings, text, validation_text, identity, first_step = prepare(args)
    name = args.name or f"{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, leads = Path(args.out, name, "metrics.jsonl"), collectives.rank() == 0
    facts = {"name": name, "steps": args.steps, "first_step": first_step, "data": text.corpus.facts()}
    facts |= identity | {"parameters": engine.module.parameter_count} | settings.resolved(engine)
    log = collectives.together(lambda: RunLog(path, append=bool(args.resume), enabled=leads))
    timer = StepTimer(engine.device, ("data", "step", "forward", "backward", "optimizer"))
    validation_loss = None

    with log, Progress(args.steps, start=first_step, enabled=leads) as progress:
        for line in settings.overrides:
            progress.message(line)
        log.write("run", **facts, **environment(engine.device))
        for step in range(first_step, args.steps):
            rate = engine.get_lr()[0]
            with timer("data"):
                window = read_window(engine, text, step)
            with timer("step"):
                gradients = args.save_gradients if step == first_step else None
                loss, loss_tokens = train_step(engine, window, timer, gradients)
            took = measure(engine, window, timer, args.seqlen, settings.dtype)
            norm = float(engine.get_global_grad_norm())
            log.write("step", step=step, loss=loss, grad_norm=norm, lr=rate, loss_tokens=loss_tokens, **took)
            progress.update(loss, took["tokens_per_s"], took["step_ms"], took["peak_memory_gib"])
            if not math.isfinite(loss):
                raise LcabError(f"the loss of step {step} is {loss}; lower --lr or raise --warmup.")

            done, last = step + 1, step + 1 == args.steps
            if args.eval_batches and (last or (args.eval_every and done % args.eval_every == 0)):
                validation_loss = evaluate(engine, validation_text, args.eval_batches)
                log.write("eval", step=step, loss=validation_loss)
                progress.message(f"step {done}: validation loss {validation_loss:.4f}")
            if args.save and (last or (args.save_every and done % args.save_every == 0)):
                state = {"step": done, "identity": identity}
                engine.save_checkpoint(args.save, tag=f"step{done}", client_state=state)
        log.write("end", step=step, loss=loss, validation_loss=validation_loss)
        final = "" if validation_loss is None else f", validation loss {validation_loss:.4f}"
        progress.message(f"train loss {loss:.4f}{final}; records: {path}")


def parse_args() -> argparse.Namespace:
    """Flags, with the preset's sizes where they were left out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("sizes").add_argument
    add("--preset", choices=PRESETS, default="tiny", help="gives the sizes that are left out (%(default)s)")
    for i, size in enumerate(SIZES):
        shown = ", ".join(str(sizes[i]) for sizes in PRESETS.values())
        add(f"--{size.replace('_', '-')}", type=positive, metavar="N", help=f"(by preset: {shown})")
    add("--head-dim", type=positive, metavar="N", help="(hidden / heads)")
    add("--vocab", type=positive, metavar="N", help="a Megatron dataset needs it; text is bytes (257)")
    add("--activation-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    add("--keep-attention", action="store_true", help="but neither attention nor its communication")

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="PATH", help="text file, folder or Megatron .bin/.idx (Python's documentation)")
    add("--doc-lengths", choices=distributions(), help="cut documents as in that corpus, not at their ends")
    add("--loss-mask", choices=LOSS_MASKS, default="none", help="uneven: count answers of uneven length")

    add = parser.add_argument_group("training, over the DeepSpeed config").add_argument
    add("--deepspeed_config", metavar="FILE", default=DEFAULT_CONFIG, help="(configs/zero1.json)")
    add("--steps", type=positive, default=50, metavar="N", help="optimizer steps in all (%(default)s)")
    add("--global-batch", type=positive, metavar="N", help="samples of an optimizer step")
    add("--micro-batch", type=positive, metavar="N", help="samples of a forward pass")
    add("--dtype", choices=DTYPES, help="(bf16 on a GPU, fp32 on a CPU, if the config does not say)")
    add("--optimizer", choices=OPTIMIZERS)
    add("--lr", type=float, metavar="RATE", help="learning rate, after the warm-up")
    add("--warmup", type=int, default=10, metavar="N", help="steps, if the config has no scheduler (10)")
    add("--weight-decay", type=float, metavar="RATE")
    add("--clip", type=float, metavar="NORM", help="largest gradient norm; 0 for no limit")
    add("--seed", type=int, default=0, metavar="N", help="of weights and data (%(default)s)")

    add = parser.add_argument_group('attention, over the section "lcab" of the config').add_argument
    for key in ATTENTION:
        field = lcab.AttentionConfig.model_fields[key]
        flag = f"--{key.replace('_', '-')}"
        add(flag, type=int if key in DEGREES else str, metavar=key.upper(), help=field.description)

    add = parser.add_argument_group("run").add_argument
    add("--name", help="of the run (preset and time)")
    add("--out", metavar="DIR", default="runs", help="records go to DIR/NAME/metrics.jsonl (%(default)s)")
    add("--eval-every", type=int, default=0, metavar="N", help="steps between validations; the end has one")
    add("--eval-batches", type=int, default=2, metavar="N", help="global batches of one; 0 for none (2)")
    add("--save", metavar="DIR", help="write DeepSpeed checkpoints there, the last at the end")
    add("--save-every", type=int, default=0, metavar="N", help="and one every so many steps")
    add("--resume", metavar="DIR", help="go on from the latest checkpoint there")
    add("--save-gradients", type=Path, metavar="FILE", help="of the first step, {name: tensor}")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it

    args = parser.parse_args()
    for size, value in zip(SIZES, PRESETS[args.preset], strict=True):
        setattr(args, size, getattr(args, size) or value)
    args.head_dim = args.head_dim or args.hidden // args.heads
    if args.head_dim % 2:
        parser.error(f"--head-dim {args.head_dim} is odd, and RoPE turns pairs: give an even one")
    if args.keep_attention and not args.activation_checkpointing:
        parser.error("--keep-attention says what --activation-checkpointing leaves out: give both")
    return args


def positive(text: str) -> int:
    """An integer above zero."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


if __name__ == "__main__":
    try:
        main()
    except LcabError as error:
        sys.exit(f"train_gpt.py: {error}")
    torch.distributed.destroy_process_group()
