"""`lcab bench cp`: what a record holds, that bytes sent are the closed forms', and that no run hangs."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcab_plugin import kernels, layout, masks
from lcab_plugin.bench import cp, cp_launch, cp_measure, cp_ranks, cp_volume
from lcab_plugin.bench.cp import SINGLE, Settings
from lcab_plugin.bench.launch import launch
from lcab_plugin.bench.settings import Shape
from lcab_plugin.errors import LcabError
from lcab_plugin.training.records import RunLog

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--cell-seconds", "0.001", "--head-dim", "8", "--timeout", "60"]
TINY = Settings(
    masks=("causal",),
    seqlens=(64,),
    layouts=("zigzag",),
    shape=Shape(heads=4, kv_heads=2, head_dim=8, dtype="fp32"),
    cell_seconds=1e-3,
    timeout=60.0,
)


def by_cell(records: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    names = "strategy", "layout", "mask", "seqlen", "pass"
    found = {tuple(record[name] for name in names): record for record in records}
    assert len(found) == len(records)
    return found


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategies": ("rign_p2p",)}, "did you mean 'ring_p2p'"),
        ({"strategies": ("none",)}, "--baseline single"),
        ({"layouts": ("zag",)}, "did you mean 'zigzag'"),
        ({"masks": ("casual",)}, "did you mean 'causal'"),
        ({"passes": ("both",)}, "unknown pass 'both'"),
        ({"kernel": "sdpa_flush"}, "did you mean 'sdpa_flash'"),
        ({"kernel": "torch_sdpa"}, "no kernel of `lcab kernels`"),
        ({"placement": "ring_first"}, "unknown placement 'ring_first'"),
        ({"baseline": "fast"}, "unknown baseline 'fast'"),
        ({"seqlens": ()}, "no sequence lengths"),
        ({"seqlens": (0,)}, "sequence length=0"),
        ({"world": 0}, "world=0"),
        ({"ulysses": 0}, "ulysses=0"),
        ({"inner_ring": 0}, "inner_ring=0"),
        ({"timeout": 0.0}, "timeout 0.0 must be above 0"),
    ],
)
def test_what_is_asked_for_is_checked_before_any_work(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LcabError, match=words):
        replace(TINY, **changes)


def test_settings_reach_the_ranks_whole() -> None:
    asked = replace(TINY, strategies=("p2p", "a2a+p2p", "ring_p2p"), ulysses=2)
    assert asked.strategies == ("ring_p2p", "usp")
    assert Settings.from_json(asked.to_json()) == asked


def test_every_strategy_takes_part_by_default() -> None:
    assert {strategy for strategy, _ in TINY.rows("causal")} == {SINGLE, *cp.AXES} - {"none"}
    assert TINY.rows("causal")[0] == (SINGLE, None)
    assert all(strategy != SINGLE for strategy, _ in replace(TINY, baseline="none").rows("causal"))


def test_strategies_have_the_layout_that_suits_the_mask() -> None:
    asked = replace(TINY, strategies=("ulysses", "ring_p2p"), layouts=(), baseline="none")
    for mask, suited in (("causal", "zigzag"), ("causal_document", "balanced"), ("full", "contiguous")):
        assert asked.rows(mask) == [("ulysses", "contiguous"), ("ring_p2p", suited)]


def test_degrees_split_the_world_evenly() -> None:
    assert cp.degrees("ring_p2p", 8, None) == {}
    for world, ulysses, ring in ((2, 2, 1), (4, 2, 2), (6, 3, 2), (8, 4, 2)):
        assert cp.degrees("usp", world, None) == {"ulysses": ulysses, "ring": ring}
    assert cp.degrees("usp", 8, 2) == {"ulysses": 2, "ring": 4}
    assert cp.degrees("loongtrain", 4, None) == {"ulysses": 2, "inner_ring": 2, "ring": 2}
    assert cp.degrees("loongtrain", 8, None) == {"ulysses": 2, "inner_ring": 2, "ring": 4}
    assert cp.degrees("loongtrain", 8, 1) == {"ulysses": 1, "inner_ring": 4, "ring": 8}
    assert cp.degrees("loongtrain", 8, 1, 2) == {"ulysses": 1, "inner_ring": 2, "ring": 8}
    assert cp.degrees("loongtrain", 8, inner_ring=4) == {"ulysses": 2, "inner_ring": 4, "ring": 4}
    assert cp.degrees("usp", 8, 2, 4) == {"ulysses": 2, "ring": 4}
    with pytest.raises(LcabError, match="inner_ring=3 does not divide 8 ranks"):
        cp.degrees("loongtrain", 8, inner_ring=3)
    with pytest.raises(LcabError, match="ulysses=3 does not divide 8 ranks"):
        cp.degrees("usp", 8, 3)


def sent(strategy: str, degrees: dict[str, int], backward: bool, mask: str = "causal") -> int:
    ranks, tokens = 4, 1024
    shared = layout.make("contiguous", ranks, tokens)
    made = masks.causal(tokens) if mask == "causal" else masks.causal_document([tokens // ranks] * ranks)
    call = cp_volume.Call(batch=2, heads=16, kv_heads=4, dim=64, value_dim=32, itemsize=2, sum_itemsize=4)
    return cp_volume.sent_bytes(strategy, degrees, shared, made, call, 1, backward)


def test_equal_shards_send_what_the_page_says() -> None:
    b, s, h, hk, d, dv, i, n = 2, 1024, 16, 4, 64, 32, 2, 4
    kv = b * (s // n) * hk * (d + dv)  # elements of a rank's keys and values
    q_out = b * (s // n) * h * (d + dv)
    for backward in (False, True):
        assert sent("ulysses", {"ulysses": n}, backward) == (q_out + kv) * i * (n - 1) // n
    assert sent("ring_p2p", {"ring": n}, False) == (n - 1) * kv * i
    assert sent("ring_p2p", {"ring": n}, True) == (n - 1) * kv * (i + 4)
    assert sent("ring_all_gather", {"ring": n}, False) == (n - 1) * kv * i
    assert sent("ring_all_gather", {"ring": n}, True) == (n - 1) * kv * (i + 4)
    u, r = 2, 2  # blocks of u shards, of hk / u heads
    exchanged = (q_out + kv) * i * (u - 1) // u
    assert sent("usp", {"ulysses": u, "ring": r}, False) == exchanged + (r - 1) * kv * i
    assert sent("usp", {"ulysses": u, "ring": r}, True) == exchanged + (r - 1) * kv * (i + 4)
    rings = {"ulysses": 1, "inner_ring": 2, "outer_ring": 2}
    assert sent("loongtrain", rings, False) == (n - 1) * kv * i
    assert sent("loongtrain", rings, True) == (n - 1) * kv * (i + 4)


def test_a_group_cast_sends_what_others_see() -> None:
    row = 2 * 4 * (64 + 32)
    assert sent("group_cast", {"ring": 4}, False) == 2 * 256 * row * 2  # to the two ranks after this one
    assert sent("group_cast", {"ring": 4}, True) == 2 * 256 * row * 2 + 256 * row * 4
    assert sent("group_cast", {"ring": 4}, False, "documents") == 0


@pytest.mark.parametrize(
    ("hosts", "count"),
    [("aaaa", 1), ("aabb", 2), ("bbaacc", 3), ("abcd", 4), ("aaab", None), ("abab", None), ("aabba", None)],
)
def test_nodes_are_counted_where_ranks_are_dealt_in_turn(hosts: str, count: int | None) -> None:
    assert cp_ranks.nodes(list(hosts)) == count


def test_machines_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(path: Path) -> str:
        raise FileNotFoundError(path)

    here = cp_ranks.host()
    assert here == cp_ranks.host()
    monkeypatch.setattr(Path, "read_text", lambda path: "another-boot\n")
    assert cp_ranks.host() == f"{platform.node()} another-boot" != here
    monkeypatch.setattr(Path, "read_text", elsewhere)
    assert cp_ranks.host() == platform.node()


def test_two_processes_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "cp.jsonl"
    command = ["-m", "lcab_plugin.cli", "bench", "cp", "--json", "--world", "2", "--device", "cpu"]
    asked = ["--heads", "1:1", "--seqlens", "96", "--masks", "causal_document"]
    asked += ["--layouts", "zigzag,balanced", "--out", str(out), *QUICK]
    done = subprocess.run(
        [sys.executable, *command, *asked],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = by_cell(json.loads(done.stdout))
    rows = [(SINGLE, None), *((s, lay) for s in cp.STRATEGIES for lay in ("zigzag", "balanced"))]
    assert set(found) == {
        (*row, "causal_document", 96, step) for row in rows for step in ("fwd", "bwd", "fwd+bwd")
    }
    mask = masks.causal_document(masks.sample_lengths(96, "pile", 0))
    for (strategy, _, _, _, step), record in found.items():
        assert set(cp.FIELDS) <= set(record)
        assert (record["digest"], record["area"]) == (mask.digest, mask.area)
        assert (record["world"], record["nodes"]) == (2, 1)
        if strategy == "ulysses":  # one head cannot be shared
            assert record["status"] == "unsupported"
            assert "2 Ulysses" in record["reason"]
            assert record["median_ms"] is None
        if record["status"] != "ok":
            continue
        assert record["min_ms"] <= record["p10_ms"] <= record["median_ms"] <= record["p90_ms"]
        assert record["tflops_per_rank"] > 0
        assert record["error_out"] < 1e-5
        assert (record["error_dk"] is None) == (step == "fwd")
        assert record["peak_memory_gib"] is record["kernels_memory_gib"] is None
        assert record["peak_rss_gib"] is None or 0.05 < record["peak_rss_gib"] < 8
        assert "CPU" in record["peak_memory_note"]
        if strategy == SINGLE:
            assert record["efficiency"] is None
            continue
        assert record["sent_bytes"] == record["closed_form_bytes"]
        assert record["efficiency"] == record["single_ms"] / (2 * record["median_ms"])
        assert record["exposed_ms"] == record["median_ms"] - record["kernels_ms"]
        shared = layout.make(record["layout"], 2, 96, mask)
        assert record["imbalance"] == layout.imbalance(shared, mask)
    assert {s for (s, *_), r in found.items() if r["status"] == "ok"} >= {
        SINGLE,
        "ring_p2p",
        "ring_all_gather",
    }
    assert cp.cells_of(out) == list(found.values())
    with out.with_suffix(".csv").open() as file:
        assert [row["strategy"] for row in csv.DictReader(file)] == [key[0] for key in found]


@pytest.mark.parametrize(
    "changes",
    [
        {
            "masks": ("causal_document", "sliding_window_causal"),
            "shape": replace(TINY.shape, heads=10, kv_heads=5),
        },
        pytest.param({"strategies": ("usp", "loongtrain"), "ulysses": 1}, marks=pytest.mark.nightly),
        pytest.param(
            {"strategies": ("usp", "loongtrain"), "placement": "context_first"}, marks=pytest.mark.nightly
        ),
        pytest.param({"strategies": ("ulysses",)}, marks=pytest.mark.nightly),
    ],
    ids=["every_strategy", "rings_alone", "context_first", "few_heads"],
)
def test_four_processes_send_the_closed_forms_bytes(
    changes: dict[str, Any], tmp_path: Path, one_thread: None
) -> None:
    """Uneven shards, heads that are not dealt evenly, masks that hide whole blocks."""
    asked = replace(
        TINY,
        world=4,
        seqlens=(101,),
        layouts=("zigzag", "contiguous"),
        passes=("fwd+bwd",),
        baseline="none",
        **changes,
    )
    begun: list[str] = []
    records = cp_launch.measure(asked, tmp_path / "cp.jsonl", begun.append)
    assert [(r["status"], r["reason"]) for r in records] == [("ok", None)] * asked.total
    assert {r["strategy"] for r in records} == set(asked.strategies)
    for record in records:
        assert record["sent_bytes"] == record["closed_form_bytes"], record
        assert record["efficiency"] is None
    assert begun[-1] == f"{asked.masks[-1]} 101, fwd+bwd, all strategies in turn"


def test_a_rank_that_torchrun_started_takes_part(tmp_path: Path, one_thread: None) -> None:
    script, out = tmp_path / "rank.py", tmp_path / "cp.jsonl"
    words = ["bench", "cp", "--strategies", "ring_p2p", "--masks", "causal", "--heads", "2:1"]
    words += ["--seqlens", "64", "--passes", "fwd", "--out", str(out), *QUICK]
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom lcab_plugin.cli import main\n"
        f"sys.argv = ['lcab', *{words!r}]\nmain()\n"
    )
    outcome = launch(script, [], world=2, device="cpu", logs=tmp_path / "logs", timeout=120)
    assert (outcome.status, outcome.reason) == ("done", None)
    assert [(r["strategy"], r["status"], r["world"], r["nodes"]) for r in cp.cells_of(out)] == [
        (SINGLE, "ok", 2, 1),
        ("ring_p2p", "ok", 2, 1),
    ]
    assert "ring_p2p" in (tmp_path / "logs" / "rank0.log").read_text()
    assert "ring_p2p" not in (tmp_path / "logs" / "rank1.log").read_text()


def test_what_fails_on_the_single_process_is_a_row_and_else_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(cp_measure, "attention", refuse)
    asked, out = replace(TINY, world=1, strategies=("ring_p2p",)), tmp_path / "cp.jsonl"
    with RunLog(out) as log, pytest.raises(cp_ranks.RankLostError, match="MemoryError: no room"):
        cp_measure.run(asked, torch.device("cpu"), log)
    assert [(r["strategy"], r["pass"], r["status"], r["reason"]) for r in cp.cells_of(out)] == [
        (SINGLE, step, "oom", "no room") for step in asked.passes
    ]


MORTAL = """
import os, signal
from lcab_plugin.kernels.naive import Naive

