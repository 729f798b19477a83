"""Stand-ins for libraries that are not installed here, with the argument lists those have published.

``signatures/<library>.json`` is written by ``scripts/published_signatures.py`` from the published wheel,
sdist or tagged source (never by importing it)::

    {"library", "version", "source": "<file in it>", "url", "sha256", "sha256_of": "<archive or file>",
     "functions": {name: {"module", "args", "defaults", "kwonly", "kwonly_required", "vararg", "varkw",
                          "returns"}}}

``defaults`` counts the last of ``args`` that have one; ``returns`` is the number of values, null where the
source does not tell.

A test gives an implementation by function name, and runs the adapter against it::

    def test_forward(monkeypatch):
        calls = published.install(monkeypatch, "flash-attn", {"_flash_attn_varlen_forward": emulated})
        out, lse = get("fa2").forward(q, k, v, mask, options)     # the adapter imports the stand-in
        assert calls[0].arguments["softcap"] == 0.0

The stand-in binds its arguments as Python would (a renamed, missing or surplus one is a TypeError), calls
``emulated(**arguments)`` with those that were given, and checks the number of values returned. A function
without an implementation raises when called. A last argument of ``renamed(load("flash-attn"), function, old,
new)`` installs another signature than the committed one. ``find_spec`` and ``importlib.metadata.version``
answer as if the library were installed.

``varlen_forward`` and ``varlen_backward`` are what most libraries' variable-length calls are documented to
do, row by row over dense scores, and know nothing of this package's lowering.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "signatures"

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One call of a stand-in: which function, and the arguments it was given by name."""

    function: str
    arguments: dict[str, Any]


def load(library: str) -> dict[str, Any]:
    """The committed record of a library."""
    return json.loads((FOLDER / f"{library}.json").read_text())


def renamed(record: dict[str, Any], function: str, old: str, new: str) -> dict[str, Any]:
    """The record with one argument under another name, as a later release might have it."""
    record = copy.deepcopy(record)
    described = record["functions"][function]
    for names in (described["args"], described["kwonly"], described["kwonly_required"]):
        names[:] = [new if name == old else name for name in names]
    return record


def install(
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    implementations: Mapping[str, Implementation],
    record: dict[str, Any] | None = None,
    distribution: str | None = None,
) -> list[Call]:
    """Put the library's modules into ``sys.modules`` for one test; the list fills with the calls made.

    ``distribution``: its name for ``importlib.metadata``, where that is not ``library``.
    """
    record = load(library) if record is None else record
    unknown = set(implementations) - set(record["functions"])
    assert not unknown, f"{library}.json describes no {sorted(unknown)}"
    calls: list[Call] = []
    for name, described in record["functions"].items():
        owner: Any = _module(monkeypatch, described["module"])
        *classes, last = name.split(".")
        for part in classes:
            if part not in vars(owner):
                setattr(owner, part, type(part, (), {}))
            owner = getattr(owner, part)
        function = _stand_in(name, described, implementations.get(name), calls)
        setattr(owner, last, staticmethod(function) if classes else function)

    def version(asked: str, real: Callable[[str], str] = importlib.metadata.version) -> str:
        same = _normal(asked) == _normal(distribution or library)
        return record["version"] if same else real(asked)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return calls


