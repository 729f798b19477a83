"""Attention kernels, found by name. One file each; third parties add theirs through the entry point
group ``lcab_plugin.kernels`` (the entry point's value is an object with the contract's methods)."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module, metadata, resources
from typing import Any

from lcab_plugin.errors import unknown
from lcab_plugin.kernels.contract import Kernel, KernelOptions

__all__ = ["Kernel", "KernelOptions", "availability", "get", "names", "verified"]

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
    return {name: _reason(name) for name in names()}


def _reason(name: str) -> str | None:
    """A third party's broken module is that kernel's reason, not the end of the list."""
    try:
        return get(name).unavailable()
    except ImportError as error:
        return f"its module cannot be imported: {error}"


def verified(name: str) -> str:
    """Where a kernel passed every cell of the conformance suite, from the records that runs of it left, and
    which part of it changed since, which whoever changes it writes there (``changed``)."""
    entries = _records().get(name, ())
    return (
        ", ".join(
            f"{entry['device'].removeprefix('NVIDIA ')} ({_libraries(entry)}: {entry['cells']} cells"
            + ("" if entry["backward"] else ", forward only")
            + (f"; not since {entry['changed']} changed" if "changed" in entry else "")
            + ")"
            for entry in entries
        )
        or "nothing yet"
    )


@cache
def _records() -> dict[str, list[dict[str, Any]]]:
    return json.loads(resources.files(__name__).joinpath("verified.json").read_text(encoding="utf-8"))


def _libraries(entry: dict[str, Any]) -> str:
    torch = f"torch {entry['torch']}"
    return torch if entry["version"].startswith("torch ") else f"{entry['version']}, {torch}"
