"""The plug-in's settings as arguments of a Megatron training script."""

from __future__ import annotations

import argparse
from typing import Any, get_args

import torch

from lcab_plugin import masks
from lcab_plugin.adapters.decide import decide
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import ALIASES
from lcab_plugin.errors import LcabError
from lcab_plugin.planner import AUTO, Workload

# Megatron fixes the layout (its RoPE and its batches are sliced in zigzag), and names the scale itself.
_LEFT_OUT = ("layout", "scale")
# Megatron's arguments say nothing of the documents to come: "auto" is decided for lengths of that corpus.
_DOCUMENTS = "pile"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--lcab-kernel``, ``--lcab-strategy``, ``--lcab-ulysses`` and the other settings, and
    ``--lcab-config file.json`` with the same keys; fits Megatron's ``extra_args_provider``."""
    group = parser.add_argument_group("lcab", "attention kernel, context-parallel strategy and mask family")
    group.add_argument(
        "--lcab-config", metavar="FILE", help="JSON file of settings; a flag given beside it wins"
    )
    for name, field in AttentionConfig.model_fields.items():
        if name in _LEFT_OUT:
            continue
        kind = next(t for t in (*get_args(field.annotation), field.annotation) if isinstance(t, type))
        how: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        group.add_argument(f"--lcab-{name.replace('_', '-')}", default=None, help=field.description, **how)
    return parser


def config_from_args(args: argparse.Namespace) -> AttentionConfig:
    """The settings of ``--lcab-*``, over those of ``--lcab-config``.

    Where neither names a strategy and ``--context-parallel-size`` is above 1, Megatron's own
    ``--cp-comm-type`` (p2p by default) names it, and ``--hierarchical-context-parallel-sizes`` the degrees of
    a2a+p2p. Settings of ``"auto"`` are decided for Megatron's arguments (sequence length, heads of a
    tensor-parallel rank, dtype), documents of lengths as in the Pile; ``describe`` says how.

    Raises:
        LcabError: a key or value that is not known, a ``--cp-comm-type`` per layer, or nothing that
            ``"auto"`` could stand for.
    """
    path = getattr(args, "lcab_config", None)
    settings = AttentionConfig.from_json(path).model_dump(exclude_unset=True) if path else {}
    for name in AttentionConfig.model_fields:
        value = getattr(args, f"lcab_{name}", None)
        if value is not None:
            settings[name] = value
    if "strategy" not in settings and getattr(args, "context_parallel_size", 1) > 1:
        settings = {**_strategy_of(args), **settings}
    config = AttentionConfig.from_dict(settings)
    if not config.undecided:
        return config
    tp = args.tensor_model_parallel_size
    return decided(config, _workload(args, config, tp), args.context_parallel_size, tp)


def decided(config: AttentionConfig, workload: Workload, cp: int, tp: int) -> AttentionConfig:
    """``config`` with what the planner puts for ``"auto"`` in Megatron's order of ranks, where ``tp``
    tensor-parallel ranks stand between two context-parallel neighbours; the layout is zigzag.

    Raises:
        LcabError: nothing can run.
    """
    if config.layout == AUTO:
        config = AttentionConfig.from_dict({**config.to_dict(), "layout": "zigzag"})
    return decide(config, workload, cp, "cuda" if torch.cuda.is_available() else "cpu", stride=tp)


def _workload(args: argparse.Namespace, config: AttentionConfig, tp: int) -> Workload:
    """Attention of one of ``tp`` tensor-parallel ranks under a mask of the family.

    Raises:
        LcabError: heads of two sizes (MLA), or a family that needs more than the ends of documents.
    """
    if getattr(args, "multi_latent_attention", False):
        raise LcabError(
            "'auto' plans heads of one size and MLA's have two; give --lcab-kernel and --lcab-strategy names"
        )
    n, heads = args.seq_length, args.num_attention_heads
    name, lengths = "a whole sequence", {}
    if masks.needs_lengths(config.mask):
        name, lengths = f"documents as in {_DOCUMENTS}", {"lengths": masks.sample_lengths(n, _DOCUMENTS, 0)}
    try:
        mask = masks.from_name(config.mask, n, **lengths)
    except LcabError as error:
        raise LcabError(
            f"'auto' cannot tell a typical mask from Megatron's arguments: {error} Give --lcab-kernel and "
            "--lcab-strategy names, or an AttentionConfig that is decided()"
        ) from None
    groups = args.num_query_groups if getattr(args, "group_query_attention", False) else heads
    head_dim = args.kv_channels or args.hidden_size // heads
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return Workload(mask, heads // tp, max(1, groups // tp), head_dim, dtype, name)


def _strategy_of(args: argparse.Namespace) -> dict[str, Any]:
    """The strategy that Megatron's own arguments name."""
    named = getattr(args, "cp_comm_type", None) or ["p2p"]
    names = {named} if isinstance(named, str) else set(named)
    if len(names) > 1:
        raise LcabError(
            f"--cp-comm-type {' '.join(named)} differs from layer to layer; the plug-in runs one strategy in "
            "all of them: give --lcab-strategy"
        )
    (name,) = names
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None)
    degrees = {"ulysses": sizes[0], "ring": sizes[1]} if name == "a2a+p2p" and sizes else {}
    return {"strategy": ALIASES.get(name, name), **degrees}
