"""FLOPs against a count of every matrix product of a small transformer; peaks by device name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lcab_plugin import masks
from lcab_plugin.training.flops import mfu, peak_flops, training_flops


def test_against_pytorch_s_counter() -> None:
    tokens, layers, heads, head_dim = 48, 2, 4, 8
    hidden = heads * head_dim
    lengths = [30, 18]
    matrices = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(layers * 4))
    x = torch.randn(tokens, hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = x
        for layer in range(layers):
            q, k, v = (
                matrices[4 * layer + i](y).view(tokens, heads, head_dim).transpose(0, 1) for i in range(3)
            )
            parts = [
                torch.bmm(torch.bmm(q[:, rows], k[:, rows].transpose(1, 2)), v[:, rows])
                for rows in (slice(0, 30), slice(30, 48))
            ]
            y = matrices[4 * layer + 3](torch.cat(parts, 1).transpose(0, 1).reshape(tokens, hidden))
        y.sum().backward()
    area = masks.full_document(lengths).area
    parameters = sum(p.numel() for p in matrices.parameters())
    flops = training_flops(parameters, tokens, area, layers=layers, heads=heads, head_dim=head_dim)
    assert flops == counter.get_total_flops()


def test_peaks_and_utilisation() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H200", "fp16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("AMD EPYC", "bf16") is None
    assert mfu(1e15, 2.0, 4, 250e12) == pytest.approx(0.5)
    assert mfu(1e15, 2.0, 4, None) is None
