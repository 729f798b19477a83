"""The plug-in's settings as arguments of a Megatron training script."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import ALIASES
from lcab_plugin.errors import LcabError

# Megatron fixes the layout (its RoPE and its batches are sliced in zigzag), and names the scale itself.
_LEFT_OUT = ("layout", "scale")


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
    a2a+p2p.

    Raises:
        LcabError: a key or value that is not known, or a ``--cp-comm-type`` per layer.
    """
    path = getattr(args, "lcab_config", None)
    settings = AttentionConfig.from_json(path).model_dump(exclude_unset=True) if path else {}
    for name in AttentionConfig.model_fields:
        value = getattr(args, f"lcab_{name}", None)
        if value is not None:
            settings[name] = value
    if "strategy" not in settings and getattr(args, "context_parallel_size", 1) > 1:
        settings = {**_strategy_of(args), **settings}
    return AttentionConfig.from_dict(settings)


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
