"""Comparing what two runs' evaluations came to."""

from __future__ import annotations

from typing import Any

import pytest


def assert_same_evaluations(have: list[dict[str, Any]], want: list[dict[str, Any]], budget: float) -> None:
    """Loss and accuracy by position and by distance of recall, equal but for rounding."""

    def tables(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        last = next(record for record in reversed(records) if record["type"] == "eval")
        return [last["by_document_position"], last["by_sequence_position"], records[-1]["recall"]]

    for ours, theirs in zip(tables(have), tables(want), strict=True):
        assert ours.keys() == theirs.keys()
        assert sum(theirs["tokens"]) > 0
        same = theirs.keys() - {"loss"}
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        for loss, expected in zip(ours["loss"], theirs["loss"], strict=True):
            assert loss == (None if expected is None else pytest.approx(expected, rel=budget))
