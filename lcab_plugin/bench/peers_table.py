"""Context parallelism of other packages, called as their users call it: one binding each, on tensors
``[b, t / ranks, heads, head_dim]`` of this rank.

A package is imported when its peer is bound, so that one that is not installed is a row with that reason.
Every binding does the part of a training step that its package leaves to the user (which kernel, which mask
tensor) with what is fastest of PyTorch's own on the device; masks are made once, not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module, metadata
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcab_plugin.bench.accuracy import Case
from lcab_plugin.bench.contenders import Attend
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import UnsupportedError

REQUIREMENTS = "scripts/requirements-peers.txt"


@dataclass(frozen=True)
class Problem:
    """What a peer is bound to.

    ``case``: this rank's shards under the global mask, ``family`` and ``parameters`` of that mask. ``group``:
    all ranks, for this peer alone, so that what a failed call leaves under way meets nobody.
    """

    case: Case
    family: str
    parameters: Mapping[str, Any]
    group: Any

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return self.case.mask.q_len

    @property
    def causal(self) -> bool:
        """Whether it is causal attention over one document."""
        return self.family == "causal"

    @cached_property
    def dense(self) -> Tensor | None:
        """The global mask ``[1, 1, q, k]``, True = may attend; None where a flag says as much."""
        if self.family in ("causal", "full"):
            return None
        return self.case.mask.to_dense(self.case.q.device)[None, None]

    @cached_property
    def segments(self) -> tuple[Tensor, int] | None:
        """Boundaries of the documents of causal attention within each, int32, and the longest one's tokens;
        None without documents."""
        if self.family != "causal_document":
            return None
        lengths = torch.tensor([0, *self.parameters["lengths"]], device=self.case.q.device)
        return lengths.cumsum(0).to(torch.int32), int(lengths.max())

    @property
    def window(self) -> int | None:
        """Keys a query sees at most, its own among them; None without a window."""
        return self.parameters["left"] + 1 if self.family == "sliding_window_causal" else None


@dataclass(frozen=True)
class Peer:
    """``distribution``: what pip installs. ``layout``: which tokens it expects on a rank. ``dense``: whether
    a mask that is neither full nor causal costs it memory by [q, k]."""

    name: str
    distribution: str
    layout: str
    bind: Callable[[Problem], Attend]
    dense: bool = False

    def version(self) -> str | None:
        """Of what is installed, None where it is not."""
        try:
            return f"{self.distribution} {metadata.version(self.distribution)}"
        except metadata.PackageNotFoundError:
            return None


def load(module: str, distribution: str) -> Any:
    """Import a peer's module.

    Raises:
        UnsupportedError: it is not installed, or something that it needs is not.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"{module} cannot be imported ({error}); install what {REQUIREMENTS} lists for {distribution}"
        ) from None


def _heads_first(x: Tensor) -> Tensor:
    """``[b, t, h, d]`` as ``[b, h, t, d]`` and back."""
    return x.transpose(1, 2)


def _require(problem: Problem, *families: str) -> None:
    if problem.family not in families:
        raise UnsupportedError(f"it knows {', '.join(families)} masks, not {problem.family}")


def _sdpa(problem: Problem) -> Attend:
    """Attention of a whole sequence, ``[b, h, t, d]``, by PyTorch."""
    mask, causal = problem.dense, problem.causal

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=problem.case.scale, enable_gqa=grouped
        )

    return attend


def _layer(problem: Problem) -> Any:
    """The part of a Transformers attention layer that its attention functions look at."""
    groups = problem.case.q.shape[2] // problem.case.k.shape[2]
    return SimpleNamespace(training=True, is_causal=problem.causal, num_key_value_groups=groups)


def _join_deepspeed() -> None:
    """DeepSpeed's own wrappers of the collectives, over the process group there is."""
    load("lcab_plugin.adapters.deepspeed", "deepspeed").init_distributed()


def _deepspeed_hf(problem: Problem) -> Attend:
    sequence = load("deepspeed.runtime.sequence_parallel.ulysses_sp", "deepspeed")
    sdpa = load("transformers.integrations.sdpa_attention", "transformers").sdpa_attention_forward
    _join_deepspeed()
    case = problem.case
    module = sequence.UlyssesSPAttentionHF(
        attn=sdpa,
        batch_size=case.q.shape[0],
        attn_head_count=case.q.shape[2],
        attn_head_size=case.q.shape[3],
        kv_head_count=case.k.shape[2],
        num_hidden_layers=1,
        process_group=problem.group,
        local_seq_length=case.q.shape[1],
        global_seq_length=problem.tokens,
    )
    layer, first = _layer(problem), collectives.rank() * case.q.shape[1]
    positions = torch.arange(first, first + case.q.shape[1], device=case.q.device)
    positions = positions.expand(case.q.shape[0], -1).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_heads_first(x) for x in (q, k, v))
        out, _ = module(layer, q, k, v, problem.dense, scaling=case.scale, position_ids=positions)
        return out.unflatten(-1, case.q.shape[2:])

    return attend


