"""The examples' GPT: first values that depend on names and seed alone, and their cut in Megatron's model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import rms_norm

from lcab_plugin.errors import LcabError
from lcab_plugin.training import gpt_in_megatron
from lcab_plugin.training.gpt import PRESETS, GPTConfig

CONFIG = GPTConfig(vocab=12, layers=4, hidden=16, heads=8, kv_heads=4, head_dim=2, ffn=24)


def megatron_names(config: GPTConfig) -> list[str]:
    layer = [
        f"decoder.layers.{i}.{name}" for i in range(config.layers) for name in gpt_in_megatron._OF_A_LAYER
    ]
    return [*gpt_in_megatron._PARAMETERS, *layer]


def test_first_values_depend_on_name_and_seed() -> None:
    name = "blocks.1.attention.query.weight"
    assert torch.equal(CONFIG.initial(name, 3), CONFIG.initial(name, 3))
    others = [CONFIG.initial(name, 4), CONFIG.initial("blocks.0.attention.query.weight", 3)]
    assert not any(torch.equal(CONFIG.initial(name, 3), other) for other in others)
    assert torch.equal(CONFIG.initial("norm.weight", 0), torch.ones(16))
    wide = GPTConfig(vocab=512, layers=8, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512)
    assert wide.initial("embedding.weight", 0).std().item() == pytest.approx(1.0, rel=0.02)
    assert wide.initial("head.weight", 0).std().item() == pytest.approx(0.02, rel=0.02)
    assert wide.initial("blocks.0.ffn.down.weight", 0).std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert wide.parameters == sum(math.prod(shape) for shape in wide.shapes().values())


def test_attention_adds_little_to_what_it_finds() -> None:
    """Else the first gradients are large and the loss spikes (arXiv 2312.16903), as 1b's did."""
    layers, hidden, heads, kv_heads, ffn, _ = PRESETS["1b"]
    config = GPTConfig(257, layers, hidden, heads, kv_heads, hidden // heads, ffn)
    names = ("embedding", "blocks.0.attention.value", "blocks.0.attention.out")
    embedding, value, out = (config.initial(f"{name}.weight", 0) for name in names)
    of_keys = rms_norm(embedding, embedding.shape[1:]) @ value.T  # every token sees itself alone
    added = of_keys.unflatten(1, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 1).flatten(1) @ out.T
    assert added.norm() < embedding.norm() / 2


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_megatron_shards_hold_every_value_once(tp: int) -> None:
    parts = [
        (
            rank,
            {name: gpt_in_megatron.to_megatron(name, CONFIG, 0, rank, tp) for name in megatron_names(CONFIG)},
        )
        for rank in reversed(range(tp))
    ]
    whole = gpt_in_megatron.merge(parts, CONFIG)
    assert whole.keys() == CONFIG.shapes().keys()
    for name, value in whole.items():
        assert torch.equal(value, CONFIG.initial(name, 0)), name


def test_rows_of_a_group_lie_together() -> None:
    """linear_qkv: for each group its query heads, then its key, then its value; fc1: gate, then up."""
    qkv = gpt_in_megatron.to_megatron("decoder.layers.2.self_attention.linear_qkv.weight", CONFIG, 0, 1, 2)
    q, k, v = (CONFIG.initial(f"blocks.2.attention.{x}.weight", 0) for x in ("query", "key", "value"))
    assert torch.equal(qkv, torch.cat([q[8:12], k[4:6], v[4:6], q[12:16], k[6:8], v[6:8]]))
    fc1 = gpt_in_megatron.to_megatron("decoder.layers.0.mlp.linear_fc1.weight", CONFIG, 0, 1, 2)
    gate, up = (CONFIG.initial(f"blocks.0.ffn.{x}.weight", 0) for x in ("gate", "up"))
    assert torch.equal(fc1, torch.cat([gate[12:], up[12:]]))


def test_layers_count_over_all_stages() -> None:
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert gpt_in_megatron.global_name(name, 2) == "decoder.layers.3.mlp.linear_fc2.weight"
    assert gpt_in_megatron.global_name("output_layer.weight", 2) == "output_layer.weight"


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"pp": 3}, "--layers 4 do not divide into --pipeline-parallel 3"),
        ({"tp": 8}, "--kv-heads 4 does not divide by --tensor-parallel 8; give 8"),
        ({"tp": 3}, "--heads 8 does not divide by --tensor-parallel 3; give 9"),
        ({"sequence_parallel": True}, "give --tensor-parallel 2"),
        ({"cp": 3}, "--seqlen 64 does not divide into the 6 parts .* give 66"),
        ({"cp": 4, "tp": 4, "sequence_parallel": True, "seqlen": 48}, "the 32 parts"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(degrees: dict[str, int], words: str) -> None:
    fitting = {"seqlen": 64, "tp": 1, "pp": 1, "cp": 1, "sequence_parallel": False}
    gpt_in_megatron.require_degrees(CONFIG, **fitting)  # type: ignore[arg-type]
    with pytest.raises(LcabError, match=words):
        gpt_in_megatron.require_degrees(CONFIG, **fitting | degrees)  # type: ignore[arg-type]
