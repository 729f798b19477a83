"""The parameters of the examples' GPT as Megatron's GPTModel arranges and cuts them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.errors import LcabError
from lcab_plugin.training.gpt import GPTConfig

# Megatron's parameter: ours that it holds, and the dimension that tensor parallelism cuts (None: none).
_PARAMETERS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "embedding.word_embeddings.weight": (("embedding.weight",), 0),
    "decoder.final_layernorm.weight": (("norm.weight",), None),
    "output_layer.weight": (("head.weight",), 0),
}
_OF_A_LAYER: dict[str, tuple[tuple[str, ...], int | None]] = {
    "input_layernorm.weight": (("attention_norm.weight",), None),
    "self_attention.linear_qkv.weight": (
        ("attention.query.weight", "attention.key.weight", "attention.value.weight"),
        0,
    ),
    "self_attention.linear_proj.weight": (("attention.out.weight",), 1),
    "pre_mlp_layernorm.weight": (("ffn_norm.weight",), None),
    "mlp.linear_fc1.weight": (("ffn.gate.weight", "ffn.up.weight"), 0),
    "mlp.linear_fc2.weight": (("ffn.down.weight",), 1),
}


def global_name(name: str, first_layer: int) -> str:
    """A parameter's name with its layer counted over all pipeline stages; ``first_layer``: of this one."""
    return re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + first_layer}.", name)


def to_megatron(name: str, config: GPTConfig, seed: int, tp_rank: int, tp_size: int) -> Tensor:
    """What a tensor-parallel rank holds at first of the Megatron parameter with that global name."""
    sources, dim = _sources(name)
    parts = [config.initial(source, seed) for source in sources]
    if len(parts) > 1:  # dealt by units: a group of query heads with its key and value, or a rank's share
        units = _units(name, config, tp_size)
        parts = [torch.cat([part.unflatten(0, (units, -1)) for part in parts], dim=1).flatten(0, 1)]
    return parts[0] if dim is None else parts[0].chunk(tp_size, dim)[tp_rank]


@torch.no_grad()
def fill(
    parameters: Iterable[tuple[str, Tensor]], config: GPTConfig, seed: int, tp_rank: int, tp_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Give Megatron's parameters, by global name, their first values; returns both."""
    filled = []
    for name, parameter in parameters:
        filled.append((parameter, to_megatron(name, config, seed, tp_rank, tp_size)))
        parameter.copy_(filled[-1][1])
    return filled


def from_megatron(name: str, shards: Sequence[Tensor], config: GPTConfig) -> Mapping[str, Tensor]:
    """Ours, by name, from what each tensor-parallel rank holds of a Megatron parameter."""
    sources, dim = _sources(name)
    whole = shards[0] if dim is None else torch.cat(list(shards), dim)
    if len(sources) == 1:
        return {sources[0]: whole}
    units = _units(name, config, len(shards))
    rows = [config.shapes()[source][0] // units for source in sources]
    parts = whole.unflatten(0, (units, -1)).split(rows, dim=1)
    return {source: part.flatten(0, 1) for source, part in zip(sources, parts, strict=True)}


def merge(parts: Sequence[tuple[int, Mapping[str, Tensor]]], config: GPTConfig) -> dict[str, Tensor]:
    """Ours, by name, from (tensor-parallel rank, its Megatron parameters by global name) of all stages."""
    shards: dict[str, dict[int, Tensor]] = {}
    for tp_rank, held in parts:
        for name, value in held.items():
            shards.setdefault(name, {})[tp_rank] = value
    whole: dict[str, Tensor] = {}
    for name, by_rank in shards.items():
        whole |= from_megatron(name, [by_rank[rank] for rank in sorted(by_rank)], config)
    return whole


def require_degrees(
    config: GPTConfig, seqlen: int, tp: int, pp: int, cp: int, sequence_parallel: bool
) -> None:
    """Check that model and sequences can be cut over so many tensor-, pipeline- and context-parallel ranks.

    Raises:
        LcabError: names the flag that does not fit.
    """
    if config.layers % pp:
        raise LcabError(
            f"--layers {config.layers} do not divide into --pipeline-parallel {pp} stages of equal length; "
            "change one of them"
        )
    for size in ("heads", "kv_heads", "ffn", "vocab"):
        value = getattr(config, size)
        if value % tp:
            raise LcabError(
                f"--{size.replace('_', '-')} {value} does not divide by --tensor-parallel {tp}; give "
                f"{-(-value // tp) * tp}, or another degree"
            )
    if sequence_parallel and tp == 1:
        raise LcabError("--sequence-parallel is over the tensor-parallel ranks; give --tensor-parallel 2")
    parts = (2 * cp if cp > 1 else 1) * (tp if sequence_parallel else 1)
    if seqlen % parts:
        raise LcabError(
            f"--seqlen {seqlen} does not divide into the {parts} parts that these degrees cut a sequence "
            f"into; give {-(-seqlen // parts) * parts}"
        )


def _sources(name: str) -> tuple[tuple[str, ...], int | None]:
    if name in _PARAMETERS:
        return _PARAMETERS[name]
    _, _, layer, rest = name.split(".", 3)  # decoder.layers.NUMBER.rest
    sources, dim = _OF_A_LAYER[rest]
    return tuple(f"blocks.{layer}.{source}" for source in sources), dim


def _units(name: str, config: GPTConfig, tp_size: int) -> int:
    return config.kv_heads if "linear_qkv" in name else tp_size


def masters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The values that it changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def begin_exactly(optimizer: Any, first: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Let the float32 parameters of Megatron's ``optimizer`` begin with the ``first`` values of the model's
    parameters, of which Megatron gives them what bf16 kept: in the middle between two of its roundings, where
    small first updates of a rising learning rate change no weight.

    Three bf16 numbers add up to a float32 one. The optimizer copies one after the other from the model, the
    largest last, by `reload_model_params`, which each kind of its optimizers has.
    """
    values = [value for inner in optimizer.chained_optimizers for value in masters(inner.optimizer)]
    sums = [torch.zeros_like(value) for value in values]
    for smaller in (2, 1, 0):
        for parameter, exact in first:
            part = exact.to(parameter.device, torch.float32)
            for _ in range(smaller):
                part = part - part.to(parameter.dtype)
            parameter.copy_(part)
        optimizer.reload_model_params()
        for total, value in zip(sums, values, strict=True):
            total += value
    for total, value in zip(sums, values, strict=True):
        value.copy_(total)
