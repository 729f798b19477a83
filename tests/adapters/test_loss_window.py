"""The loss window in one process, and the lines that say what resolved."""

from __future__ import annotations

import math

import pytest
import torch

from lcab_plugin.adapters.loss_window import LossWindow
from lcab_plugin.adapters.slots import lines
from lcab_plugin.errors import LcabError


def opened(*loss_masks: object, factor: float = 6.0) -> LossWindow:
    return LossWindow(list(loss_masks), len(loss_masks), factor, None, torch.device("cpu"))


def test_losses_are_sums_over_the_tokens_of_the_window() -> None:
    window = opened(torch.tensor([[True, False, True]]), torch.tensor([[0, 0, 1]]))
    assert window.tokens == 3
    assert math.isnan(window.mean())
    losses = torch.tensor([[1.0, float("inf"), 3.0]], requires_grad=True)
    first = window.loss(losses)
    first.backward()
    assert (first.item(), losses.grad.tolist()) == (4 * 6 / 3, [[2.0, 0.0, 2.0]])
    assert window.mean() == 2
    assert window.loss(torch.tensor([[9.0, 9.0, 5.0]], dtype=torch.bfloat16)).dtype == torch.float32
    assert window.mean() == 3


def test_counts_and_sums() -> None:
    window = opened(3, torch.tensor(1), torch.zeros(2))
    assert window.tokens == 4
    assert window.loss(torch.tensor(8.0)).item() == 12
    assert window.loss(torch.tensor(4.0), count=1).item() == 6
    assert window.loss(torch.ones(2)).item() == 0
    assert window.mean() == 3
    with pytest.raises(LcabError, match=r"micro-batches \(3\)"):
        window.loss(torch.ones(2))


def test_large_windows_are_counted_exactly() -> None:
    window = opened(2**24 + 1, 2**24)
    window.loss(torch.tensor(1.0))
    window.loss(torch.tensor(1.0))
    assert window.tokens == 2**25 + 1
    assert window.mean() == 2 / (2**25 + 1)


def test_slots_that_differ_in_their_layer_share_a_line() -> None:
    slots = [(f"layers.{i}.attn", "A") for i in (0, 1, 2, 4)] + [("layers.3.attn", "B"), ("attn", "A")]
    assert lines(slots) == ["layers.0-2,4.attn  A", "layers.3.attn  B", "attn  A"]
