"""The sampled float64 reference is what `naive` computes in float64, and a single wrong row is seen."""

from __future__ import annotations

import pytest
import torch
from cases import families, inputs, reference

from lcab_plugin.bench import accuracy
from lcab_plugin.bench.accuracy import Case


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    mask = families()[name]
    return Case(*inputs(mask.q_len, mask.k_len, 4, 2, 16, dtype), mask, 0.25)


@pytest.mark.parametrize("name", families())
def test_the_sampled_reference_is_the_specification(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "_CHUNK", 40)  # of 96 rows
    given = case(name)
    sample = accuracy.sample(given)
    want = reference(given.q, given.k, given.v, given.dout, given.mask, scale=0.25)
    del want["lse"]
    assert len(sample.rows) == len(sample.columns) == 16
    found = sample.errors(**want)
    assert set(found) == {"out", "dq", "dk", "dv"}
    assert max(found.values()) < 1e-12
    for broken, x in want.items():
        at = (0, int(sample.rows[3]), int(sample.heads[1]))
        if broken in ("dk", "dv"):
            at = (0, int(sample.columns[3]), sample.kv_head)
        x = x.clone()
        x[at] += x.abs().max()
        assert sample.errors(**{broken: x})[broken] > 0.5
        x[at] = float("nan")
        assert sample.errors(**{broken: x})[broken] == float("inf")


def test_beyond_a_length_keys_are_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "EXACT_KEYS", 95)
    given = case("causal")
    sample = accuracy.sample(given)
    want = reference(given.q, given.k, given.v, given.dout, given.mask, scale=0.25)
    assert set(sample.errors(**want)) == {"out", "dq"}
    assert "not above 95 keys" in sample.what
