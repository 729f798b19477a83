"""`lcab bench peers`: what a record holds, wrong or missing peers as rows, and the ratios that are judged."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcab_plugin import masks
from lcab_plugin.attention import attention
from lcab_plugin.bench import cells, cp, peers, peers_measure
from lcab_plugin.bench.accuracy import Case
from lcab_plugin.bench.cp import SINGLE
from lcab_plugin.bench.peers import FIELDS, IDENTITY, Settings
from lcab_plugin.bench.peers_table import PEERS, Peer, Problem, load
from lcab_plugin.bench.settings import Shape
from lcab_plugin.cli import bench_peers, main
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError, UnsupportedError
from lcab_plugin.training.records import RunLog

ROOT = Path(__file__).resolve().parents[2]
TINY = Settings(
    masks=("causal",),
    seqlens=(64,),
    strategies=("ring_p2p",),
    passes=("fwd+bwd",),
    shape=Shape(heads=4, kv_heads=2, head_dim=8, dtype="fp32"),
    cell_seconds=1e-3,
    timeout=60.0,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peers": ("deepspeed.DistributedAtention",)}, "did you mean 'deepspeed.DistributedAttention'"),
        ({"window": -1}, "window=-1 must be at least 0"),
        ({"seqlens": (66,)}, "66 is no multiple of 4, twice the ranks, as the peers need; take 68"),
        ({"layouts": ("zag",)}, "did you mean 'zigzag'"),
        ({"strategies": ("rign_p2p",)}, "did you mean 'ring_p2p'"),
    ],
)
def test_what_is_asked_for_is_checked_before_any_work(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LcabError, match=words):
        replace(TINY, **changes)


def test_settings_reach_the_ranks_whole() -> None:
    asked = replace(TINY, window=7, peers=("deepspeed.DistributedAttention",), done=(("a", None, 1),))
    found = Settings.from_json(asked.to_json())
    assert replace(found, done=()) == replace(asked, done=())
    assert [tuple(cell) for cell in found.done] == list(asked.done)


def test_ours_have_the_layout_that_suits_the_mask() -> None:
    asked = replace(TINY, strategies=("ulysses", "ring_p2p"), peers=("ringmaster.zigzag_ring",))
    for mask, layout in (("causal", "zigzag"), ("causal_document", "balanced"), ("full", "contiguous")):
        assert asked.rows(mask) == [
            (SINGLE, None),
            ("ulysses", "contiguous"),
            ("ring_p2p", layout),
            ("ringmaster.zigzag_ring", "zigzag"),
        ]
    assert replace(asked, layouts=("striped",)).rows("causal")[1:3] == [
        ("ulysses", "striped"),
        ("ring_p2p", "striped"),
    ]
    assert asked.parameters("sliding_window_causal", 4096) == {"left": 512}


def record(strategy: str, ratio: float | None, **changes: Any) -> dict[str, Any]:
    made = {"strategy": strategy, "status": "ok", "pass": "fwd+bwd", "mask": "causal", "seqlen": 4096}
    made |= {"backend": "gloo", "fraction": 0.5001, "cpu_over_ideal": ratio, "over_ideal": 9.0, "repeats": 6}
    return {**made, **changes}


def test_ratios_are_judged_where_a_goal_is_set() -> None:
    assert peers.verdict(record("ulysses", 1.03), None) == ("<= 1.03", True)
    assert peers.verdict(record("ring_p2p", 1.09), None) == ("<= 1.08", False)
    assert peers.verdict(record("ring_p2p", 1.0, backend="nccl"), None) == ("<= 1.08", False)
    for unjudged in (
        record("usp", 1.0),
        record(SINGLE, 2.0),
        record("para_attn.ulysses", 1.0),
        record("ulysses", 1.0, seqlen=2048),
        record("ulysses", 1.0, repeats=5),
        record("ulysses", 1.0, **{"pass": "fwd"}),
        record("ulysses", None, status="error"),
        record("ulysses", None),
    ):
        assert peers.verdict(unjudged, None) is None
    window = {"mask": "sliding_window_causal", "seqlen": 16384, "fraction": 0.06}
    beside = [
        record("para_attn.ulysses", 6.0, **window),
        record("ringmaster.varlen_ring", 3.5, **window),
        record("yunchang.ring", None, **{**window, "status": "error"}),
        record("group_cast", 1.1, **window),
    ]
    fastest = peers.fastest_peer(beside)
    assert fastest is not None
    assert fastest["strategy"] == "ringmaster.varlen_ring"
    assert peers.verdict(beside[-1], fastest) == (">= 3x faster", True)
    assert peers.verdict(record("usp", 1.2, **window), fastest) == (">= 3x faster", False)
    assert peers.verdict(beside[-1], None) is None


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(80),
        masks.sliding_window_causal(80, 5),
        masks.causal_document([30, 1, 49]),
        masks.from_ranges([(0, 30), (50, 80)], [(0, 10), (20, 80)], [0, 1], 80, 80),
    ],
    ids=["causal", "window", "documents", "rows_without_keys"],
)
def test_exact_results_are_naive_attentions(
    mask: masks.AttentionMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_measure, "_CHUNK", 32)
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 80, h, 8, generator=g).double() for h in (6, 3, 3, 6))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(leaves[0], leaves[1], leaves[2], mask, kernel="naive", scale=0.3)
    right = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))
    case = Case(q.detach(), k.detach(), v.detach(), dout, mask, 0.3)
    shares = [peers_measure.Exact(case, rank, 2) for rank in range(2)]
    for share in shares:
        found = share.errors(out=out.detach(), **right)
        assert set(found) == {"out", "dq", "dk", "dv"}
        assert max(found.values()) < 1e-12
    swapped = out.detach().clone()
    swapped[:, :, [2, 3]] = swapped[:, :, [3, 2]]  # heads of the second key/value head
    assert shares[1].errors(out=swapped)["out"] > 0.1
    assert shares[0].errors(out=swapped)["out"] < 1e-12
    assert shares[0].errors(out=swapped * float("nan"))["out"] == float("inf")
    assert peers_measure.Exact(case, 3, 4).errors(out=swapped) == {}  # more ranks than heads


def test_a_package_that_is_missing_is_said() -> None:
    with pytest.raises(
        UnsupportedError, match=r"no_such_package.*install what scripts/requirements-peers.txt"
    ):
        load("no_such_package", "no-such-package")
    assert Peer("a", "no-such-package", "zigzag", right).version() is None


Bind = Callable[[Problem], Callable[[Tensor, Tensor, Tensor], Tensor]]


def alone(binds: Mapping[str, Bind], monkeypatch: pytest.MonkeyPatch, out: Path, **changes: Any) -> list[Any]:
    """Records of one rank without a process group, of these peers."""
    for name, bind in binds.items():
        monkeypatch.setitem(PEERS, name, Peer(name, "torch", "contiguous", bind))
    monkeypatch.setattr(collectives, "new_groups", lambda members: None)
    asked = replace(TINY, world=1, peers=tuple(binds), **changes)
    with RunLog(out, append=True) as log:
        return peers_measure.run(asked, torch.device("cpu"), log)


def right(problem: Problem) -> Any:
    case = problem.case
    return lambda q, k, v: attention(q, k, v, case.mask, kernel="naive", scale=case.scale)


def wrong_gradient(problem: Problem) -> Any:
    attend = right(problem)
    return lambda q, k, v: attend(q, k, 1.5 * v - 0.5 * v.detach())  # the right output


def failing(problem: Problem) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("needs another machine\nand more")

    return attend


def refusing(problem: Problem) -> Any:
    raise UnsupportedError(f"not under {problem.family}")


def test_what_cannot_run_or_is_wrong_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binds = {"right": right, "wrong": wrong_gradient, "failing": failing, "refusing": refusing}
    found = {r["strategy"]: r for r in alone(binds, monkeypatch, tmp_path / "p.jsonl")}
    assert {name: r["status"] for name, r in found.items()} == {
        SINGLE: "ok",
        "ring_p2p": "ok",
        "right": "ok",
        "wrong": "error",
        "failing": "error",
        "refusing": "unsupported",
    }
    assert found["wrong"]["reason"].startswith("wrong result: dv is off by 5.0e-01")
    assert found["failing"]["reason"] == "RuntimeError: needs another machine"
    assert found["refusing"]["reason"] == "not under causal"
    assert all(found[name]["cpu_ms"] is None for name in ("wrong", "failing", "refusing"))
    for name in ("ring_p2p", "right"):
        assert found[name]["cpu_ms"] > 0
        assert found[name]["cpu_over_ideal"] == found[name]["cpu_ms"] / found[name]["ideal_cpu_ms"]
        assert found[name]["over_ideal"] == found[name]["median_ms"] / found[name]["ideal_ms"]
        assert max(found[name][f"error_{x}"] for x in ("out", "dq", "dk", "dv")) < 1e-5
    assert found[SINGLE]["over_ideal"] == 1.0


def test_resume_measures_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.jsonl"
    first = alone({"right": right, "failing": failing}, monkeypatch, out)
    done = tuple(cells.key(r, IDENTITY) for r in first if r["status"] == "ok")
    again = alone({"right": right, "failing": right}, monkeypatch, out, done=done)
    assert [(r["strategy"], r["status"]) for r in again] == [(SINGLE, "ok"), ("failing", "ok")]
    done += tuple(cells.key(r, IDENTITY) for r in again)
    assert alone({"right": right, "failing": right}, monkeypatch, out, done=done) == []


def on_two_ranks(out: Path, *words: str) -> dict[tuple[str, str], dict[str, Any]]:
    """`lcab bench peers` over gloo; records by name and mask."""
    command = ["-m", "lcab_plugin.cli", "bench", "peers", "--json", "--world", "2", "--device", "cpu"]
    asked = ["--heads", "4:4", "--head-dim", "8", "--seqlens", "64", "--cell-seconds", "0.001"]
    done = subprocess.run(
        [sys.executable, *command, *asked, "--out", str(out), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = {(r["strategy"], r["mask"]): r for r in json.loads(done.stdout)}
    assert cp.cells_of(out) == list(found.values())
    return found


def check(one: dict[str, Any]) -> None:
    """What holds of every record."""
    who = one["strategy"]
    assert set(FIELDS) <= set(one)
    if who in PEERS and PEERS[who].version() is None:
        assert (one["package"], one["status"]) == (None, "unsupported")
    if one["status"] != "ok":
        assert one["median_ms"] is None
        assert one["reason"]
        return
    assert max(one[f"error_{x}"] for x in ("out", "dq", "dk", "dv")) < 1e-5, one
    assert one["cpu_over_ideal"] == one["cpu_ms"] / one["ideal_cpu_ms"]
    assert one["cpu_over_ideal_p10"] <= one["cpu_over_ideal"] <= one["cpu_over_ideal_p90"]


def test_two_processes_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "peers.jsonl"
    chosen = ("deepspeed.DistributedAttention", "ring_flash_attn.zigzag_ring", "torch.context_parallel")
    words = ("--masks", "sliding_window_causal", "--window", "9", "--strategies", "ulysses,ring_p2p")
    found = on_two_ranks(out, *words, "--peers", ",".join(chosen))
    who = (SINGLE, "ulysses", "ring_p2p", *chosen)
    assert list(found) == [(name, "sliding_window_causal") for name in who[4:] + who[:4]]  # as they end
    for one in found.values():
        check(one)
        assert one["digest"] == masks.sliding_window_causal(64, 9).digest
    assert [one["status"] for one in found.values()] == ["unsupported"] * 2 + ["ok"] * 4
    with out.with_suffix(".csv").open() as file:
        assert [row["strategy"] for row in csv.DictReader(file)] == [name for name, _ in found]


@pytest.mark.nightly
def test_every_peer_that_is_installed_is_right_or_says_why(tmp_path: Path) -> None:
    families = "causal", "full", "causal_document", "sliding_window_causal"
    found = on_two_ranks(tmp_path / "peers.jsonl", "--masks", ",".join(families), "--strategies", "usp")
    assert set(found) == {(who, mask) for who in (SINGLE, "usp", *PEERS) for mask in families}
    for (who, _), one in found.items():
        check(one)
        if who in (SINGLE, "usp", "deepspeed.UlyssesSPAttentionHF", "deepspeed.DistributedAttention"):
            assert one["status"] == "ok", one["reason"]


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """`lcab bench peers` in this process: its exit status."""
    monkeypatch.setattr(sys, "argv", ["lcab", "bench", "peers", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_table_and_what_a_resumed_run_adds_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.jsonl"
    alone({"right": right, "failing": failing}, monkeypatch, out)
    seen: list[Settings] = []

    def measured(settings: Settings, path: Path, before: int) -> tuple[list[dict[str, Any]], bool]:
        seen.append(settings)
        assert before == 3
        return [], False

    monkeypatch.setattr(bench_peers, "measured", measured)
    words = ["--world", "1", "--device", "cpu", "--heads", "4:2", "--head-dim", "8", "--seqlens", "64"]
    words += ["--strategies", "ring_p2p", "--peers", "right,failing", "--out", str(out), "--resume"]
    assert command(monkeypatch, *words) == 0
    shown = capsys.readouterr().out
    assert [cell[0] for cell in seen[0].done] == [SINGLE, "ring_p2p", "right"]
    for text in ("causal, 64 tokens, fwd+bwd", "fastest peer / this", "goals are of CPU / ideal", str(out)):
        assert text in shown
    assert "  failing error: RuntimeError: needs another machine\n" in shown
    assert f"torch {torch.__version__}" in shown


def test_the_peers_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == list(PEERS)
    assert listed[-1] == {
        "name": "torch.context_parallel",
        "layout": "zigzag",
        "installed": f"torch {metadata.version('torch')}",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--peers", "deepspeed.Distributed"), "did you mean 'deepspeed.DistributedAttention'?"),
        (("--out", "x.csv"), "give a name ending in .jsonl"),
        (("--seqlens", "4K"), "error: --seqlens takes integers"),
        (("--seqlens", "4097"), "take 4100."),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "--device", "cpu", *words) == 2
    shown = capsys.readouterr()
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert message in shown.err
    assert list(tmp_path.iterdir()) == []
