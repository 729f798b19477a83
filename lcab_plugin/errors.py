"""The errors a user sees: one sentence that names the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LcabError(ValueError):
    """Bad input or a bad configuration. The message names the value and what to write instead."""


class UnsupportedError(LcabError):
    """A kernel, strategy or layout that was asked for by name cannot run here; the message says why."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> LcabError:
    """The error for a name that is not in a table: names the nearest entry and lists them all."""
    table = sorted(choices)
    near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return LcabError(f"unknown {kind} {name!r}{hint} Choose one of: {', '.join(table)}.")
