"""The slot by itself: what its arguments mean, what it refuses, its checkpoints, specs and arguments."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from lcab_plugin import masks
from lcab_plugin.errors import LcabError
from tests import distributed


def refuse(rank: int, world: int) -> None:
    from tests.adapters import megatron_model
    from tests.adapters.megatron_slot import bad_inputs

    megatron_model.start_megatron(cp=world)
    wrong = {}
    for name, (do, words) in bad_inputs().items():
        try:
            do()
            wrong[name] = "nothing was raised"
        except LcabError as error:
            if words not in str(error):
                wrong[name] = str(error)
    assert not wrong, wrong


def arguments_of_forward(rank: int, world: int) -> None:
    from megatron.core.transformer.enums import AttnMaskType as Kind

    from tests.adapters import megatron_model
    from tests.adapters.megatron_slot import HEADS, ROWS, eager, has, packed, qkv, slot

    megatron_model.start_megatron()
    causal = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    rows = torch.arange(ROWS)
    padding = torch.stack([rows >= 11, rows >= 5])[:, None, None]  # True = hidden
    two = torch.rand(2, 1, ROWS, ROWS, generator=torch.Generator().manual_seed(5)) < 0.5
    full, arbitrary = {"mask": "full"}, Kind.arbitrary
    checks: dict[str, tuple[Any, Any, Any, Any]] = {
        # name: slot, attention_mask, attn_mask_type, who sees whom
        "causal": (slot(), None, None, causal[None]),
        "causal given": (slot(), ~causal[None, None], None, causal[None]),
        "padding_causal": (slot(), padding, Kind.padding_causal, causal & ~padding[:, 0]),
        "padding": (slot(full), padding, Kind.padding, (~padding[:, 0]).expand(-1, ROWS, -1)),
        "no_mask": (slot(full), None, Kind.no_mask, torch.ones_like(causal)[None]),
        "arbitrary": (slot(), two, arbitrary, ~two[:, 0]),
        "arbitrary, one for all rows": (slot(), two[:1], arbitrary, ~two[:1, 0]),
        "window": (slot(window_size=(3, 0)), None, None, causal[None] & causal.triu(-3)),
        "window both ways": (
            slot(full, window_size=(2, 4)),
            None,
            Kind.no_mask,
            (torch.ones_like(causal).triu(-2).tril(4))[None],
        ),
        "query-key layer scaling": (
            slot(apply_query_key_layer_scaling=True, layer_number=3),
            None,
            None,
            causal[None],
        ),
    }
    if has("window_attn_skip_freq"):
        without = slot(window_size=(3, 0), window_attn_skip_freq=2, layer_number=2)
        checks["layer without window"] = (without, None, None, causal[None])
    q, k, v = qkv()
    for name, (module, mask, kind, seen) in checks.items():
        out = module(q, k, v, mask, attn_mask_type=kind)
        off = (out - eager(q, k, v, seen)).abs().max().item()
        assert off < 2e-6, (name, off)
    changed = padding.clone()
    module = checks["padding"][0]
    module(q, k, v, changed, attn_mask_type=Kind.padding)
    changed[:] = False  # a buffer written anew for the next batch
    out = module(q, k, v, changed, attn_mask_type=Kind.padding)
    assert (out - eager(q, k, v, torch.ones_like(causal)[None])).abs().max() < 2e-6
    with pytest.raises(LcabError, match="use attn_mask_type arbitrary"):
        slot()(q, k, v, two)
    with pytest.raises(LcabError, match="one mask for all heads"):
        slot()(q, k, v, two.expand(-1, HEADS, -1, -1), attn_mask_type=arbitrary)
    with pytest.raises(LcabError, match="causal_bottom_right"):
        slot()(q[-3:], k, v, None)
    if "causal_bottom_right" in Kind.__members__:
        late = slot()(q[-3:], k, v, None, attn_mask_type=Kind.causal_bottom_right)
        assert (late - slot()(q, k, v, None)[-3:]).abs().max() < 2e-6
    late = slot(window_size=(3, 0))(q[-1:], k, v, None, attn_mask_type=Kind.no_mask)
    assert (late - slot(window_size=(3, 0))(q, k, v, None)[-1:]).abs().max() < 2e-6
    # packed, with room after the last document: rows without a document come out as zero
    one = [x[:, 0] for x in qkv(1)]
    out = slot()(*one, None, packed_seq_params=packed([0, 4, 10]))
    assert out.shape == (ROWS, HEADS * 8)
    assert not out[10:].any()
    first = slot()(*(x[:4, None] for x in one), None)
    assert (out[:4] - first[:, 0]).abs().max() < 2e-6
    slot(attention_dropout=0.1).eval()(q, k, v, None)
    assert slot(full, softmax_scale=0.5)(q, k, v, None, attn_mask_type=Kind.no_mask).shape == (
        ROWS,
        2,
        HEADS * 8,
    )


def checkpoints(rank: int, world: int) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from tests.adapters import megatron_model
    from tests.adapters.megatron_model import Cell, transformer_config
    from tests.adapters.megatron_slot import HEADS, has, slot

    megatron_model.start_megatron()
    plain = slot()
    assert not plain.state_dict()
    assert not plain.sharded_state_dict("a.", (), {"dp_cp_group": None})
    plain.load_state_dict({"_extra_state": torch.zeros(3)}, strict=True)
    if not has("softmax_type"):
        return
    sinks = slot(softmax_type="learnable")
    offsets = torch.randn(1, HEADS, 1, 1)
    sinks.load_state_dict({"_extra_state": None, "softmax_offset": offsets}, strict=True)
    assert torch.equal(sinks.softmax_offset, offsets.view(-1))
    assert list(sinks.state_dict()) == ["softmax_offset"]
    with pytest.raises(RuntimeError, match="softmax_offset"):
        plain.load_state_dict({"softmax_offset": offsets}, strict=True)
    config = transformer_config(Cell("", settings={"softmax_type": "learnable"}), 1, 1)
    own = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    own.load_state_dict(sinks.state_dict(), strict=True)
    from megatron.core import parallel_state as ps

    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    got, want = (m.sharded_state_dict("a.", (), metadata) for m in (sinks, own))
    assert list(got) == list(want) == ["a.softmax_offset"]
    a, b = got["a.softmax_offset"], want["a.softmax_offset"]
    assert (a.key, a.global_shape, a.global_offset) == (b.key, b.global_shape, b.global_offset)


def specs(rank: int, world: int) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp

    from lcab_plugin.adapters import megatron as lcab_megatron
    from lcab_plugin.config import AttentionConfig
    from tests.adapters import megatron_model
    from tests.adapters.megatron_model import Cell, transformer_config

    megatron_model.start_megatron()
    config = AttentionConfig()
    moe = {"num_moe_experts": 2, "moe_layer_freq": [0, 1], "add_bias_linear": False}
    block = get_gpt_decoder_block_spec(transformer_config(Cell("", settings=moe), 1, 1), False)
    mtp = get_gpt_mtp_block_spec(
        transformer_config(Cell("", settings={"mtp_num_layers": 1}), 1, 1), get_gpt_layer_local_spec(), False
    )
    mla = get_gpt_layer_local_spec(multi_latent_attention=True, qk_layernorm=False)

    def cores(node: Any) -> list[str]:
        found = []
        if isinstance(node, list | tuple):
            return [name for child in node for name in cores(child)]
        for field in getattr(node, "__dataclass_fields__", {}) if not isinstance(node, type) else ():
            child = getattr(node, field)
            found += [child.__name__] if field == "core_attention" else cores(child)
        return found

    for spec, number in ((block, 2), (mtp, 1), (mla, 1), (get_gpt_layer_local_spec(qk_layernorm=True), 1)):
        swapped = lcab_megatron.swap_core_attention(spec, config)
        assert cores(swapped) == ["CoreAttention"] * number
        assert cores(spec) == ["DotProductAttention"] * number, "the spec given was changed"
        assert cores(lcab_megatron.swap_core_attention(swapped, config)) == ["CoreAttention"] * number
    with pytest.raises(LcabError, match="no core_attention"):
        lcab_megatron.swap_core_attention(IdentityOp, config)
    odd = get_gpt_layer_local_spec()
    odd.submodules.self_attention.submodules.core_attention = type("DSAttention", (), {})
    with pytest.raises(LcabError, match="DSAttention"):
        lcab_megatron.swap_core_attention(odd, config)
    if importlib.util.find_spec("megatron.core.models.backends") is None:
        with pytest.raises(LcabError, match="use swap_core_attention"), lcab_megatron.swap_provider(config):
            pass
    else:
        with lcab_megatron.swap_provider(config):
            assert cores(get_gpt_layer_local_spec()) == ["CoreAttention"]
    assert (
        get_gpt_layer_local_spec().submodules.self_attention.submodules.core_attention is DotProductAttention
    )


def a_spec_by_name_and_what_resolved(rank: int, world: int) -> None:
    from lcab_plugin.adapters import megatron as lcab_megatron
    from tests.adapters import megatron_model
    from tests.adapters.megatron_model import Cell, build
    from tests.adapters.megatron_slot import has

    megatron_model.start_megatron()
    args = argparse.Namespace(num_experts=None, moe_layer_freq=1, transformer_impl="local", qk_layernorm=True)
    training = types.ModuleType("megatron.training")
    training.get_args = lambda: args  # type: ignore[attr-defined]
    sys.modules["megatron.training"] = training
    with pytest.raises(LcabError, match="extra_args_provider"):
        importlib.import_module("lcab_plugin.adapters.megatron.layer_spec")
    args.lcab_kernel = "sdpa_math"
    module = importlib.import_module("lcab_plugin.adapters.megatron.layer_spec")
    core = module.gpt_layer_spec.submodules.self_attention.submodules.core_attention
    assert core.plug.config.kernel == "sdpa_math"
    vars(args).update(lcab_kernel="auto", lcab_strategy="auto", **PLANNED)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plug = module.from_args(args).submodules.self_attention.submodules.core_attention.plug
    assert (plug.config.kernel, plug.config.strategy) == ("sdpa_flash", "none")
    assert printed.getvalue() == ("" if rank else f"{plug.config.chosen.sentence}\n")
    window = {"window_size": (4, 0)} | ({"window_attn_skip_freq": 2} if has("window_attn_skip_freq") else {})
    model = build(Cell("", settings=window), 1, 1, plugged=True)
    lines = lcab_megatron.describe([model])
    alike = ["0", "1"] if len(window) == 2 else ["0-1"]
    assert [line.split("  ")[0] for line in lines] == [
        f"decoder.layers.{layers}.self_attention.core_attention" for layers in alike
    ]
    assert "kernel sdpa_flash" in lines[0]
    assert "window (4, 0)" in lines[0]
    assert len(lines) == 1 or "window" not in lines[1]
    dropping = build(Cell("", settings={"attention_dropout": 0.1}), 1, 1, plugged=True)
    with pytest.raises(LcabError, match="--attention-dropout 0"):
        lcab_megatron.describe(dropping)


def everything(rank: int, world: int) -> None:
    """One launch: it costs more than all of its parts."""
    refuse(rank, world)
    arguments_of_forward(rank, world)
    checkpoints(rank, world)
    specs(rank, world)
    a_spec_by_name_and_what_resolved(rank, world)


def test_bad_input_masks_checkpoints_and_specs() -> None:
    distributed.run(everything, 2)


def parse(*flags: str, **given: Any) -> Any:
    from lcab_plugin.adapters.megatron import add_arguments, config_from_args

    args = add_arguments(argparse.ArgumentParser()).parse_args(flags)
    vars(args).update(given)
    return config_from_args(args)


def test_arguments(tmp_path: Path) -> None:
    flags = (
        "--lcab-kernel triton --lcab-strategy usp --lcab-ulysses 2 --lcab-softcap 5.5 --lcab-deterministic"
    )
    config = parse(*flags.split(), context_parallel_size=4)
    assert (config.kernel, config.strategy, config.ulysses) == ("triton", "usp", 2)
    assert (config.softcap, config.deterministic, config.layout) == (5.5, True, "zigzag")
    assert parse().strategy == "none"
    assert parse(context_parallel_size=2).strategy == "ring_p2p"
    assert parse(context_parallel_size=2, cp_comm_type=["a2a"]).strategy == "ulysses"
    nested = parse(
        context_parallel_size=8, cp_comm_type=["a2a+p2p"], hierarchical_context_parallel_sizes=[2, 4]
    )
    assert (nested.strategy, nested.ulysses, nested.ring) == ("usp", 2, 4)
    with pytest.raises(LcabError, match="give --lcab-strategy"):
        parse(context_parallel_size=2, cp_comm_type=["a2a", "p2p"])
    file = tmp_path / "lcab.json"
    file.write_text(json.dumps({"strategy": "ulysses", "mask": "causal_document"}))
    config = parse("--lcab-config", str(file), "--lcab-strategy", "p2p")
    assert (config.strategy, config.mask) == ("ring_p2p", "causal_document")
    with pytest.raises(LcabError, match="cannot read"):
        parse("--lcab-config", str(tmp_path / "none.json"))
    with pytest.raises(LcabError, match="fa22"):
        parse("--lcab-kernel", "fa22")


PLANNED = {
    "context_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "seq_length": 4096,
    "num_attention_heads": 16,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": None,
    "hidden_size": 1024,
    "bf16": False,
    "fp16": False,
}


def test_auto_is_decided_for_megatrons_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ("--lcab-kernel", "auto", "--lcab-strategy", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def workload(*flags: str, **given: Any) -> dict[str, Any]:
        return parse(*auto, *flags, **{**PLANNED, **given}).chosen.record["workload"]

    config = parse(*auto, **{**PLANNED, "context_parallel_size": 4})
    assert (config.kernel, config.layout, config.undecided) == ("sdpa_flash", "zigzag", ())
    assert config.chosen.record["cp"] == config.cp_size == 4
    assert "for a whole sequence (4096 tokens, 50.01% of all pairs visible) on cpu" in config.chosen.sentence
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "bf16"}
    assert workload(tensor_model_parallel_size=2, bf16=True).items() >= shape.items()
    assert workload(group_query_attention=False)["kv_heads"] == 16
    assert workload(kv_channels=128, fp16=True).items() >= {"head_dim": 128, "dtype": "fp16"}.items()
    documents = workload("--lcab-mask", "causal_document")
    assert documents["name"] == "documents as in pile"
    assert documents["area"] == masks.causal_document(masks.sample_lengths(4096, "pile", 0)).area
    file = tmp_path / "lcab.json"
    file.write_text(json.dumps({"layout": "auto"}))
    assert parse("--lcab-config", str(file), *auto, **PLANNED).layout == "zigzag"
    named = parse("--lcab-kernel", "auto", **{**PLANNED, "context_parallel_size": 2})
    assert (named.strategy, named.chosen.record["auto"]) == ("ring_p2p", ["kernel"])
    with pytest.raises(LcabError, match=r"cannot tell a typical mask .* 'prefix_lm_causal' takes prefix"):
        parse(*auto, "--lcab-mask", "prefix_lm_causal", **PLANNED)
    with pytest.raises(LcabError, match="MLA's have two"):
        parse(*auto, **PLANNED, multi_latent_attention=True)
