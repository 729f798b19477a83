"""Which block sizes, warps and stages a launch uses: looked up, never measured on the way.

The table here ships with the package. ``lcab tune`` measures a GPU once and writes its own findings to
``USER_FILE``, which come first; the same request finds the same launch on every rank that reads the same
file, and the file's digest is part of the kernel's version. ``deterministic`` keeps to the shipped table.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.kernels.contract import KernelOptions
from lcab_plugin.masks import AttentionMask

Pass = Literal["forward", "dq", "dkv"]
Kind = Literal["dense", "sparse", "patchy"]  # of a mask: see `is_dense` and `is_patchy`
PASSES: tuple[Pass, ...] = ("forward", "dq", "dkv")
USER_FILE = Path.home() / ".cache" / "lcab_plugin" / "triton.json"


class Config(NamedTuple):
    """One launch: blocks of ``rows`` x ``keys``, warps, pipeline stages, tensor descriptors (TMA), and if
    warps are specialised (``hopper.py``: the rows, of dk and dv the keys, and the warps are of one of two
    groups)."""

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    specialised: bool = False


class Shape(NamedTuple):
    """What a launch is tuned by: everything but the mask itself, which enters as its kind, and the lengths,
    which enter as a power of two."""

    which: Pass
    capability: tuple[int, int]
    d: int
    dv: int
    dtype: torch.dtype
    group: int
    mask: Kind
    length: int

    @classmethod
    def of(
        cls,
        which: Pass,
        capability: tuple[int, int],
        dims: tuple[int, int],
        dtype: torch.dtype,
        group: int,
        mask: AttentionMask,
    ) -> Shape:
        """The shape of a launch under ``mask``; ``dims`` are the query's and the values' head_dim."""
        length = 1 << (max(mask.q_len, mask.k_len) - 1).bit_length()
        patchy = capability[0] == 9 and is_patchy(mask, which, group)
        kind: Kind = "patchy" if patchy else "dense" if is_dense(mask) else "sparse"
        return cls(which, capability, *dims, dtype, group, kind, length)

    def key(self, gpu: str, triton: str) -> str:
        """The name of this shape in the user's file, on that GPU under that Triton."""
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"d{self.d} dv{self.dv} {dtype} gqa{self.group} {self.mask} {self.length}"
        return f"{gpu} | triton {triton} | {self.which} {size}"