class Mortal(Naive):
    name = "mortal"

    def forward(self, *arguments):
        with open(os.environ["PIDS"], "a") as file:
            file.write(f"{os.getpid()}\\n")
        if os.environ.get("RANK") == "1":
            if os.environ["END"] == "raise":
                raise RuntimeError("the device is gone\\nand more")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(*arguments)

KERNEL = Mortal()
"""


@pytest.mark.parametrize(
    ("end", "words"),
    [("raise", "rank 1: RuntimeError: the device is gone"), ("kill", "rank 1, signal SIGKILL")],
)
def test_a_rank_that_dies_ends_the_run_with_one_message(
    end: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    info = tmp_path / "mortal-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mortal\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lcab_plugin.kernels]\nmortal = mortal:KERNEL\n")
    (tmp_path / "mortal.py").write_text(MORTAL)
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in {"PYTHONPATH": os.pathsep.join(path), "END": end, "PIDS": f"{tmp_path}/pids"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kernels, "names", lambda: ("sdpa_flash", "mortal"))
    asked = replace(TINY, kernel="mortal", strategies=("ring_p2p",), masks=("full", "causal"))
    out, begin = tmp_path / "cp.jsonl", time.monotonic()
    with pytest.raises(LcabError) as error:
        cp_launch.measure(asked, out)
    assert time.monotonic() - begin < 45  # less than the time a collective may take
    message = str(error.value)
    assert words in message
    assert "first calls of ring_p2p zigzag" in message
    assert "\n" not in message
    records = cp.cells_of(out)
    assert {r["status"] for r in records} == {"error"}
    assert {(r["mask"], r["strategy"]) for r in records} == {("full", SINGLE), ("full", "ring_p2p")}
    assert all(words in r["reason"] for r in records)
    assert out.with_suffix(".csv").exists()
    for pid in {int(line) for line in (tmp_path / "pids").read_text().split()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
