"""What `lcab bench kernels` measures when asked for nothing, and the masks' parameters at any length."""

from __future__ import annotations

import pytest

from lcab_plugin import masks
from lcab_plugin.bench import settings
from lcab_plugin.bench.settings import Settings, Shape


@pytest.mark.parametrize("name", masks.names())
@pytest.mark.parametrize("seqlen", [1, 2, 7, 1000, 12_345, 65_536])
def test_every_mask_has_parameters_at_every_length(name: str, seqlen: int) -> None:
    parameters = settings.default_parameters(name, seqlen)
    mask = masks.from_name(name, seqlen, **parameters)
    assert mask.q_len == seqlen
    assert settings.default_parameters(name, seqlen) == parameters
    if seqlen >= 1000 and "window" in name:
        assert mask.area < masks.full(seqlen).area  # the window did not outgrow the sequence
    if masks.needs_lengths(name) and seqlen >= 1000:
        assert settings.default_parameters(name, seqlen, seed=5) != parameters


def test_the_defaults_on_a_gpu_are_the_papers() -> None:
    asked = Settings(**settings.defaults("cuda"))
    assert asked.seqlens == (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    assert asked.shape == Shape(1, 64, 8, 128, "bf16")
    assert set(asked.masks) == set(masks.names())
    here = Settings(**settings.defaults("cpu"))
    assert max(here.seqlens) == 4096
    assert "naive" not in here.kernels
    assert "sdpa_flash" in here.kernels
