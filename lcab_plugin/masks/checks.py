"""Numbers as users give them, checked: each error names the argument and the value."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from lcab_plugin.errors import LcabError
from lcab_plugin.masks.geometry import Ints


def size(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise LcabError(f"{name} must be an integer of at least {least}, not {value!r}.")
    return number


def share(name: str, value: Any) -> float:
    """`value` as a float above 0 and at most 1."""
    try:
        number = 0.0 if isinstance(value, bool) else float(operator.index(value))
    except TypeError:
        number = float(value) if isinstance(value, (float, np.floating)) else 0.0
    if not 0.0 < number <= 1.0:  # NaN is not
        raise LcabError(f"{name} must be a number above 0 and at most 1, not {value!r}.")
    return number


def integers(name: str, values: Any, ndim: int = 1) -> Ints:
    """`values` (a list, numpy array or tensor) as an int64 array of that many dimensions, none negative."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if not array.size:
        return np.zeros((0,) * ndim, dtype=np.int64)
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise LcabError(
            f"{name} must be integers in {ndim} dimension(s), not {array.dtype} {list(array.shape)}."
        )
    if (array < 0).any():
        raise LcabError(f"{name} must not be negative, but one of them is {array.min()}.")
    return array.astype(np.int64)
