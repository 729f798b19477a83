"""`lcab tune`: measure the Triton kernel's launch configurations on this GPU, once, and keep the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lcab_plugin import kernels, masks
from lcab_plugin.bench import timing
from lcab_plugin.bench.settings import DTYPES, Shape, default_parameters
from lcab_plugin.errors import LcabError, UnsupportedError
from lcab_plugin.kernels import KernelOptions
from lcab_plugin.kernels.triton import tuning
from lcab_plugin.kernels.triton.tuning import Config, Pass
from lcab_plugin.masks import AttentionMask

REPRESENTATIVES = ("causal", "causal_document")  # of dense masks and of sparse ones
_WORTH_IT = 0.98  # a shipped default stays unless another is more than 2% faster


@dataclass(frozen=True)
class Finding:
    """One launch shape: the median ms of every configuration tried, the shipped default first."""

    key: str
    which: Pass
    mask: str
    seqlen: int
    median_ms: dict[Config, float]
    failed: dict[Config, str]

    @property
    def default(self) -> Config:
        return next(iter(self.median_ms))

    @property
    def best(self) -> Config:
        """The fastest; the default unless that is beaten by more than noise."""
        fastest = min(self.median_ms, key=lambda config: self.median_ms[config])
        won = self.median_ms[fastest] < _WORTH_IT * self.median_ms[self.default]
        return fastest if won else self.default


def run(shape: Shape, seqlens: Iterable[int], seconds: float = 2.0) -> Iterator[Finding]:
    """Measure every pass under a dense and a sparse mask at each length; candidates take turns.

    Raises:
        UnsupportedError: the Triton kernel does not run on this machine, or not with this shape.
        LcabError: no configuration of some launch runs here.
    """
    kernel = kernels.get("triton")
    if reason := kernel.unavailable():
        raise UnsupportedError(f"there is nothing to tune: kernel 'triton' {reason}")
    clock = timing.clock("cuda")
    for seqlen in seqlens:
        for name in REPRESENTATIVES:
            mask = masks.from_name(name, seqlen, **default_parameters(name, seqlen))
            for which, calls in _launches(shape, seqlen, mask):
                yield _measured(which, calls, shape, seqlen, name, mask, clock, seconds)


def launches(seqlens: Sequence[int]) -> int:
    """How many findings there will be."""
    return len(seqlens) * len(REPRESENTATIVES) * len(tuning.PASSES)


def write(findings: Iterable[Finding]) -> Any:
    """Add what beats the shipped defaults to the user's file; its path."""
    return tuning.write({f.key: f.best for f in findings if f.best != f.default})


def _launches(
    shape: Shape, seqlen: int, mask: AttentionMask
) -> Iterator[tuple[Pass, Callable[[Config], Callable[[], Any]]]]:
    """Of every pass, how a configuration becomes a call."""
    from lcab_plugin.kernels.triton import launch

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        size = shape.batch, seqlen, heads, shape.head_dim
        return torch.randn(size, generator=generator, device="cuda").to(DTYPES[shape.dtype])

    q, k, v, dout = draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads), draw(shape.heads)
    options = KernelOptions(shape.head_dim**-0.5)
    out, lse = kernels.get("triton").forward(q, k, v, mask, options)
    delta, lse2 = launch.row_sums(dout, out, lse)
    backward = dout, q, k, v, lse2, delta, mask, options
    yield "forward", lambda config: lambda: launch.forward(q, k, v, mask, options, config)
    yield "dq", lambda config: lambda: launch.sum_dq(*backward, config)
    yield "dkv", lambda config: lambda: launch.sum_dkv(*backward, config)


def _measured(
    which: Pass,
    calls: Callable[[Config], Callable[[], Any]],
    shape: Shape,
    seqlen: int,
    name: str,
    mask: AttentionMask,
    clock: timing.Clock,
    seconds: float,
) -> Finding:
    launch_shape = tuning.Shape.of(
        which,
        tuning.capability(torch.device("cuda", torch.cuda.current_device())),
        (shape.head_dim, shape.head_dim),
        DTYPES[shape.dtype],
        shape.heads // shape.kv_heads,
        mask,
    )
    configs = {str(c): c for c in dict.fromkeys(tuning.candidates(launch_shape))}
    limits = timing.Limits(seconds=seconds)
    found = timing.measure({text: calls(config) for text, config in configs.items()}, clock, limits)
    times = {configs[t]: r.median for t, r in found.items() if isinstance(r, timing.Timing)}
    failed = {configs[t]: str(r) for t, r in found.items() if isinstance(r, Exception)}
    if not times:
        raise LcabError(f"no configuration of {which} runs at {seqlen} tokens: {next(iter(failed.values()))}")
    key = tuning.tuned(torch.device("cuda", torch.cuda.current_device())).name(launch_shape)
    return Finding(key, which, name, seqlen, times, failed)
