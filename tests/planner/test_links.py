"""Links that made the times of records are found again, and what records cannot tell keeps its default."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcab_plugin import layout, masks, planner
from lcab_plugin.cli import main
from lcab_plugin.planner import HARDWARE, Hardware, Model, calibrate, predict, split, traffic
from lcab_plugin.planner.calibrate import Calibration
from lcab_plugin.planner.hardware import Link
from lcab_plugin.planner.measured import MEASURED
from lcab_plugin.training import schema

H100 = HARDWARE["H100"]
TRUE = replace(H100, inside=Link(310e9, 14e-6), between=Link(23e9, 45e-6))
LENGTHS = tuple(1 << n for n in range(13, 20))
GPUS = 8
Record = dict[str, Any]


def cell(strategy: str, world: int, nodes: int, seqlen: int, step: str, hardware: Hardware) -> Record:
    """As `lcab bench cp` would write it where calls take what the planner predicts."""
    mask, model = masks.causal(seqlen), Model(1, 0, 0, 0, 64, 8, 128)
    degrees = {"ulysses" if strategy == "ulysses" else "ring": world}
    block = split.block(
        layout.make("zigzag", world, seqlen, mask), mask, degrees.get("ulysses", 1), "head_first"
    )
    axes = traffic.spans(degrees, "head_first", world // nodes)
    plan = predict.Plan(strategy, tuple(axes.items()), "triton", MEASURED["H200"]["triton"], block)
    setting = planner.setting(mask, model, planner.Cluster(nodes, world // nodes), hardware)
    call = predict.call(plan, setting, step)
    where = {"hardware": "NVIDIA H100 80GB HBM3", "torch": "2.11", "backend": "nccl"}
    shape = {"batch": 1, "heads": 64, "kv_heads": 8, "head_dim": 128, "dtype": "bf16"}
    record = {"type": "cell", "strategy": strategy, "degrees": degrees, "layout": "zigzag", "world": world}
    record |= {"nodes": nodes, "mask": "causal", "parameters": {}, "digest": mask.digest, "seqlen": seqlen}
    record |= {"kernel": "triton", "pass": step, "status": "ok", **shape, **where}
    times = {"median_ms": (call.compute + call.exposed) * 1e3, "exposed_ms": call.exposed * 1e3}
    record |= {**times, "sent_bytes": int(call.sent.total)}
    schema.check(record)
    return record


def cells(
    *nodes: int,
    hardware: Hardware = TRUE,
    strategies: tuple[str, ...] = ("ulysses", "ring_all_gather", "ring_p2p"),
) -> list[Record]:
    worlds = [(n, world) for n in nodes for world in ((2, 4, GPUS) if n == 1 else (n * GPUS,))]
    return [
        cell(strategy, world, n, seqlen, step, hardware)
        for n, world in worlds
        for strategy in strategies
        for seqlen in LENGTHS
        for step in ("fwd", "bwd")
    ]


def fitted(records: list[Record]) -> Calibration:
    return calibrate.fit(records, H100, "bf16")


def near(link: Link | None, true: Link, rel: float) -> bool:
    assert link is not None
    assert link.bandwidth == pytest.approx(true.bandwidth, rel=rel)
    assert link.latency == pytest.approx(true.latency, rel=4 * rel)  # a message takes little of most times
    return True


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_links_inside_and_between_nodes_are_found(noise: float) -> None:
    records, rng = cells(1, 2, 4), np.random.default_rng(0)
    for record in records:
        record["exposed_ms"] *= rng.normal(1, noise)
    found = fitted(records)
    rel = 1e-6 if not noise else 0.04
    assert near(found.links["inside"].link, TRUE.inside, rel)
    assert near(found.links["between"].link, TRUE.between, rel)
    errors = {e.what: e for e in found.errors}
    assert set(errors) == {f"link {name} nodes (ulysses, ring_all_gather)" for name in ("inside", "between")}
    for name in ("inside", "between"):
        error = errors[f"link {name} nodes (ulysses, ring_all_gather)"]
        assert error.fitted == found.links[name].records >= 8
        assert error.held >= 4
        assert error.largest < 1e-6 + 4 * noise
    hiding = [r for r in records if r["strategy"] == "ring_p2p"]
    assert found.left_out["a strategy that hides transfers behind its kernels"] == len(hiding)
    machine = found.applied(H100, ())
    assert (machine.inside, machine.between) == (found.links["inside"].link, found.links["between"].link)
    assert f"between nodes fitted to {found.links['between'].records} records" in machine.source


@pytest.mark.parametrize("between", [Link(4e9, 100e-6), Link(90e9, 8e-6)])
def test_a_link_far_from_its_default_is_found(between: Link) -> None:
    found = fitted(cells(1, 2, hardware=replace(TRUE, between=between)))
    assert near(found.links["between"].link, between, 1e-6)


def test_one_node_says_nothing_of_what_is_between() -> None:
    found = fitted(cells(1))
    assert near(found.links["inside"].link, TRUE.inside, 1e-6)
    assert found.links["between"].link is None
    machine = found.applied(H100, ())
    assert machine.between == H100.between
    inside, between = found.told(machine, ())
    assert inside.startswith("Link inside nodes: 310 GB/s and 14 us a message, fitted to ")
    assert between == (
        "Link between nodes: 40 GB/s and 20 us a message, not fitted (no records of several nodes), the "
        "default of H100 is kept."
    )


def test_several_nodes_alone_leave_the_inside_as_it_is() -> None:
    found = fitted(cells(2, hardware=replace(TRUE, inside=H100.inside)))
    assert found.links["inside"].reason == "no records of one node"
    assert near(found.links["between"].link, TRUE.between, 1e-6)


def test_gathers_that_wait_for_the_links_inside_tell_nothing_of_those_between() -> None:
    found = fitted(cells(1, 2, strategies=("ring_all_gather",)))
    assert near(found.links["inside"].link, TRUE.inside, 1e-6)
    quick = replace(TRUE, between=Link(60e9, 45e-6))
    found = fitted(cells(1, 2, strategies=("ring_all_gather",), hardware=quick))
    assert found.links["between"].link is None
    assert "records that wait for it of the 4 needed" in found.links["between"].reason


def test_records_that_do_not_say_how_their_ranks_lie_are_left_aside() -> None:
    old = [{name: x for name, x in r.items() if name != "nodes"} for r in cells(1)]
    odd = [{**r, "nodes": n} for r in cells(2) for n in (None, 3)]
    found = fitted(old + odd)
    assert [f.link for f in found.links.values()] == [None, None]
    told = [r for r in old + odd if r["strategy"] != "ring_p2p"]
    reason = "how their ranks lie on nodes is not recorded (`nodes`)"
    assert found.left_out[reason] == len(told)
    peers = [{name: x for name, x in r.items() if not name.startswith(("exposed", "sent"))} for r in old[:4]]
    assert fitted(peers).left_out == {"no time of the transfers alone (`lcab bench peers`)": 4}
    noisy = [{**r, "relative_ci": 0.3} for r in cells(1) if r["strategy"] == "ulysses"]
    assert sum(fitted(noisy).left_out.values()) == len(noisy)
    silent = [{**r, "sent_bytes": None} for r in old[:3]] + [{**r, "exposed_ms": -1.0} for r in cells(1)[:2]]
    assert fitted(silent).left_out == {
        "nothing is sent": 3,
        "transfers too short a part of the call to be told from noise": 2,
    }


def test_what_is_given_stays_and_the_output_says_which_is_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"type": "run", "schema": 1, "lcab_plugin": "1", "torch": "2.11", "device": "H100", "command": []}
    path = tmp_path / "cp.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [run, *cells(1, 2)]))
    asked = ["lcab", "plan", "--mask", "causal", "--seqlen", "8192", "--nodes", "2", "--kernels", "triton"]

    def said(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", [*asked, "--calibrate", str(path), *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    out = said("--between", "33")
    assert "Link inside nodes: 310 GB/s and 14 us a message, fitted to " in out
    assert "Link between nodes: 33 GB/s and 20 us a message, as given." in out
    document = json.loads(said("--json"))
    assert document["hardware"]["between"]["bandwidth"] == pytest.approx(23e9)
    links = document["calibration"]["links"]
    assert links["between"]["link"] == document["hardware"]["between"]
    assert links["inside"]["records"] > links["between"]["records"] > 0
