"""What the kernels of Hopper GPUs share. They are written in Gluon, Triton's own lower level, and imported
only when they are launched.

A program keeps to one multiprocessor and takes lines of the block table from the heaviest to the lightest.
One warp brings blocks of rows through the tensor memory accelerator into a ring of places in shared memory;
two groups of four warps own 64 rows each and compute with every block that comes (FlashAttention 3, arXiv
2407.08608). Where query heads come in pairs that share keys, the groups own the same rows of two heads;
elsewhere the halves of twice the rows.

Masks, soft cap and the order of blocks are those of ``forward.py`` and ``backward.py``, whose helpers are
called.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lcab_plugin.kernels.triton import forward as portable

LN2 = portable.LN2
OWN = 64  # rows of a group of warps: the height of a warpgroup's product
LAUNCH = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
WORKERS = gl.constexpr((4, 1))  # warps of the second group, and of the one that loads
# A thread of theirs may use so many registers; those of the first group get what is left of 3 x 168.
REGISTERS = gl.constexpr((240, 24))

at, run_at, reached, visible, keep_intervals, logits = (
    gluon.jit(helper.fn)
    for helper in (
        portable.at,
        portable.run_at,
        portable.reached,
        portable.visible,
        portable.keep_intervals,
        portable.logits,
    )
)
# Renamed in Triton 3.7.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@dataclass(frozen=True)
class Meta:
    """What a launch is compiled for."""

    paired: bool  # the groups own the same rows of two heads
    block: int  # rows of a block that is brought
    stages: int  # blocks in shared memory
    kept: int  # intervals a row that stay in registers; 0: they are read from memory
    softcap: bool
    dim: int  # padded head_dim of queries and keys
    value_dim: int
    own: int = OWN

    @property
    def scores(self) -> gl.NVMMADistributedLayout:
        """Where scores lie, [own, block]."""
        return self.product(self.block)

    def product(self, width: int) -> gl.NVMMADistributedLayout:
        """Where a group's product of this width lies, [own, width]."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])

    def factor(self, width: int) -> gl.DotOperandLayout:
        """Where the left factor [own, block] of such a product lies: in the registers of the scores."""
        return gl.DotOperandLayout(0, self.product(width), 2)


def source(x: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """A tensor ``[b, t, h, d]`` of 16-bit numbers as a kernel reads and writes ``rows`` rows of a head,
    ``dim`` wide: zeros past its ends."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, dim], tile_layout(rows, dim))


@cache  # since the host starts launches no faster than it describes their tensors
def tile_layout(rows: int, dim: int) -> gl.NVMMASharedLayout:
    """Where a block of rows lies in shared memory; alike for both 16-bit types."""
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, dim], gl.bfloat16)


def row_source(x: Tensor, rows: int) -> TensorDescriptor:
    """One float32 number a row, ``[b, h, t]`` with 16-byte aligned rows, ``rows`` at a time."""
    b, h, t = x.shape
    return TensorDescriptor(x, [b * h, t], [x.stride(1), 1], [1, rows], row_layout())


@cache
def row_layout() -> gl.NVMMASharedLayout:
    """Where a block of numbers, one a row, lies in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.jit
def item_of(turn):
    """The item of this program's turn: forth and back, so that no program gets the heavier one each time."""
    programs, own = gl.num_programs(0), gl.program_id(0)
    return turn * programs + gl.where((turn & 1) == 1, programs - 1 - own, own)


@gluon.jit
def turns(items):
    """How many items this program takes."""
    rounds = items // gl.num_programs(0)
    return rounds + (item_of(rounds) < items).to(gl.int32)


@gluon.jit
def locate(item, lines, counts, SIDE: gl.constexpr, META: gl.constexpr):
    """An item's line of the table, batch, head and first own row, of one of the two groups. So many units as
    ``together`` go through the table side by side, then the next, so that the L2 cache holds what they read.

    Looked up when an item's turn comes, not a turn ahead: where a loop carries loaded values on, Triton 3.6
    takes those of the first turn for all (its pass ``TritonLoopAwareCSE``).
    """
    units, heads, _, together, items = counts
    section = items // units * together  # items of so many units
    line = lines + item % section // together * 5
    unit = item // section * together + item % together
    block = gl.load(line)
    if META.value.paired:
        pairs = heads // 2
        return line, unit // pairs, (unit % pairs) * 2 + SIDE, block * META.value.own
    else:
        return line, unit // heads, unit % heads, (block * 2 + SIDE) * META.value.own


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """``COUNT`` barriers, each of which waits for ``ARRIVALS``."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def wait_full(barriers, j, META: gl.constexpr):
    """Until block ``j`` of this program has come."""
    mbarrier.wait(barriers.index(j % META.value.stages), (j // META.value.stages) & 1)


@gluon.jit
def fetch(source, where, empty, full, buffer, j, META: gl.constexpr):
    """Bring block ``j``, once its place is free."""
    stage = j % META.value.stages
    mbarrier.wait(empty.index(stage), ((j // META.value.stages) & 1) ^ 1)
    mbarrier.expect(full.index(stage), source.block_type.nbytes)
    tma_load(source, where, full.index(stage), buffer.index(stage))


@gluon.jit
def load_keys(own, streamed, tables, counts, PLACES: gl.constexpr, META: gl.constexpr):
    """The warp that loads, where the groups own rows of queries: their tiles of every item (``own``: one
    tensor or two, their buffers and barriers), then its blocks of keys and values in the order of use."""
    own_sources, own_buffers, own_full, own_empty = own
    k_source, v_source, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty = streamed
    lines, runs, _, _ = tables
    _, _, group, _, items = counts
    j = gl.to_tensor(0)
    for n in range(turns(items)):
        for SIDE in gl.static_range(2):
            line, b, h, row = locate(item_of(n), lines, counts, SIDE, META)
            place = SIDE * PLACES + n % PLACES
            full = own_full.index(place)
            mbarrier.wait(own_empty.index(place), ((n // PLACES) & 1) ^ 1)
            for i in gl.static_range(len(own_sources)):
                mbarrier.expect(full, own_sources[i].block_type.nbytes)
                tma_load(own_sources[i], [b, row, h, 0], full, own_buffers[i].index(place))
        for r in range(gl.load(line + 1), gl.load(line + 3)):
            begin, end = run_at(runs, r)
            for block in range(begin, end):
                where = [b, block * META.value.block, h // group, 0]
                fetch(k_source, where, k_empty, k_full, k_buffer, j, META)
                fetch(v_source, where, v_empty, v_full, v_buffer, j, META)
                j += 1
