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

# As models call the dropout of probabilities; a plain "dropout" may be the residual's.
_DROPOUT = ("attention_dropout", "attn_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def find(model: nn.Module) -> list[tuple[str, Attention]]:
    """Every ``lcab_plugin.Attention`` of the model with its dotted name.

    Raises:
        LcabError: the model has none, or one stands in a module with attention dropout.
    """
    slots = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    if not slots:
        raise LcabError(
            f"{type(model).__name__} has no attention slot: build lcab_plugin.Attention() where the model "
            "calls its attention, as self.attn(q, k, v, mask) with tensors [batch, tokens, heads, head_dim]"
        )
    for name, _ in slots:
        _refuse_dropout(*_around(model, name))
    return slots


def _around(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The module that the slot called ``name`` stands in, and its name."""
    path = name.rpartition(".")[0]
    return path or type(model).__name__, model.get_submodule(path)


def _refuse_dropout(path: str, module: nn.Module) -> None:
    """No kernel here drops probabilities, so that a model made for it would train without a word."""
    for name in _DROPOUT:
        value = getattr(module, name, 0.0)
        rate = value.p if isinstance(value, nn.Dropout) else value
        if isinstance(rate, float | int) and rate > 0:
            raise UnsupportedError(
                f"{path} has {name} = {rate}, but attention dropout is not applied here; set it to 0"
            )


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
