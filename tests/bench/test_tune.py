"""`lcab tune`: what is kept, and what it says where there is nothing to tune."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from lcab_plugin.bench import tune
from lcab_plugin.cli.app import app
from lcab_plugin.errors import LcabError
from lcab_plugin.kernels.triton import tuning
from lcab_plugin.kernels.triton.tuning import Config

DEFAULT, OTHER = Config(128, 128, 8, 3, True), Config(64, 64, 4, 3, True)


def finding(default_ms: float, other_ms: float) -> tune.Finding:
    return tune.Finding("key", "forward", "causal", 4096, {DEFAULT: default_ms, OTHER: other_ms}, {})


def test_a_default_stays_unless_it_is_clearly_beaten():
    assert finding(1.0, 0.99).best == DEFAULT
    assert finding(1.0, 1.5).best == DEFAULT
    assert finding(1.0, 0.9).best == OTHER


def test_only_what_beats_a_default_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "USER_FILE", tmp_path / "triton.json")
    tune.write([finding(1.0, 0.99)])
    assert tuning.read() == {}
    assert tuning.suffix() == ""
    tune.write([finding(1.0, 0.5)])
    assert tuning.read() == {"key": OTHER}
    assert tuning.suffix().startswith(", tuned ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(app, ["tune"])
    assert isinstance(result.exception, LcabError)
    assert "there is nothing to tune: kernel 'triton' needs a CUDA GPU" in str(result.exception)


def test_what_was_found_before_it_is_stopped_is_kept(tmp_path, monkeypatch):
    def stopped(*_):
        yield finding(1.0, 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "USER_FILE", tmp_path / "triton.json")
    monkeypatch.setattr(tune, "run", stopped)
    result = CliRunner().invoke(app, ["tune", "--seqlens", "512"])
    assert result.exit_code == 130
    assert tuning.read() == {"key": OTHER}
    assert f"Stopped after 1 of {2 * len(tuning.PASSES)} launches, which are kept." in result.stdout
    assert f"Findings: {tmp_path / 'triton.json'}" in result.stdout
    assert f"key: 2.00x by {OTHER}  (1 of {2 * len(tuning.PASSES)} launches, 0:00:00 left)" in result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "USER_FILE", tmp_path / "triton.json")
    shape = tune.Shape(heads=4, kv_heads=2, head_dim=64)
    found = list(tune.run(shape, [512], seconds=0.05))
    assert [(f.which, f.mask) for f in found] == [
        (which, mask) for mask in tune.REPRESENTATIVES for which in tuning.PASSES
    ]
    for one in found:
        assert one.best in one.median_ms
        assert not one.failed
        assert f"| {one.which} d64" in one.key
