"""Kernels by name: the table, what third parties add, and the reason where one cannot run."""

from __future__ import annotations

import pytest
import torch

import lcab_plugin as lcab
from lcab_plugin import kernels, masks

MODULE = """
import lcab_plugin.kernels.naive as naive

class Theirs(naive.Naive):
    name = "theirs"

    def unsupported(self, q, k, v, mask, options, needs_backward):
        return "it has no backward" if needs_backward else None

    def unavailable(self):
        return REASON

REASON = None
KERNEL = Theirs()
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A real installed distribution with a kernel of its own."""
    (tmp_path / "their_kernels.py").write_text(MODULE)
    info = tmp_path / "their_kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-kernels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lcab_plugin.kernels]\ntheirs = their_kernels:KERNEL\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (kernels._third_party, kernels.get):
        cached.cache_clear()
    yield kernels.get("theirs")
    for cached in (kernels._third_party, kernels.get):
        cached.cache_clear()


def test_a_third_party_adds_a_kernel(theirs):
    assert kernels.names()[-1] == "theirs"
    assert kernels.availability()["theirs"] is None
    x = torch.randn(1, 8, 2, 4)
    mask = masks.causal(8)
    torch.testing.assert_close(lcab.attention(x, x, x, mask, kernel="theirs"), lcab.attention(x, x, x, mask))


def test_the_reason_reaches_the_user(theirs, monkeypatch):
    x, mask = torch.randn(1, 8, 2, 4), masks.causal(8)
    with pytest.raises(
        lcab.UnsupportedError, match="kernel 'theirs' cannot run this attention: it has no back"
    ):
        lcab.attention(x.requires_grad_(), x, x, mask, kernel="theirs")
    with torch.no_grad():
        lcab.attention(x, x, x, mask, kernel="theirs")
    monkeypatch.setattr(type(theirs), "unavailable", lambda self: "libtheirs is not installed")
    assert kernels.availability()["theirs"] == "libtheirs is not installed"
    with pytest.raises(lcab.UnsupportedError, match="libtheirs is not installed"):
        lcab.attention(x.detach(), x.detach(), x.detach(), mask, kernel="theirs")


def test_every_kernel_says_what_it_is():
    for name in kernels.names():
        assert kernels.get(name).name == name
        assert kernels.get(name).version().startswith("torch ")
    assert kernels.availability() == dict.fromkeys(kernels.names())
