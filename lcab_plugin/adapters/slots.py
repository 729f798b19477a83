"""The attention modules of a model: finding them, binding them, and saying what each resolved to."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lcab_plugin import kernels
from lcab_plugin.attention import Attention
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import ContextParallel
from lcab_plugin.errors import LcabError, UnsupportedError


def find(model: nn.Module) -> list[tuple[str, Attention]]:
    """Every ``lcab_plugin.Attention`` of the model with its dotted name.

    Raises:
        LcabError: the model has none.
    """
    slots = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    if not slots:
        raise LcabError(
            f"{type(model).__name__} has no attention slot: build lcab_plugin.Attention() where the model "
            "calls its attention, as self.attn(q, k, v, mask) with tensors [batch, tokens, heads, head_dim]"
        )
    return slots


def bind(
    slots: list[tuple[str, Attention]], config: AttentionConfig, cp: ContextParallel
) -> list[tuple[str, str]]:
    """Bind every slot to the config and the groups; returns (name, what it resolved to).

    Raises:
        UnsupportedError: the kernel cannot run on this machine, with the reason.
    """
    kernel = kernels.get(config.kernel)
    reason = kernel.unavailable()
    if reason is not None:
        raise UnsupportedError(f"kernel {config.kernel!r} cannot run here: {reason}")
    resolved = []
    for name, module in slots:
        module.bind(config, cp)
        resolved.append(
            (
                name,
                f"{type(module).__name__}: kernel {config.kernel} ({kernel.version()}), "
                f"strategy {cp.describe()}, mask {config.mask}",
            )
        )
    return resolved


def lines(resolved: Iterable[tuple[str, str]]) -> list[str]:
    """One line for the slots that differ only in their layer number: ``layers.0-11.attn  Attention: ...``."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, description in resolved:
        match = re.search(r"\d+", name)
        before, number, after = (
            (name[: match.start()], int(match[0]), name[match.end() :]) if match else (name, -1, "")
        )
        groups.setdefault((before, after, description), []).append(number)
    return [
        f"{before}{'' if numbers == [-1] else _ranges(numbers)}{after}  {description}"
        for (before, after, description), numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
