"""Attention as an operator of torch: whole graphs, few of them, the numbers of the eager call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import families, inputs
from distributed import run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.masks import AttentionMask

N = 96
DOCUMENTS = [
    masks.causal_document(x) for x in ([96], [50, 46], [10, 20, 66], [8] * 12, [1] * 96, [30] * 3 + [6])
]


class Layer(nn.Module):
    """Attention with grouped queries and its two projections, added to the input."""

    def __init__(self, kernel: str, sinks: bool) -> None:
        super().__init__()
        self.qkv, self.project, self.attention = nn.Linear(32, 64), nn.Linear(32, 32), lcab.Attention()
        self.attention.kernel = kernel
        self.sink = nn.Parameter(torch.randn(4)) if sinks else None

    def forward(self, x: Tensor, mask: AttentionMask, cp: lcab.ContextParallel | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 8)) for t in self.qkv(x).split((32, 16, 16), -1))
        return x + self.project(self.attention(q, k, v, mask, cp, sink=self.sink).flatten(2))


class TinyGPT(nn.Module):
    """Two layers on embeddings, optionally with learnable sinks."""

    def __init__(self, kernel: str, layers: int = 2, sinks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(kernel, sinks) for _ in range(layers))

    def forward(self, x: Tensor, mask: AttentionMask, cp: lcab.ContextParallel | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, cp)
        return x


def outcome(model: nn.Module, call: object, *args: object) -> list[Tensor]:
    model.zero_grad()
    out = call(*args)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kernel", ["naive", "sdpa_flash"])
def test_one_graph_equals_the_eager_model(kernel, sinks):
    model, x = TinyGPT(kernel, sinks=sinks), torch.randn(2, N, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in [*families().values(), AttentionMask(N, N, []), AttentionMask(N, N, [(50, N, 3, 9)])]:
        want, got = (outcome(model, call, x, mask) for call in (model, compiled))
        torch.testing.assert_close(got, want)


def test_another_mask_is_not_another_graph():
    """One graph for the first mask, one for any number of slices."""
    model, x = TinyGPT("sdpa_flash"), torch.randn(2, N, 32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for mask in (*DOCUMENTS, *DOCUMENTS, AttentionMask(N, N, []), *families().values()):
        compiled(x, mask).sum().backward()
    assert counter.frame_count <= 2
    with torch.no_grad():
        compiled(x, DOCUMENTS[0])
        graphs = counter.frame_count
        for mask in DOCUMENTS:
            compiled(x, mask)
    assert counter.frame_count == graphs


def test_lengths_may_be_dynamic():
    model = TinyGPT("sdpa_flash")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    graphs = set()
    for n in (40, 48, 80, 96):
        x, mask = torch.randn(3, n, 32), masks.causal(n)
        torch.testing.assert_close(compiled(x, mask), model(x, mask))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_inductor():
    model, x = TinyGPT("sdpa_flash", layers=1, sinks=True), torch.randn(1, N, 32)
    compiled = torch.compile(model, fullgraph=True)
    for mask in DOCUMENTS[:2]:
        want, got = (outcome(model, call, x, mask) for call in (model, compiled))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["naive", "sdpa_flash"])
@pytest.mark.parametrize("sink", [None, torch.randn(4)], ids=["no sink", "sink"])
def test_the_operators_keep_torchs_promises(kernel, sink):
    """Schema, autograd registration, fake tensors (shapes, strides, dtypes), static and dynamic shapes."""
    q, k, v, dout = inputs(N, N, 4, 2, 8, torch.float32)
    mask = masks.share_question([20, 30, 46])
    call = mask.tensor, kernel, 0.3, None, False
    out, lse = torch.ops.lcab.attention(q, k, v, sink, *call, True)
    torch.library.opcheck(torch.ops.lcab.attention_backward.default, (dout, q, k, v, out, lse, *call))
    q, k, v, *sinks = (x.clone().requires_grad_() for x in (q, k, v, *([] if sink is None else [sink])))
    learnable = sinks[0] if sinks else None
    torch.library.opcheck(torch.ops.lcab.attention.default, (q, k, v, learnable, *call, True))
    strided = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.library.opcheck(torch.ops.lcab.attention.default, (*strided, sink, *call, False))


def test_lse_is_an_output_without_gradient():
    def both(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
        return lcab.attention(q, k, v, mask, return_lse=True)

    q, k, v = (x.requires_grad_() for x in inputs(N, N, 4, 2, 8, torch.bfloat16)[:3])
    out, lse = torch.compile(both, backend="aot_eager", fullgraph=True)(q, k, v, DOCUMENTS[2])
    assert (lse.dtype, lse.requires_grad, out.requires_grad) == (torch.float32, False, True)
    torch.testing.assert_close((out, lse), both(q, k, v, DOCUMENTS[2]))


def test_what_cannot_run_says_why_from_a_graph():
    def capped(x: Tensor, mask: AttentionMask, kernel: str) -> Tensor:
        return lcab.attention(x, x, x, mask, kernel=kernel, softcap=3.0)

    x, mask = torch.randn(1, N, 2, 8), masks.causal(N)
    compiled = torch.compile(capped, backend="aot_eager", fullgraph=True)
    with pytest.raises(lcab.UnsupportedError, match="no logit soft cap"):
        compiled(x, mask, "sdpa_flash")
    with pytest.raises(Exception, match="did you mean 'sdpa_flash'"):
        compiled(x, mask, "sdpa_flsh")
    with pytest.raises(Exception, match="the mask is for 96 queries"):
        compiled(x[:, :50], mask, "naive")
    with pytest.raises(lcab.LcabError, match="the mask is for 96 queries"):
        torch.compile(capped, backend="aot_eager")(x[:, :50], mask, "naive")


def over_ranks(rank: int, world: int, strategy: str) -> None:
    cp = lcab.context_parallel(strategy, seqlen=N)
    model, x = TinyGPT("naive"), cp.shard(torch.arange(2.0 * N * 32).sin().view(2, N, 32))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for mask in DOCUMENTS:
        want, got = (outcome(model, call, x, mask, cp) for call in (model, compiled))
        torch.testing.assert_close(got, want)
        if mask is DOCUMENTS[1]:
            graphs = counter.frame_count
    assert counter.frame_count == graphs > 0, "graphs around the attention, none for a mask"
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="context parallelism needs fullgraph=False"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x, DOCUMENTS[0], cp)


@pytest.mark.parametrize("strategy", ["ulysses", "ring_p2p"])
def test_a_group_breaks_the_graph(strategy):
    run(over_ranks, 2, strategy)


def test_importing_the_package_does_not_load_the_compiler():
    code = "import sys, lcab_plugin; print('torch._dynamo' in sys.modules, 'torch._inductor' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_a_cuda_graph_never_holds_the_operator():
    """It reads the mask on the host; a replay would be another batch under the captured mask."""
    for op in (torch.ops.lcab.attention.default, torch.ops.lcab.attention_backward.default):
        assert torch.Tag.cudagraph_unsafe in op.tags
