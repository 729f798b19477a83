"""Reader of Megatron's indexed datasets: ``prefix.bin`` holds the tokens, ``prefix.idx`` where they are.

The index is little-endian: the magic ``MMIDIDX\\0\\0``, version (uint64, 1), token dtype code (uint8), number
of sequences and number of document entries (uint64 each), the length of every sequence (int32), the byte
offset of every sequence (int64), and the first sequence of each document with the number of sequences as the
last entry (int64). Format: NVIDIA/Megatron-LM, ``megatron/core/datasets/indexed_dataset.py``, as its
``tools/preprocess_data.py`` writes it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcab_plugin.errors import LcabError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


def paths(source: str) -> tuple[Path, Path] | None:
    """``(prefix.bin, prefix.idx)`` where ``source`` is the prefix or either file; None if neither exists."""
    prefix = source[:-4] if source.endswith((".bin", ".idx")) else source
    pair = Path(prefix + ".bin"), Path(prefix + ".idx")
    return pair if any(path.is_file() for path in pair) else None


def read(bin_path: Path, idx_path: Path) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Memory-mapped tokens ``[total]`` and document boundaries int64 ``[documents + 1]`` in tokens.

    Raises:
        LcabError: a file is missing, cut short, of another format or version, or not one run of tokens.
    """
    for path, other in ((bin_path, idx_path), (idx_path, bin_path)):
        if not path.is_file():
            raise LcabError(f"{path} does not exist beside {other}; a Megatron dataset needs both files.")
    dtype, lengths, pointers, documents = _read_index(idx_path)
    if not len(lengths):
        raise LcabError(f"{idx_path} lists no sequences; preprocess a text that is not empty.")
    ends = np.cumsum(lengths, dtype=np.int64)
    if not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
        raise LcabError(f"the sequences of {bin_path} do not follow one another; write it anew in order.")
    if bin_path.stat().st_size < int(ends[-1]) * dtype.itemsize:
        raise LcabError(
            f"{bin_path} has {bin_path.stat().st_size} bytes, its index names {int(ends[-1])} tokens of "
            f"{dtype}; copy the whole file."
        )
    tokens = np.memmap(bin_path, dtype=dtype, mode="r", shape=(int(ends[-1]),))
    return tokens, np.append(0, ends)[documents]


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Token dtype, sequence lengths, sequence byte offsets, and the document entries."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise LcabError(f"{path} is not a Megatron index: it begins with {header[:9]!r}, not {MAGIC!r}.")
    _, version, code, sequences, entries = _HEADER.unpack(header)
    if version != 1:
        raise LcabError(f"{path} has index version {version}; version 1 is the one that can be read.")
    if code not in _DTYPES:
        raise LcabError(f"{path} has token dtype code {code}; integer tokens are 1-5 and 8.")
    if size < _HEADER.size + sequences * 12 + entries * 8:
        raise LcabError(f"{path} is cut short: {size} bytes for {sequences} sequences; copy the whole file.")
    index = np.memmap(path, dtype=np.uint8, mode="r")
    lengths, at = _column(index, _HEADER.size, np.dtype("<i4"), sequences)
    pointers, at = _column(index, at, np.dtype("<i8"), sequences)
    documents, _ = _column(index, at, np.dtype("<i8"), entries)
    if (
        not len(documents)
        or documents[0] != 0
        or documents[-1] != sequences
        or (np.diff(documents) < 0).any()
    ):
        raise LcabError(f"the documents of {path} do not cover its {sequences} sequences; write it anew.")
    return np.dtype(_DTYPES[code]), lengths, pointers, documents


def _column(
    index: NDArray[np.uint8], start: int, dtype: np.dtype[Any], count: int
) -> tuple[NDArray[np.int64], int]:
    """``count`` integers from byte ``start`` on, and the byte after them."""
    stop = start + count * dtype.itemsize
    return index[start:stop].view(dtype).astype(np.int64), stop