def signature(described: dict[str, Any]) -> inspect.Signature:
    """A published signature; a default's value is not on record, so an argument left out stays out."""
    kind, parameters = inspect.Parameter, []
    required = len(described["args"]) - described["defaults"]
    for i, name in enumerate(described["args"]):
        parameters.append(kind(name, kind.POSITIONAL_OR_KEYWORD, default=kind.empty if i < required else ...))
    if described["vararg"]:
        parameters.append(kind(described["vararg"], kind.VAR_POSITIONAL))
    for name in described["kwonly"]:
        needed = name in described["kwonly_required"]
        parameters.append(kind(name, kind.KEYWORD_ONLY, default=kind.empty if needed else ...))
    if described["varkw"]:
        parameters.append(kind(described["varkw"], kind.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _stand_in(
    name: str, described: dict[str, Any], implementation: Implementation | None, calls: list[Call]
) -> Callable[..., Any]:
    published = signature(described)

    def function(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(published.bind(*args, **kwargs).arguments)
        calls.append(Call(name, arguments))
        assert implementation is not None, f"this test gives no implementation of {name}"
        result = implementation(**arguments)
        if described["returns"] is not None:
            count = len(result) if isinstance(result, tuple) else 1
            assert count == described["returns"], f"{name} returns {described['returns']} values, not {count}"
        return result

    function.__name__ = name
    function.__signature__ = published  # type: ignore[attr-defined]
    return function


def _module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """The module of that name, made with its parents where it is not one of ours already."""
    module = sys.modules.get(name)
    if module is None or not hasattr(module, "__published__"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__published__ = True  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        monkeypatch.setattr(_module(monkeypatch, parent), child, module, raising=False)
    return module


def _normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    window: tuple[int | None, int | None],
    scale: float,
    softcap: float = 0.0,
    empty_lse: float = float("-inf"),
) -> tuple[Tensor, Tensor]:
    """``out [t, h, dv]`` and ``lse [h, t]`` of segments of ``q [t, h, d]``, ``k, v [tk, kv_heads, d]``.

    ``window``: (left, right), bottom-right aligned in each segment, None or negative for no limit.
    ``empty_lse``: what the library writes for a row that sees no key.
    """
    out = q.new_full((*q.shape[:2], v.shape[-1]), float("nan"))
    lse = q.new_full((q.shape[1], q.shape[0]), float("nan"), dtype=_wide(q))
    for rows, keys in _segments(cu_q, cu_k):
        s, _, _ = _scores(q[rows], k[keys], window, scale, softcap)
        lse[:, rows] = s.logsumexp(-1)
        p = s.softmax(-1).nan_to_num(0.0)
        out[rows] = torch.einsum("hqk,khd->qhd", p, _repeat(v[keys], q)).to(out.dtype)
    return out, lse.masked_fill(lse == float("-inf"), empty_lse)


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    window: tuple[int | None, int | None],
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` from the ``out`` and ``lse`` given, in the layout of ``varlen_forward``."""
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    for rows, keys in _segments(cu_q, cu_k):
        s, seen, slope = _scores(q[rows], k[keys], window, scale, softcap)
        p = torch.exp(s - lse[:, rows, None]).masked_fill(~seen, 0.0)
        d, value, key = dout[rows].to(p.dtype), _repeat(v[keys], q), _repeat(k[keys], q)
        delta = (d * out[rows]).sum(-1).t()[:, :, None]
        ds = p * (torch.einsum("qhd,khd->hqk", d, value) - delta) * slope * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, key).to(q.dtype)
        for grad, wide in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[rows].to(p.dtype))),
            (dv, torch.einsum("hqk,qhd->khd", p, d)),
        ):
            grad[keys] = wide.unflatten(1, (k.shape[1], -1)).sum(2).to(grad.dtype)
    return dq, dk, dv


def _segments(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    q, k = cu_q.tolist(), cu_k.tolist()
    return [(slice(*r), slice(*c)) for r, c in zip(pairwise(q), pairwise(k), strict=True)]


def _scores(
    q: Tensor, k: Tensor, window: tuple[int | None, int | None], scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores [h, q, k] of one segment, the cells seen, and the soft cap's derivative."""
    s = torch.einsum("qhd,khd->hqk", q.to(_wide(q)), _repeat(k, q)) * scale
    slope = torch.ones_like(s)
    if softcap:
        slope = 1 - torch.tanh(s / softcap) ** 2
        s = softcap * torch.tanh(s / softcap)
    row = torch.arange(len(q))[:, None] + len(k) - len(q)  # the key at the end of this row's diagonal
    column = torch.arange(len(k))[None, :]
    left, right = window
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if left is not None and left >= 0:
        seen &= column >= row - left
    if right is not None and right >= 0:
        seen &= column <= row + right
    return s.masked_fill(~seen, float("-inf")), seen, slope


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    return x.to(_wide(q)).repeat_interleave(q.shape[1] // x.shape[1], 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
