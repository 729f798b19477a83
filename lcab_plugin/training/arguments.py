"""The flags that the examples have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from lcab_plugin.config import AttentionConfig
from lcab_plugin.masks import distributions
from lcab_plugin.training.data import LOSS_MASKS
from lcab_plugin.training.gpt import PRESETS, RATES, SIZES, GPTConfig
from lcab_plugin.training.settings import ATTENTION, DEGREES, DTYPES, OPTIMIZERS


def positive(text: str) -> int:
    """An integer above zero."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of the model's sizes and of the data."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("sizes").add_argument
    add("--preset", choices=PRESETS, default="tiny", help="gives the sizes that are left out (%(default)s)")
    for i, size in enumerate(SIZES):
        shown = ", ".join(str(sizes[i]) for sizes in PRESETS.values())
        add(f"--{size.replace('_', '-')}", type=positive, metavar="N", help=f"(by preset: {shown})")
    add("--head-dim", type=positive, metavar="N", help="(hidden / heads)")
    add("--vocab", type=positive, metavar="N", help="a Megatron dataset needs it; text is bytes (257)")

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="PATH", help="text file, folder or Megatron .bin/.idx (Python's documentation)")
    add("--doc-lengths", choices=distributions(), help="cut documents as in that corpus, not at their ends")
    add("--loss-mask", choices=LOSS_MASKS, default="none", help="uneven: count answers of uneven length")
    return parser


def add_training(group: argparse._ArgumentGroup) -> None:
    """Batches, optimizer and learning rate."""
    add = group.add_argument
    add("--steps", type=positive, default=50, metavar="N", help="optimizer steps in all (%(default)s)")
    add("--global-batch", type=positive, metavar="N", help="samples of an optimizer step")
    add("--micro-batch", type=positive, metavar="N", help="samples of a forward pass")
    add("--dtype", choices=DTYPES, help="(bf16 on a GPU, fp32 on a CPU)")
    add("--optimizer", choices=OPTIMIZERS)
    shown = ", ".join(f"{RATES[preset]:g}" for preset in PRESETS)
    add("--lr", type=float, metavar="RATE", help=f"learning rate, after the warm-up (by preset: {shown})")
    add("--warmup", type=int, default=10, metavar="N", help="steps in which it rises (%(default)s)")
    add("--weight-decay", type=float, metavar="RATE")
    add("--clip", type=float, metavar="NORM", help="largest gradient norm; 0 for no limit")
    add("--seed", type=int, default=0, metavar="N", help="of weights and data (%(default)s)")


def add_attention(group: argparse._ArgumentGroup) -> None:
    """The settings of the plug-in."""
    for key in ATTENTION:
        field = AttentionConfig.model_fields[key]
        flag = f"--{key.replace('_', '-')}"
        kind = int if key in DEGREES else str
        group.add_argument(flag, type=kind, metavar=key.upper(), help=field.description)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Records, validation and checkpoints."""
    add = parser.add_argument_group("run").add_argument
    add("--name", help="of the run (preset and time)")
    add("--out", metavar="DIR", default="runs", help="records go to DIR/NAME/metrics.jsonl (%(default)s)")
    add("--eval-every", type=int, default=0, metavar="N", help="steps between validations; the end has one")
    add("--eval-batches", type=int, default=2, metavar="N", help="global batches of one; 0 for none (2)")
    add("--recall", type=int, default=0, metavar="N", help="samples of the recall task at the end (none)")
    add("--save", metavar="DIR", help="write checkpoints there, the last at the end")
    add("--save-every", type=int, default=0, metavar="N", help="and one every so many steps")
    add("--resume", metavar="DIR", help="go on from the latest checkpoint there")
    add("--save-gradients", type=Path, metavar="FILE", help="of the first step, {name: tensor}")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the preset's sizes where they were left out."""
    args = parser.parse_args()
    for size, value in zip(SIZES, PRESETS[args.preset], strict=True):
        setattr(args, size, getattr(args, size) or value)
    args.head_dim = args.head_dim or args.hidden // args.heads
    if args.head_dim % 2:
        parser.error(f"--head-dim {args.head_dim} is odd, and RoPE turns pairs: give an even one")
    return args


def model_config(args: argparse.Namespace, vocab: int) -> GPTConfig:
    """The model of these flags."""
    shape = (args.layers, args.hidden, args.heads, args.kv_heads, args.head_dim, args.ffn)
    return GPTConfig(vocab, *shape)
