"""Megatron's .bin/.idx, written here by its published layout and read back."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from lcab_plugin.errors import LcabError
from lcab_plugin.training.data import PackedText, open_corpus

CODES = {"uint8": 1, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}
DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [], [[7], [8, 9, 10, 11]]]  # of sequences of tokens


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16", version: int = 1) -> None:
    sequences = [sequence for document in documents for sequence in document]
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=dtype)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * tokens.itemsize
    entries = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, CODES[dtype], len(sequences), len(entries))
    arrays = (lengths, pointers, entries)
    prefix.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_round_trip(tmp_path: Path, dtype: str, suffix: str) -> None:
    write(tmp_path / "text", DOCUMENTS, dtype)
    corpus = open_corpus(str(tmp_path / "text") + suffix, vocab=12)
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.lengths.tolist() == [4, 2, 5]
    batch = PackedText(corpus, 11, shuffle=False).batch([0])
    assert batch.tokens[0].tolist() == list(range(1, 12))
    assert batch.lengths[0].tolist() == [4, 2, 5]
    assert np.flatnonzero(~batch.loss_mask[0].numpy()).tolist() == [3, 5, 10]


def test_another_dtype_is_the_same_text(tmp_path: Path) -> None:
    digests = []
    for dtype in ("uint16", "int32"):
        write(tmp_path / dtype, DOCUMENTS, dtype)
        text = PackedText(open_corpus(str(tmp_path / dtype), vocab=12), 5)
        digests.append(text.batch([0, 1]).digests)
    assert digests[0] == digests[1]


def test_broken_datasets_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "text"
    source = str(prefix)
    write(prefix, DOCUMENTS)
    with pytest.raises(LcabError, match="--vocab"):
        open_corpus(source)
    index = prefix.with_suffix(".idx")
    whole = index.read_bytes()
    for broken, words in (
        (b"TNTIDX\0\0\0" + whole[9:], "not a Megatron index"),
        (whole[:20], "not a Megatron index"),
        (whole[:-8], "cut short"),
        (whole[:-8] + struct.pack("<q", 4), "do not cover"),
        (whole[:9] + struct.pack("<Q", 2) + whole[17:], "version 2"),
        (whole[:17] + b"\x07" + whole[18:], "code 7"),
    ):
        index.write_bytes(broken)
        with pytest.raises(LcabError, match=words):
            open_corpus(source, vocab=12)
    index.write_bytes(whole)
    prefix.with_suffix(".bin").write_bytes(b"\0" * 10)
    with pytest.raises(LcabError, match="10 bytes"):
        open_corpus(source, vocab=12)
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(LcabError, match="needs both"):
        open_corpus(source, vocab=12)
    write(prefix, [[]])
    with pytest.raises(LcabError, match="no sequences"):
        open_corpus(source, vocab=12)


def test_sequences_out_of_order_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "text", DOCUMENTS)
    index = tmp_path / "text.idx"
    data = bytearray(index.read_bytes())
    at = 34 + 5 * 4  # the first of five pointers, after the header and the lengths
    data[at : at + 16] = data[at + 8 : at + 16] + data[at : at + 8]
    index.write_bytes(data)
    with pytest.raises(LcabError, match="do not follow one another"):
        open_corpus(str(tmp_path / "text"), vocab=12)