# {(pass, head_dim up to): configurations}: the default of dense masks, then that of sparse ones, then what
# else `lcab tune` tries; of patchy masks see `candidates`. tests/kernels/triton_resources.json has what each
# one takes on sm_80 and sm_90.
# Chosen on an H200 (Triton 3.6, bf16, 16K tokens, 64:8 heads, causal, full, documents, window).
HOPPER: dict[tuple[Pass, int], list[Config]] = {
    ("forward", 64): [
        Config(64, 128, 4, 2, True),
        Config(64, 64, 4, 3, True),
        Config(128, 64, 4, 3, True),
        Config(64, 128, 4, 2, True, True),
        Config(64, 128, 4, 4, True, True),
    ],
    ("forward", 128): [
        Config(64, 128, 4, 2, True, True),
        Config(64, 64, 4, 3, True, True),
        Config(128, 64, 4, 2, True),
        Config(64, 64, 4, 3, True),
    ],
    ("forward", 256): [
        Config(128, 64, 8, 2, True),
        Config(128, 64, 8, 2, True),
        Config(64, 32, 4, 2, True),
    ],
    ("dq", 64): [
        Config(64, 64, 4, 2, True),
        Config(64, 64, 4, 2, True),
        Config(64, 128, 4, 2, True, True),
        Config(64, 128, 4, 4, True, True),
        Config(64, 64, 4, 4, True, True),
    ],
    ("dq", 128): [
        Config(64, 64, 4, 3, True, True),
        Config(64, 64, 4, 3, True, True),
        Config(64, 128, 4, 2, True, True),
        Config(128, 64, 8, 3, True),
        Config(64, 64, 4, 2, True),
    ],
    ("dq", 256): [
        Config(128, 32, 8, 2, True),
        Config(128, 32, 8, 2, True),
        Config(64, 32, 4, 2, True),
    ],
    ("dkv", 64): [
        Config(128, 64, 4, 2, True, True),
        Config(128, 64, 4, 2, True, True),
        Config(128, 64, 4, 3, True, True),
        Config(64, 64, 4, 3, True, True),
        Config(32, 64, 4, 3, True),
    ],
    ("dkv", 128): [
        Config(64, 64, 4, 3, True, True),
        Config(64, 64, 4, 3, True, True),
        Config(64, 64, 4, 2, True),
    ],
    ("dkv", 256): [
        Config(32, 32, 8, 2, True),
        Config(32, 32, 8, 2, True),
        Config(32, 64, 8, 2, True),
    ],
}
AMPERE: dict[tuple[Pass, int], list[Config]] = {
    ("forward", 64): [Config(128, 64, 8, 3), Config(64, 32, 4, 3)],
    ("forward", 128): [Config(64, 32, 4, 3), Config(64, 32, 4, 2)],
    ("forward", 256): [Config(64, 32, 8, 2), Config(64, 32, 8, 2)],
    ("dq", 64): [Config(128, 64, 8, 2), Config(64, 32, 4, 2)],
    ("dq", 128): [Config(64, 64, 8, 2), Config(64, 32, 4, 2)],
    ("dq", 256): [Config(64, 32, 8, 2), Config(64, 32, 8, 2)],
    ("dkv", 64): [Config(32, 64, 8, 2), Config(32, 32, 4, 2)],
    ("dkv", 128): [Config(32, 64, 8, 2), Config(32, 64, 8, 2)],
    ("dkv", 256): [Config(32, 32, 8, 1), Config(32, 32, 8, 1)],
}
FLOAT32: dict[tuple[Pass, int], list[Config]] = {
    ("forward", 64): [Config(32, 16, 4, 1)],
    ("forward", 128): [Config(32, 16, 8, 1)],
    ("forward", 256): [Config(16, 16, 16, 1)],
    ("dq", 64): [Config(32, 32, 4, 1)],
    ("dq", 128): [Config(32, 16, 4, 1)],
    ("dq", 256): [Config(16, 32, 16, 1)],
    ("dkv", 64): [Config(16, 32, 4, 1)],
    ("dkv", 128): [Config(16, 32, 8, 1)],
    ("dkv", 256): [Config(16, 32, 16, 1)],
}


def choose(
    which: Pass,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    streamed: tuple[Tensor, ...],
    mask: AttentionMask,
    options: KernelOptions,
) -> Config:
    """The configuration of one launch: the user's for this GPU and shape if there is one, else the shipped.

    ``streamed``: the tensors that the pass reads through the tensor memory accelerator. Where that cannot
    read one of them, the launch is one for GPUs that have none.
    """
    shape = Shape.of(
        which,
        capability(q.device) if all(map(describable, streamed)) else (8, 0),
        (q.shape[-1], v.shape[-1]),
        q.dtype,
        q.shape[2] // k.shape[2],
        mask,
    )
    if not options.deterministic and q.is_cuda and (found := tuned(q.device).get(shape)):
        return found
    return candidates(shape)[0]


def describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it, and a contiguous tensor of its shape: 16-byte base,
    strides and rows, and nothing broadcast (a stride of 0)."""
    sizes = *x.stride()[:3], x.shape[-1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in sizes)


@lru_cache(maxsize=1024)
def candidates(shape: Shape) -> list[Config]:
    """What ``lcab tune`` may choose from, the shipped default first."""
    table = FLOAT32 if shape.dtype == torch.float32 else HOPPER if shape.capability[0] == 9 else AMPERE
    width = next(w for w in (64, 128, 256) if max(shape.d, shape.dv) <= w)
    configs = table[shape.which, width]
    if shape.mask == "patchy":  # the lowest lines of those that no two groups of warps share
        return sorted(configs, key=lambda c: (c.specialised, c.keys if shape.which == "dkv" else c.rows))
    return configs if shape.mask == "dense" or len(configs) == 1 else [configs[1], configs[0], *configs[2:]]


@lru_cache(maxsize=1024)
def is_dense(mask: AttentionMask) -> bool:
    """Whether blocks 128 keys wide touch at most 8% more cells than blocks of 64: on an H200 that is where
    the wider ones begin to pay for the work they add at the mask's edges."""
    wide, narrow = (int(mask.block_map(64, keys).length.sum()) * keys for keys in (128, 64))
    return wide <= 1.08 * narrow


@lru_cache(maxsize=1024)
def is_patchy(mask: AttentionMask, which: Pass, group: int) -> bool:
    """Whether rows see many intervals, and lines of 128 rows (or keys) touch over a third more cells than
    lines of 64. Specialised launches have such lines but where they pair query heads; most of their blocks
    would then be visible to one group of warps alone, with a mask to be read for each. Blocks of 64 tokens
    chosen one by one are such a mask: on an H200 their backward took 130 times as long as the forward."""
    if which != "dkv" and group % 2 == 0:
        return False
    begin, end = (mask.array[:, 2:4] if which == "dkv" else mask.array[:, :2]).T
    order = np.argsort(np.concatenate([end, begin]), kind="stable")  # where both fall together, ends first
    if np.cumsum(np.repeat([-1, 1], len(begin))[order]).max(initial=0) <= 2:  # slices of a row; most masks
        return False
    side = mask.transposed() if which == "dkv" else mask
    high, low = (int(side.block_map(rows, 64).length.sum()) * rows for rows in (128, 64))
    return 3 * high > 4 * low and len(side.row_intervals()[0]) > 2


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; (8, 0) for tensors on a CPU, where the interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


class _Tuned:
    """The user's findings for one GPU, looked up by shape and remembered."""

    def __init__(self, gpu: str) -> None:
        import triton

        self.gpu, self.triton, self.entries = gpu, triton.__version__, read()
        self._found: dict[Shape, Config | None] = {}

    def name(self, shape: Shape) -> str:
        """The name of a shape in the user's file."""
        return shape.key(self.gpu, self.triton)

    def get(self, shape: Shape) -> Config | None:
        """The user's configuration for this shape, if there is one."""
        if shape not in self._found:
            self._found[shape] = self.entries.get(self.name(shape))
        return self._found[shape]


@cache
def tuned(device: torch.device) -> _Tuned:
    """The user's findings for this GPU."""
    return _Tuned(torch.cuda.get_device_name(device))


def read(path: Path | None = None) -> dict[str, Config]:
    """The user's file; nothing where there is none, and nothing but a warning where it cannot be read."""
    path = path or USER_FILE
    if not path.exists():
        return {}
    try:
        return {key: Config(*value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the launches that `lcab tune` found are not used: {path} cannot be read ({error}); delete it "
            "and tune again",
            stacklevel=2,
        )
        return {}


def write(found: dict[str, Config], path: Path | None = None) -> Path:
    """Add findings to the user's file: written beside it and renamed, so that no reader sees half of one."""
    path = path or USER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {**read(path), **found}
    handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump({key: list(config) for key, config in sorted(entries.items())}, file, indent=1)
    Path(beside).replace(path)
    tuned.cache_clear()
    return path


def suffix() -> str:
    """``", tuned <digest>"`` where the user's file holds findings."""
    entries = read()
    if not entries:
        return ""
    digest = hashlib.blake2b(json.dumps(sorted(entries.items())).encode(), digest_size=4).hexdigest()
    return f", tuned {digest}"
