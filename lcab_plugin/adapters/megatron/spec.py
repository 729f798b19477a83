"""Putting the slot's module into Megatron's specs, and saying what resolved."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from lcab_plugin.adapters import slots
from lcab_plugin.adapters.megatron.core_attention import CoreAttention
from lcab_plugin.adapters.megatron.groups import Plug, plug
from lcab_plugin.config import AttentionConfig
from lcab_plugin.errors import LcabError

S = TypeVar("S")

# What the plug-in stands in for. Others (DSA's sparse attention, say) are not attention over a mask.
_REPLACED = ("DotProductAttention", "TEDotProductAttention", "KitchenDotProductAttention", "CoreAttention")


def core_attention_class(plug: Plug) -> type[CoreAttention]:
    """The slot's class with its settings: a class, as every version takes one and copies it as it is."""
    return type("CoreAttention", (CoreAttention,), {"plug": plug, "__module__": CoreAttention.__module__})


def swap_core_attention(spec: S, config: AttentionConfig, pg_collection: Any = None) -> S:
    """A copy of ``spec`` with the plug-in in every ``core_attention``.

    Collective over the world: call it on every rank after ``initialize_model_parallel``, before the model is
    built.

    Args:
        spec: of a layer, a block or anything that holds them (GPT, MoE, MLA, MTP).
        config: the settings.
        pg_collection: Megatron's groups for this model, where they are not ``parallel_state``'s.

    Raises:
        LcabError: settings that do not fit, or a spec without a core attention to replace.
    """
    own = core_attention_class(plug(config, pg_collection))
    replaced: list[str] = []
    swapped = _swapped(spec, own, replaced)
    if not replaced:
        raise LcabError(
            f"{type(spec).__name__} holds no core_attention to replace; give a layer or block spec"
        )
    return swapped


def _swapped(node: Any, own: type, replaced: list[str]) -> Any:
    """``node`` with every field ``core_attention`` below it replaced; what is not touched is shared."""
    if isinstance(node, list | tuple) and not hasattr(node, "_fields"):
        return type(node)(_swapped(child, own, replaced) for child in node)
    if isinstance(node, dict):
        return {key: _swapped(child, own, replaced) for key, child in node.items()}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    new = copy.copy(node)
    for field in dataclasses.fields(node):
        child = getattr(node, field.name)
        if field.name == "core_attention":
            name = _class_name(child)
            if name == "IdentityOp":
                continue
            if name not in _REPLACED:
                raise LcabError(
                    f"core_attention is {name}, which is more than attention under a mask; the plug-in "
                    f"replaces {', '.join(_REPLACED[:-1])}"
                )
            replaced.append(name)
            setattr(new, field.name, own)
        else:
            setattr(new, field.name, _swapped(child, own, replaced))
    return new


def _class_name(module: Any) -> str:
    inner = module.module if isinstance(module, ModuleSpec) else module
    return inner[-1] if isinstance(inner, tuple) else getattr(inner, "__name__", str(inner))


@contextmanager
def swap_provider(config: AttentionConfig, pg_collection: Any = None) -> Iterator[None]:
    """Inside, the specs that Megatron's own functions make (local and TransformerEngine's) have the plug-in
    as their core attention; what they choose by other settings (MoE, MLA, qk-norm, MTP) stays theirs.

    Collective over the world, like :func:`swap_core_attention`; models must be built inside.

    Raises:
        LcabError: settings that do not fit, or a megatron-core before 0.13, which has no providers.
    """
    own = core_attention_class(plug(config, pg_collection))
    providers = _providers()
    before = [(provider, provider.__dict__["core_attention"]) for provider in providers]
    replacement: Callable[[Any], type] = lambda self: own  # noqa: E731
    for provider in providers:
        provider.core_attention = replacement
    try:
        yield
    finally:
        for provider, method in before:
            provider.core_attention = method


def _providers() -> list[Any]:
    try:
        from megatron.core.models import backends
    except ImportError:
        raise LcabError(
            "this megatron-core has no spec providers (0.13 and later do); use swap_core_attention(spec, "
            "config)"
        ) from None
    found = [backends.LocalSpecProvider]
    try:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    except ImportError:
        return found
    return [*found, TESpecProvider]


def describe(model: nn.Module | Iterable[nn.Module]) -> list[str]:
    """What resolved in every layer that this rank holds, a line for layers alike, after what was chosen for
    ``"auto"``; empty for a pipeline stage without attention.

    Raises:
        UnsupportedError: attention dropout of a model in training mode.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    found = [
        (name, module)
        for chunk in chunks
        for name, module in chunk.named_modules()
        if isinstance(module, CoreAttention)
    ]
    chosen = {p.config.chosen.sentence: None for _, m in found if (p := m.plug) and p.config.chosen}
    return [*chosen, *slots.lines((name, module.describe()) for name, module in found)]
