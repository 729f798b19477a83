"""`lcab masks explain` as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lcab_plugin import kernels, masks
from lcab_plugin.cli.app import app
from lcab_plugin.errors import LcabError

SMALL = {
    "share_question": ("--seqlen", "1024", "--lengths", "200,400,424"),
    "sliding_window": ("--seqlen", "1024", "--window", "100"),
    "block_causal_document": ("--seqlen", "1024", "--lengths", "600,424", "--block", "64"),
    "block_sparse": ("--seqlen", "1024", "--block", "256", "--keep", "0.5"),
    "global_sliding_window": ("--seqlen", "1024", "--global-tokens", "32", "--window", "64"),
}


def explain(mask: str, kernel: str, *words: str) -> str:
    """What the command prints."""
    words = ("masks", "explain", "--mask", mask, "--kernel", kernel, *SMALL[mask], *words)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("mask", SMALL)
@pytest.mark.parametrize("kernel", kernels.names())
def test_every_kernel_explains_every_mask_or_gives_its_reason(kernel, mask):
    told = json.loads(explain(mask, kernel, "--json"))
    if told["unsupported"]:
        assert told["calls"] == []
        assert told["unsupported"] in explain(mask, kernel)
        return
    assert sum(call["area"] for call in told["calls"]) == told["area"]
    assert sum(call["share"] for call in told["calls"]) == pytest.approx(1.0)
    assert all(call["computed"] >= call["area"] for call in told["calls"])
    assert told["work"]["exact_flops"] == 4 * 128 * told["area"]


def test_a_flash_attention_kernel_takes_share_question_in_two_calls():
    told = json.loads(explain("share_question", "fa3", "--json"))
    assert [(call["what"], call["count"]) for call in told["calls"]] == [
        ("varlen causal", 2),
        ("varlen full", 1),
    ]
    assert told["calls"][1]["merged"] == 424
    assert told["work"]["merged_bytes"] == 10 * 128 * 424
    assert told["work"]["copied_bytes"] == 0
    text = explain("share_question", "fa3")
    assert "1024 tokens in 3 documents" in text
    assert "fa3" in text
    assert "varlen causal" in text
    assert "GFLOP computed" in text


def test_copies_and_a_head_dim_are_counted():
    told = json.loads(explain("block_causal_document", "fa2", "--head-dim", "64", "--json"))
    (call,) = told["calls"]
    assert call["what"] == "varlen full, keys gathered"
    assert told["work"]["copied_bytes"] == 4 * 64 * call["copied"]
    assert told["work"]["tensor_bytes"] == 4 * 64 * 2048


def test_a_reason_that_is_about_the_mask_is_printed(monkeypatch):
    def unsupported(q, k, v, mask, options, needs_backward):
        return "it has no windows" if mask == masks.sliding_window(1024, 100, 100) else None

    monkeypatch.setattr(kernels.get("sdpa_flash"), "unsupported", unsupported)
    assert "sdpa_flash does not serve it: it has no windows" in explain("sliding_window", "sdpa_flash")
    assert "does not serve it" not in explain("share_question", "sdpa_flash")

    def refuse(mask, head_dim):
        raise LcabError("too many slices")

    monkeypatch.setattr(kernels.get("sdpa_flash"), "explain", refuse, raising=False)
    assert "does not serve it: too many slices" in explain("share_question", "sdpa_flash")