def _deepspeed_distributed(problem: Problem) -> Attend:
    layer = load("deepspeed.sequence.layer", "deepspeed")
    _join_deepspeed()
    sdpa = _sdpa(problem)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _heads_first(sdpa(*(_heads_first(x) for x in (q, k, v))))

    module = layer.DistributedAttention(local, problem.group, scatter_idx=2, gather_idx=1)
    return lambda q, k, v: module(q, k, v, 0)


def _ringmaster(problem: Problem, make: Callable[[Any], Any], **settings: Any) -> Attend:
    """``make``: the package's attention function from its root; ``settings``: of its configuration."""
    rm = load("ringmaster", "axolotl-ringmaster")
    group = problem.group
    config = rm.RingmasterConfig(size=collectives.world_size(), **settings)
    side = "ulysses_group" if config.backend == rm.Backend.ULYSSES else "ring_group"
    runtime = rm.CPRuntime(config=config, cp_group=group, varlen=problem.segments, **{side: group})
    function, layer = make(rm), _layer(problem)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rm.set_runtime(runtime)  # one of the process: the peers take turns
        heads_first = (_heads_first(x) for x in (q, k, v))
        scale, window = problem.case.scale, problem.window
        return function(layer, *heads_first, None, scaling=scale, is_causal=True, sliding_window=window)[0]

    return attend


_RINGMASTER_MASKS = ("causal", "causal_document", "sliding_window_causal")


def _flash_or(fallback: str, problem: Problem) -> str:
    """The kernel that the package runs on this device."""
    return "flash_attention_2" if problem.case.q.is_cuda else fallback


def _ringmaster_ulysses(problem: Problem) -> Attend:
    _require(problem, *_RINGMASTER_MASKS)
    strategies = load("ringmaster.strategies.ulysses", "axolotl-ringmaster")
    load("transformers", "transformers")
    return _ringmaster(problem, lambda rm: strategies.make_ulysses_attention("sdpa"), backend="ulysses")


def _ringmaster_ring(problem: Problem, rotate: str, balance: str) -> Attend:
    ring = load("ringmaster.strategies.ring", "axolotl-ringmaster")
    provider = "hf_kernels" if problem.case.q.is_cuda else "math"  # its other one has no backward

    def make(rm: Any) -> Any:
        return ring.make_ring_attention(provider, _flash_or("math", problem), rm.RotateMethod(rotate))

    rm = load("ringmaster", "axolotl-ringmaster")
    return _ringmaster(problem, make, backend=rm.Backend.RING, load_balance=rm.LoadBalance(balance))


def _ringmaster_p2p(problem: Problem) -> Attend:
    _require(problem, "causal")
    return _ringmaster_ring(problem, "alltoall", "none")


def _ringmaster_all_gather(problem: Problem) -> Attend:
    _require(problem, "causal")
    return _ringmaster_ring(problem, "allgather", "none")


def _ringmaster_varlen(problem: Problem) -> Attend:
    """Its path for packed documents and windows; causal attention goes through it as one document."""
    _require(problem, *_RINGMASTER_MASKS)
    loop = load("ringmaster.ring.loop", "axolotl-ringmaster")
    boundaries = [i * problem.tokens for i in range(problem.case.q.shape[0] + 1)]
    segments = problem.segments or (torch.tensor(boundaries, dtype=torch.int32), problem.tokens)
    ends = segments[0].to(problem.case.q.device)
    settings = {"group": problem.group, "scaling": problem.case.scale, "cu_seqlens": ends}
    settings["attn_implementation"] = _flash_or("math", problem)
    if problem.window is not None:
        settings["window"] = (problem.window - 1, 0)
    return lambda q, k, v: loop.varlen_ring_attention(*(_heads_first(x) for x in (q, k, v)), **settings)


def _ringmaster_zigzag(problem: Problem) -> Attend:
    _require(problem, "causal", "causal_document")
    return _ringmaster_ring(problem, "alltoall", "head_tail")


def _ringmaster_distflash(problem: Problem) -> Attend:
    _require(problem, "causal", "causal_document")
    return _ringmaster_ring(problem, "alltoall", "distflash")


def _para_attn_ulysses(problem: Problem) -> Attend:
    function = load("para_attn.para_attn_interface", "para-attn").ulysses_attn_func
    return _para_attn(problem, function, attn_mask=problem.dense, is_causal=problem.causal)


def _para_attn_ring(problem: Problem) -> Attend:
    _require(problem, "full", "causal")
    function = load("para_attn.para_attn_interface", "para-attn").ring_attn_func
    return _para_attn(problem, function, is_causal=problem.causal)


def _para_attn(problem: Problem, function: Callable[..., Tensor], **settings: Any) -> Attend:
    if problem.case.q.shape[2] != problem.case.k.shape[2]:
        raise UnsupportedError("it has no grouped heads; give as many key/value heads as query heads")
    settings |= {"mesh": problem.group, "scale": problem.case.scale}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _heads_first(function(*(_heads_first(x) for x in (q, k, v)), **settings))

    return attend


