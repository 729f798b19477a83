"""Attention slots of a model: attention dropout is refused wherever a model may ask for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.adapters import slots


class Block(nn.Module):
    """A module with a slot, as a model of the transformers kind has it."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        self.core = lcab.Attention()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize("rate", [0.1, nn.Dropout(0.1)], ids=["number", "module"])
def test_a_module_with_attention_dropout(rate):
    model = nn.Sequential(Block(), Block(attention_dropout=rate))
    with pytest.raises(lcab.UnsupportedError, match=r"1 has attention_dropout = 0.1.*set it to 0"):
        slots.find(model)
    with pytest.raises(lcab.UnsupportedError, match=r"Block has attn_dropout"):
        slots.find(Block(attn_dropout=rate))


def test_a_module_without():
    model = nn.Sequential(Block(attention_dropout=0.0), Block(attn_dropout=nn.Dropout(0.0), dropout=0.1))
    assert [name for name, _ in slots.find(model)] == ["0.core", "1.core"]


def test_the_call_and_the_module():
    """Refused where it would be applied, without a word where it would not be."""
    x, mask, module = torch.randn(1, 8, 2, 4), masks.causal(8), lcab.Attention()
    want = lcab.attention(x, x, x, mask, dropout=0.0)
    for call in (lcab.attention, module):
        with pytest.raises(lcab.UnsupportedError, match=r"dropout 0.1.*train with dropout=0.0"):
            call(x, x, x, mask, dropout=0.1)
    with torch.no_grad():
        assert torch.equal(lcab.attention(x, x, x, mask, dropout=0.1), want)
    assert torch.equal(module.eval()(x, x, x, mask, dropout=0.1), want)


def test_deepspeeds_slot():
    pytest.importorskip("deepspeed")
    from lcab_plugin.adapters.deepspeed.ulysses import UlyssesAttention

    slot, x, mask = UlyssesAttention(), torch.randn(1, 8, 2, 4), masks.causal(8)
    with pytest.raises(lcab.UnsupportedError, match=r"attention dropout 0.1 is not applied"):
        slot(x, x, x, 0, mask=mask, dropout_p=0.1)
    want = slot(x, x, x, 0, mask=mask)
    assert torch.equal(slot(x, x, x, 0, mask=mask, dropout_p=0.0), want)
    assert torch.equal(slot.eval()(x, x, x, 0, mask=mask, dropout_p=0.1), want)
