"""Option texts of several commands: lists of names and of numbers, and the shape of attention's tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lcab_plugin.errors import LcabError

if TYPE_CHECKING:
    from lcab_plugin.bench.settings import Shape


def names(option: str, text: str | None) -> tuple[str, ...] | None:
    """Names separated by commas, each once; None where the option is left out."""
    if text is None:
        return None
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise LcabError(f"{option} {text!r} names nothing; give names separated by commas.")
    return found


def integers(option: str, text: str | None, separator: str) -> tuple[int, ...] | None:
    """Integers between separators; None where the option is left out."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(separator))
    except ValueError:
        example = "64:8" if separator == ":" else "1024,4096"
        raise LcabError(f"{option} takes integers such as {example}, not {text!r}.") from None


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers separated by commas; None where the option is left out."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise LcabError(f"{option} takes numbers such as 0.1,0.5, not {text!r}.") from None


def shape(default: Shape, heads: str | None, head_dim: int | None, dtype: str | None, batch: int) -> Shape:
    """The default shape with what the options change."""
    numbers = integers("--heads", heads, ":") or (default.heads, default.kv_heads)
    if len(numbers) > 2:
        raise LcabError(f"--heads takes query and key/value heads such as 64:8, not {heads!r}.")
    return replace(
        default,
        batch=batch,
        heads=numbers[0],
        kv_heads=numbers[-1],
        head_dim=default.head_dim if head_dim is None else head_dim,
        dtype=default.dtype if dtype is None else dtype,
    )