def _yunchang(problem: Problem, ring: str) -> Attend:
    """Its attention over a ring of all ranks, with flash-attn on a GPU that has it and PyTorch elsewhere."""
    _require(problem, "full", "causal")
    package = load("yunchang", "yunchang")
    kinds = load("yunchang.kernels", "yunchang").AttnType
    kind = kinds.FA if problem.case.q.is_cuda and find_spec("flash_attn") else kinds.TORCH_FLASH
    if ring == "zigzag" and kind is not kinds.FA:
        raise UnsupportedError("its zigzag ring runs flash-attn, which needs a GPU and is not PyTorch's")
    ranks = collectives.world_size()
    package.set_seq_parallel_pg(1, ranks, collectives.rank(), ranks)
    name = "basic_pytorch" if kind is kinds.TORCH_FLASH else ring
    module = package.LongContextAttention(ring_impl_type=name, attn_type=kind)
    return lambda q, k, v: module(q, k, v, softmax_scale=problem.case.scale, causal=problem.causal)


def _yunchang_ulysses(problem: Problem) -> Attend:
    _require(problem, "full", "causal")
    package = load("yunchang", "yunchang")
    if not (problem.case.q.is_cuda and find_spec("flash_attn")):
        raise UnsupportedError(
            "without flash-attn, which needs a GPU, its all-to-all goes around a ring over the default group"
        )
    module = package.UlyssesAttention(problem.group)
    return lambda q, k, v: module(q, k, v, softmax_scale=problem.case.scale, causal=problem.causal)


def _ring_flash_attn(problem: Problem) -> Attend:
    _require(problem, "causal")
    function = load("ring_flash_attn", "ring-flash-attn").zigzag_ring_flash_attn_func
    settings = {"softmax_scale": problem.case.scale, "causal": True, "group": problem.group}
    return lambda q, k, v: function(q, k, v, **settings)


def _torch_ring(problem: Problem) -> Attend:
    """``torch.distributed.tensor.experimental``'s: PyTorch's own operators on tensors that know their shards,
    head-tail balanced."""
    _require(problem, "causal")
    if not problem.case.q.is_cuda:
        raise UnsupportedError(
            "it replaces PyTorch's flash, efficient and cudnn operators, none of which a CPU dispatches to"
        )
    own = load("torch.distributed.tensor.experimental._attention", "torch")
    mesh = load("torch.distributed.device_mesh", "torch").init_device_mesh(
        problem.case.q.device.type, (collectives.world_size(),)
    )
    tensor = load("torch.distributed.tensor", "torch")
    own._enable_context_parallel_dispatcher()
    own._cp_options.enable_load_balance = True
    shards = [tensor.Shard(2)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            tensor.DTensor.from_local(_heads_first(x), mesh, shards, run_check=False) for x in (q, k, v)
        )
        out: Any = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=problem.case.scale)
        return _heads_first(out.to_local())

    return attend


_TABLE = (
    Peer("deepspeed.UlyssesSPAttentionHF", "deepspeed", "contiguous", _deepspeed_hf, dense=True),
    Peer("deepspeed.DistributedAttention", "deepspeed", "contiguous", _deepspeed_distributed, dense=True),
    Peer("ringmaster.ulysses", "axolotl-ringmaster", "contiguous", _ringmaster_ulysses, dense=True),
    Peer("ringmaster.ring_p2p", "axolotl-ringmaster", "contiguous", _ringmaster_p2p),
    Peer("ringmaster.ring_all_gather", "axolotl-ringmaster", "contiguous", _ringmaster_all_gather),
    Peer("ringmaster.varlen_ring", "axolotl-ringmaster", "contiguous", _ringmaster_varlen, dense=True),
    Peer("ringmaster.zigzag_ring", "axolotl-ringmaster", "zigzag", _ringmaster_zigzag, dense=True),
    Peer("ringmaster.distflash", "axolotl-ringmaster", "contiguous", _ringmaster_distflash, dense=True),
    Peer("para_attn.ulysses", "para-attn", "contiguous", _para_attn_ulysses, dense=True),
    Peer("para_attn.ring", "para-attn", "contiguous", _para_attn_ring),
    Peer("yunchang.ulysses", "yunchang", "contiguous", _yunchang_ulysses),
    Peer("yunchang.ring", "yunchang", "contiguous", lambda problem: _yunchang(problem, "basic")),
    Peer("yunchang.zigzag_ring", "yunchang", "zigzag", lambda problem: _yunchang(problem, "zigzag")),
    Peer("ring_flash_attn.zigzag_ring", "ring-flash-attn", "zigzag", _ring_flash_attn),
    Peer("torch.context_parallel", "torch", "zigzag", _torch_ring),
)
PEERS = {peer.name: peer for peer in _TABLE}
