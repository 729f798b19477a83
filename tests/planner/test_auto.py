"""What "auto" stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcab_plugin import kernels, masks, planner
from lcab_plugin.context_parallel.topology import AXES
from lcab_plugin.errors import LcabError
from lcab_plugin.planner import HARDWARE, Chosen, Workload

EVERYTHING = {"kernel": "auto", "strategy": "auto", "layout": "auto"}
CALL = Workload(masks.causal(4096), 8, 8, 64, "fp32")


def choose(workload: Workload = CALL, cp: int = 4, **settings: Any) -> Chosen:
    return planner.choose({**EVERYTHING, **settings}, workload, cp, HARDWARE["cpu"])


def test_everything_is_chosen_said_and_recorded() -> None:
    chosen = choose()
    assert chosen.settings["kernel"] in kernels.names()
    assert chosen.settings["strategy"] in AXES
    assert chosen.record["auto"] == ["kernel", "strategy", "layout"]
    assert chosen.record["workload"]["mask_digest"] == CALL.mask.digest
    assert chosen.sentence.startswith("auto (kernel, strategy, layout): kernel sdpa_flash, strategy ")
    assert "for the sequence given (4096 tokens, 50.01% of all pairs visible) on cpu" in chosen.sentence
    assert chosen.sentence.endswith("speed of the kernel assumed")
    assert chosen == choose()


def test_what_was_named_stays() -> None:
    named = {"strategy": "usp", "layout": "striped", "ulysses": 2, "placement": "context_first"}
    chosen = choose(**named)
    assert chosen.settings == {**named, "kernel": "sdpa_flash"}
    assert chosen.record["degrees"] == {"ulysses": 2, "ring": 2}
    assert chosen.record["auto"] == ["kernel"]
    one = choose(cp=1, strategy="none", layout="zigzag")
    assert one.settings == {"kernel": "sdpa_flash", "strategy": "none", "layout": "zigzag"}
    assert choose(cp=1).settings["strategy"] == "none"
    trivial = {"strategy": "usp", "layout": "zigzag", "ulysses": 4, "ring": 1}
    assert choose(**trivial).settings == {**trivial, "kernel": "sdpa_flash"}


def test_degrees_beside_a_strategy_that_is_chosen_stay() -> None:
    for degrees in ({"ulysses": 2}, {"ulysses": 2, "ring": 4}, {"inner_ring": 2}):
        settings = choose(cp=8, **degrees).settings
        assert {name: settings[name] for name in degrees} == degrees
    assert choose(ulysses=2, placement="context_first").settings["placement"] == "context_first"


def test_groups_that_do_not_fill_nodes_are_planned_over_nodes() -> None:
    """Twelve ranks on nodes of 8: groups begin in the middle of a node, 4 neighbours are in one at least."""
    twelve = Workload(masks.causal(12 * 1024), 24, 24, 64, "bf16")

    def step(per_node: int) -> float:
        settings = {"kernel": "auto", "strategy": "ulysses", "layout": "zigzag"}
        return planner.choose(settings, twelve, 12, HARDWARE["H100"], per_node).record["terms_ms"]["exposed"]

    assert step(12) < step(8) == step(4)


def test_kernels_do_what_is_asked_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LcabError, match=r"no kernel of this machine .* on cpu and softcap"):
        choose(softcap=30.0)
    monkeypatch.setattr(kernels, "availability", lambda: dict.fromkeys(["sdpa_flash", "flex", "triton"]))
    bf16 = Workload(masks.causal(4096), 8, 8, 64, "bf16")
    settings = {"kernel": "auto", "strategy": "none", "layout": "zigzag"}

    def kernel(**more: Any) -> str:
        return planner.choose({**settings, **more}, bf16, 1, HARDWARE["H100"]).settings["kernel"]

    assert kernel() == "triton"
    assert kernel(softcap=30.0) in {n for n in kernels.names() if kernels.get(n).features.softcap}
    monkeypatch.setattr(kernels, "availability", lambda: dict.fromkeys(["sdpa_flash", "flex"]))
    assert kernel() == "sdpa_flash"  # measured; flex would win by what is assumed of it


def test_nothing_found_says_why() -> None:
    odd = Workload(masks.causal(512), 3, 3, 64, "fp32")
    with pytest.raises(LcabError, match=r"'auto' finds nothing that can run on 4 ranks: .* cannot be dealt"):
        choose(odd, strategy="ulysses", layout="zigzag")
    with pytest.raises(LcabError, match=r"no candidate has the degrees given"):
        choose(ulysses=3)
    with pytest.raises(LcabError, match="heads 8:3"):
        Workload(CALL.mask, 8, 3, 64, "fp32")
    with pytest.raises(LcabError, match="int8"):
        Workload(CALL.mask, 8, 8, 64, "int8")


def test_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planner.of("cpu") is HARDWARE["cpu"]
    named = {"name": "NVIDIA H200", "total_memory": 100}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**named))
    assert (planner.of("cuda").name, planner.of("cuda").memory) == ("H200", 100)
    named["name"] = "NVIDIA L4"
    other = planner.of("cuda")
    assert other.name == "NVIDIA L4, unknown here, taken for an H100"
    assert (other.peak, other.memory) == (HARDWARE["H100"].peak, 100)
