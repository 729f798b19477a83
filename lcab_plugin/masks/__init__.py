"""Attention masks as unions of banded rectangles: types, builders, conversions, document lengths."""

from lcab_plugin.masks.blocks import EMPTY, FULL, PARTIAL, BlockMap
from lcab_plugin.masks.builders import (
    block_causal_document,
    block_sparse,
    causal,
    causal_blockwise,
    causal_document,
    from_name,
    full,
    full_document,
    global_sliding_window,
    names,
    needs_lengths,
    parameters,
    prefix_lm_causal,
    prefix_lm_document,
    share_question,
    sliding_window,
    sliding_window_causal,
)
from lcab_plugin.masks.convert import from_cu_seqlens, from_dense, from_ranges
from lcab_plugin.masks.geometry import NO_HI, NO_LO
from lcab_plugin.masks.lengths import distributions, sample_lengths
from lcab_plugin.masks.slices import AttentionMask, AttnSlice

__all__ = [
    "EMPTY",
    "FULL",
    "NO_HI",
    "NO_LO",
    "PARTIAL",
    "AttentionMask",
    "AttnSlice",
    "BlockMap",
    "block_causal_document",
    "block_sparse",
    "causal",
    "causal_blockwise",
    "causal_document",
    "distributions",
    "from_cu_seqlens",
    "from_dense",
    "from_name",
    "from_ranges",
    "full",
    "full_document",
    "global_sliding_window",
    "names",
    "needs_lengths",
    "parameters",
    "prefix_lm_causal",
    "prefix_lm_document",
    "sample_lengths",
    "share_question",
    "sliding_window",
    "sliding_window_causal",
]
