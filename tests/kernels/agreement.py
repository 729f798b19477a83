"""An adapter against the specification: what every test of an emulated library asks."""

from __future__ import annotations

from typing import Any

import torch
from cases import errors, families, inputs, reference
from hypothesis import strategies as st

from lcab_plugin import masks
from lcab_plugin.kernels import Kernel, KernelOptions
from lcab_plugin.masks import AttentionMask


def disagreement(
    kernel: Kernel,
    mask: AttentionMask,
    heads: tuple[int, int] = (4, 2),
    value_dim: int = 16,
    deterministic: bool = False,
) -> float:
    """The worst error of out, lse and the gradients of ``mask`` with float64 inputs of two rows."""
    q, k, v, dout = inputs(mask.q_len, mask.k_len, *heads, 16, torch.float64)
    v, dout = v[..., :value_dim], dout[..., :value_dim]
    options = KernelOptions(0.25, deterministic=deterministic)
    got: dict[str, Any] = {}
    got["out"], got["lse"] = kernel.forward(q, k, v, mask, options)
    got["dq"], got["dk"], got["dv"] = kernel.backward(dout, q, k, v, got["out"], got["lse"], mask, options)
    return max(errors(got, reference(q, k, v, dout, mask)).values())


def merged_disagreement(kernel: Kernel) -> float:
    """The same of a backward whose out and lse come from twice the keys it is given."""
    q, k, v, dout = inputs(40, 80, 4, 2, 16, torch.float64)
    mask = masks.from_ranges([(0, 40)], [(0, 80)], [1])
    want = reference(q, k, v, dout, mask)
    parts = []
    for keys in (range(40), range(40, 80)):
        half = (x[:, keys.start : keys.stop] for x in (k, v))
        local = mask.local([range(40)], [keys])
        parts.append(kernel.backward(dout, q, *half, want["out"], want["lse"], local, KernelOptions(0.25)))
    got = {"dq": parts[0][0] + parts[1][0]}
    got |= {name: torch.cat([p[i] for p in parts], 1) for i, name in ((1, "dk"), (2, "dv"))}
    return max(errors(got, want).values())


@st.composite
def sub_masks(draw: st.DrawFn) -> AttentionMask:
    """One of the families, or the part of it that rows and keys in pieces see."""
    n = draw(st.integers(96, 130))
    mask = families(n)[draw(st.sampled_from(masks.names()))]
    pieces = st.lists(st.integers(0, n), min_size=2, max_size=6).map(sorted)

    def part() -> list[range]:
        edges = draw(pieces)
        return [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]

    return mask.local(part(), part()) if draw(st.booleans()) else mask
