"""Attention kernels, found by name. One file each; third parties add theirs through the entry point
group ``lcab_plugin.kernels`` (the entry point's value is an object with the contract's methods)."""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata

from lcab_plugin.errors import unknown
from lcab_plugin.kernels.contract import Kernel, KernelOptions

__all__ = ["Kernel", "KernelOptions", "availability", "get", "names"]

_TABLE = {
    name: f"lcab_plugin.kernels.{name}"
    for name in (
        "naive",
        "sdpa_math",
        "sdpa_flash",
        "sdpa_efficient",
        "sdpa_cudnn",
        "varlen",
        "flex",
        "triton",
        "fa2",
        "fa3",
        "fa4",
        "te_fused",
        "cudnn",
        "flashmask",
        "ffa",
    )
}


@cache
def _third_party() -> dict[str, metadata.EntryPoint]:
    return {e.name: e for e in metadata.entry_points(group="lcab_plugin.kernels") if e.name not in _TABLE}


def names() -> tuple[str, ...]:
    """Every kernel that can be asked for by name, available here or not."""
    return (*_TABLE, *_third_party())


@cache
def get(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        LcabError: no kernel has that name; the message gives the nearest.
    """
    if name in _TABLE:
        return import_module(_TABLE[name]).KERNEL
    if name in _third_party():
        return _third_party()[name].load()
    raise unknown("kernel", name, names())


def availability() -> dict[str, str | None]:
    """``{name: None, or the reason it cannot run on this machine}``."""
    return {name: get(name).unavailable() for name in names()}
