"""`lcab bench kernels`: what a record holds, that no cell takes others with it, and that nothing is lost."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import families

from lcab_plugin import kernels, masks
from lcab_plugin.bench import cells, contenders, timing, trial
from lcab_plugin.bench import kernels as bench
from lcab_plugin.bench.accuracy import Case
from lcab_plugin.bench.settings import Settings, Shape
from lcab_plugin.cli import main
from lcab_plugin.errors import LcabError
from lcab_plugin.kernels.naive import Naive
from lcab_plugin.training.records import RunLog

Record = dict[str, Any]
SMALL = Shape(batch=1, heads=4, kv_heads=2, head_dim=16, dtype="fp32")
PASSES = ("fwd", "bwd", "fwd+bwd")


class OutOfMemory(Naive):
    name = "hungry"

    def forward(self, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB.\nGPU 0 has 80 GiB.")


class OutOfMemoryBackward(Naive):
    name = "hungry_backward"

    def backward(self, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")


class Crashing(Naive):
    name = "crashing"

    def forward(self, *arguments: Any) -> Any:
        raise RuntimeError("the first line\nthe second")


class Wrong(Naive):
    name = "wrong"

    def forward(self, *arguments: Any) -> Any:
        out, lse = super().forward(*arguments)
        return out * 1.1, lse


class ForwardOnly(Naive):
    name = "forward_only"

    def unsupported(self, q, k, v, mask, options, needs_backward):  # type: ignore[no-untyped-def]
        return "it has no backward" if needs_backward else None


class Elsewhere(Naive):
    name = "elsewhere"

    def unavailable(self) -> str | None:
        return "needs another machine"


FAKES = {k.name: k() for k in (OutOfMemory, OutOfMemoryBackward, Crashing, Wrong, ForwardOnly, Elsewhere)}


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels above are in the table; no time goes into the noise floor, which has its own test."""
    monkeypatch.setattr(timing, "noise_floor", lambda *_: timing.NoiseFloor(1e-6, 0.01))
    get = kernels.get
    names = (*kernels.names(), *FAKES)
    monkeypatch.setattr(kernels, "names", lambda: names)
    monkeypatch.setattr(kernels, "get", lambda name: FAKES.get(name) or get(name))


def ask(*names: str, **changes: Any) -> Settings:
    given = {"masks": ("causal",), "seqlens": (64,), "passes": PASSES, "shape": SMALL, "cell_seconds": 1e-3}
    return Settings(kernels=names, **{**given, **changes})


def measure(path: Path, asked: Settings, resume: bool = False) -> list[Record]:
    with RunLog(path, append=True) as log:
        return list(bench.run(asked, log, cells.read(path) if resume else ()))


def by_cell(records: list[Record]) -> dict[tuple[str, str], Record]:
    found = {(record["kernel"], record["pass"]): record for record in records}
    assert len(found) == len(records)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kernels.jsonl"


def test_a_record_says_what_was_measured_where_and_how_well(path: Path) -> None:
    asked = ask("sdpa_flash", masks=("causal_document",), seqlens=(96,), seed=3)
    found = by_cell(measure(path, asked))
    assert list(found) == [("sdpa_flash", step) for step in PASSES]
    mask = masks.causal_document(masks.sample_lengths(96, "pile", 3))
    for (_, step), record in found.items():
        assert set(record) == set(cells.FIELDS)
        assert record["status"] == "ok"
        assert record["version"].startswith("torch ")
        assert (record["digest"], record["area"]) == (mask.digest, mask.area)
        assert record["fraction"] == mask.area / 96**2
        assert record["parameters"] == {"documents": "pile", "seed": 3, "count": len(mask.array)}
        assert record["min_ms"] <= record["p10_ms"] <= record["median_ms"] <= record["p90_ms"]
        seconds = record["median_ms"] * 1e-3
        flops = 4 * mask.area * 4 * 16 * {"fwd": 1, "bwd": 2.5, "fwd+bwd": 3.5}[step]
        assert record["tflops"] == pytest.approx(flops / seconds / 1e12)
        assert record["ns_per_1000_cells"] == pytest.approx(seconds * 1e9 / (mask.area * 4 / 1000))
        gradients = [record[f"error_{name}"] for name in ("dq", "dk", "dv")]
        assert 0 < record["error_out"] < 1e-5
        assert all(x is None if step == "fwd" else 0 < x < 1e-5 for x in gradients)
        assert record["peak_memory_gib"] is record["peak_reserved_gib"] is None
        assert sys.platform != "linux" or 0.05 < record["peak_rss_gib"] < 8
        assert "CPU" in record["peak_memory_note"]
        assert record["host_us"] is None
        assert record["torch"] == torch.__version__
        assert record["hardware"]
        assert record["date"].endswith("Z")
        assert record["noise_empty_ms"] < record["median_ms"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["run", "cell", "cell", "cell", "machine"]
    assert [{k: line[k] for k in cells.FIELDS} for line in lines[1:4]] == list(found.values())


def test_rates_are_over_the_visible_pairs() -> None:
    assert cells.rates("fwd", 2.0, 1_000_000, 128) == {
        "tflops": pytest.approx(0.256),  # 4 x 1e6 x 128 in 2 ms
        "ns_per_1000_cells": pytest.approx(2000.0),
    }
    assert cells.rates("fwd+bwd", 2.0, 1_000_000, 128)["tflops"] == pytest.approx(3.5 * 0.256)
    assert cells.rates("bwd", 2.0, 1_000_000, 128)["tflops"] == pytest.approx(2.5 * 0.256)
    assert cells.rates("fwd", 2.0, 0, 128)["tflops"] is None


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("hungry", "oom", "CUDA out of memory. Tried to allocate 64 GiB."),
        ("crashing", "error", "RuntimeError: the first line"),
        ("elsewhere", "unsupported", "needs another machine"),
    ],
)
def test_a_dead_cell_is_a_row_and_kills_no_other(path: Path, name: str, status: str, reason: str) -> None:
    found = by_cell(measure(path, ask(name, "naive", masks=("causal",))))
    for step in PASSES:
        assert (found[name, step]["status"], found[name, step]["reason"]) == (status, reason)
        assert found[name, step]["median_ms"] is None
        assert found[name, step]["fatal"] is False
        assert found["naive", step]["status"] == "ok"


@pytest.mark.parametrize(("name", "status"), [("hungry_backward", "oom"), ("forward_only", "unsupported")])
def test_a_backward_that_fails_leaves_the_forward(path: Path, name: str, status: str) -> None:
    found = by_cell(measure(path, ask(name)))
    assert [found[name, step]["status"] for step in PASSES] == ["ok", status, status]
    assert found[name, "fwd"]["error_out"] < 1e-5


def test_wrong_results_have_no_speed(path: Path) -> None:
    for record in measure(path, ask("wrong")):
        assert record["status"] == "error"
        assert "wrong result: out is off by 1.0e-01" in record["reason"]
        assert record["median_ms"] is None


def test_a_failure_while_timing_is_a_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(calls: Any, *_: Any) -> Any:
        return dict.fromkeys(calls, torch.OutOfMemoryError("CUDA out of memory."))

    monkeypatch.setattr(timing, "measure", measured)
    assert {record["status"] for record in measure(path, ask("naive"))} == {"oom"}


def test_the_cells_of_a_mask_length_and_pass_take_turns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    races: list[list[str]] = []
    measured = timing.measure

    def spy(calls: Any, *rest: Any) -> Any:
        races.append(list(calls))
        return measured(calls, *rest)

    monkeypatch.setattr(timing, "measure", spy)
    asked = ask("naive", "sdpa_flash", masks=("full", "causal"), passes=("fwd", "bwd"), baseline="torch_sdpa")
    records = measure(path, asked)
    race = ["torch_sdpa", "naive", "sdpa_flash"]
    assert races == [race] * 4
    assert [record["mask"] for record in records] == ["causal"] * 6 + ["full"] * 6
    for mask in ("causal", "full"):
        times = {r["kernel"]: r for r in records if (r["mask"], r["pass"]) == (mask, "bwd")}
        for record in times.values():
            assert record["ratio"] == record["median_ms"] / times["torch_sdpa"]["median_ms"]
            assert record["baseline"] == "torch_sdpa"
    units = {(r["mask"], r["kernel"]): r for r in records if r["pass"] == "fwd"}
    for kernel in race:
        full, causal = units["full", kernel], units["causal", kernel]
        relative = full["ns_per_1000_cells"] / causal["ns_per_1000_cells"]
        assert full["relative_to_causal"] == pytest.approx(relative)
        assert causal["relative_to_causal"] == 1.0


def test_causal_takes_its_turn_as_a_control(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(calls: Any, *_: Any) -> Any:
        return {name: timing.Timing(*[4.0 if name.endswith("causal") else 6.0] * 4, 6, 0.0) for name in calls}

    monkeypatch.setattr(timing, "measure", measured)
    asked = ask("naive", "forward_only", masks=("full",), passes=("fwd", "bwd"), control=True)
    full, causal = masks.full(64).area, masks.causal(64).area
    records = measure(path, asked)
    assert [r["status"] for r in records].count("unsupported") == 1
    for record in records:
        if record["status"] == "ok":
            assert record["median_ms"] == 6.0
            assert record["relative_to_causal"] == pytest.approx((6 / full) / (4 / causal))
            assert record["causal_in_turn"] is True
    (alone,) = measure(path, ask("naive", masks=("full",), passes=("fwd",)))
    assert alone["relative_to_causal"] is alone["causal_in_turn"] is None


def test_torch_without_a_mask_tensor_knows_two_masks(path: Path) -> None:
    both = ("torch_sdpa", "torch_sdpa_dense_mask")
    records = measure(path, ask(*both, masks=tuple(families()), passes=("fwd+bwd",)))
    for record in records:
        served = record["kernel"] == both[1] or record["mask"] in ("full", "causal")
        assert (record["status"] == "ok") is served, record
        if served:
            assert max(record[f"error_{x}"] for x in ("out", "dq", "dk", "dv")) < 1e-4
            assert record["backend"] == "flash"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_flexattention_with_its_own_backward_is_for_a_gpu(path: Path) -> None:
    (record,) = measure(path, ask("torch_flex", masks=("causal",), passes=("bwd",)))
    assert record["status"] == "unsupported"
    assert "no backward on a CPU" in record["reason"]


def test_a_dense_kernel_beyond_memory_is_said_and_not_run(path: Path) -> None:
    asked = ask("naive", "sdpa_math", "torch_sdpa_dense_mask", "sdpa_flash", dense_gib=0.0)
    found = by_cell(measure(path, asked))
    for name in ("naive", "sdpa_math", "torch_sdpa_dense_mask"):
        assert found[name, "bwd"]["status"] == "capped"
        assert "--dense-gib" in found[name, "bwd"]["reason"]
    assert found["sdpa_flash", "bwd"]["status"] == "ok"


def test_a_cell_foreseen_to_take_too_long_is_said_and_not_run(path: Path) -> None:
    asked = ask("naive", "sdpa_flash", passes=("fwd",), cell_seconds=60.0)
    short = measure(path, asked)
    for record in short:
        record["min_ms"] = 20e3  # a dense kernel grows with the square, another with the area
    longer = ask("naive", "sdpa_flash", passes=("fwd",), seqlens=(96,), cell_seconds=44.0)
    with RunLog(path, append=True) as log:
        found = by_cell(list(bench.run(longer, log, short)))
    assert found["naive", "fwd"]["status"] == "capped"
    assert "about 45 s, judging by 20 s at 64" in found["naive", "fwd"]["reason"]
    assert found["sdpa_flash", "fwd"]["status"] == "capped" or found["sdpa_flash", "fwd"]["min_ms"] > 0
    assert {r["status"] for r in measure(path, longer)} == {"ok"}  # no record of a shorter one: it is run


def test_a_device_that_does_not_answer_ends_the_run_and_is_left_out_of_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(trial.Machine, "answers", lambda self: False)
        with pytest.raises(LcabError, match=r"does not answer after crashing, causal 64, fwd .*--resume"):
            measure(path, ask("crashing", "naive", passes=("fwd",)))
    assert [record["fatal"] for record in cells.read(path)] == [True]
    again = measure(path, ask("crashing", "naive", passes=("fwd",)), resume=True)
    assert [(record["kernel"], record["status"]) for record in again] == [("naive", "ok")]


def test_on_a_gpu_memory_and_the_hosts_share_are_recorded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch.cuda's counters played: 1 GiB of inputs, a peak that grows with every reset."""

    class Gpu(trial.Machine):
        def __init__(self, device: str) -> None:
            super().__init__(device)
            self.cuda = True

    peaks = iter(range(2, 100))
    monkeypatch.setattr(bench, "Machine", Gpu)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**31)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**32, 2**36))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks) * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = by_cell(measure(path, ask("naive")))
    assert [found["naive", step]["peak_memory_gib"] for step in PASSES] == [1.0, 3.0, 3.0]
    assert {(r["peak_reserved_gib"], r["peak_memory_note"]) for r in found.values()} == {(5.0, None)}
    assert found["naive", "fwd"]["host_us"] > 0
    assert found["naive", "bwd"]["host_us"] is None


def test_resume_measures_what_is_missing_and_keeps_every_line(path: Path) -> None:
    first = measure(path, ask("naive", "crashing", passes=("fwd",), baseline="torch_sdpa"))
    before = path.read_text()
    again = measure(
        path, ask("naive", "crashing", "sdpa_flash", passes=("fwd",), baseline="torch_sdpa"), resume=True
    )
    assert path.read_text().startswith(before)
    assert {r["kernel"]: r["status"] for r in first} == {
        "torch_sdpa": "ok",
        "naive": "ok",
        "crashing": "error",
    }
    assert {r["kernel"]: r["status"] for r in again} == {"crashing": "error", "sdpa_flash": "ok"}
    flash = next(r for r in again if r["kernel"] == "sdpa_flash")
    assert flash["ratio"] > 0  # the baseline ran along, and was not recorded twice
    assert flash["relative_to_causal"] == 1.0
    assert measure(path, ask("naive", passes=("fwd",), baseline="torch_sdpa"), resume=True) == []
    other = ask("naive", passes=("fwd",), shape=Shape(heads=2, kv_heads=2, head_dim=16, dtype="fp32"))
    assert len(measure(path, other, resume=True)) == 1


def test_the_csv_says_what_the_records_say(path: Path) -> None:
    measure(path, ask("sdpa_flash", "elsewhere", masks=("causal", "share_question"), passes=("fwd", "bwd")))
    records = cells.read(path)
    cells.write_csv(records, path.with_suffix(".csv"))
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(cells.FIELDS)
    assert len(rows) == len(records) == 8
    for row, record in zip(rows, records, strict=True):
        assert json.loads(row["parameters"]) == record["parameters"]
        for name in cells.FIELDS:
            value = record[name]
            if isinstance(value, float):
                assert float(row[name]) == value
            elif name != "parameters":
                assert row[name] == ("" if value is None else str(value))


def test_a_kernel_whose_file_does_not_load_is_a_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'lcab_plugin.kernels.sdpa_flash'")

    monkeypatch.setattr(kernels, "get", get)
    (record,) = measure(path, ask("sdpa_flash", passes=("fwd",)))
    assert record["status"] == "unsupported"
    assert "cannot be loaded: No module named" in record["reason"]
    assert contenders.available() == []


Lcab = Callable[..., tuple[int, str, str]]
TINY = ("--seqlens", "64", "--heads", "4:2", "--head-dim", "16", "--cell-seconds", "0.001", "--device", "cpu")


@pytest.fixture
def lcab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lcab:
    """`lcab bench kernels` in this process: words -> exit status, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcab", "bench", "kernels", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run


def test_the_command_prints_a_table_and_the_reasons(lcab: Lcab, path: Path) -> None:
    words = ("--kernels", "sdpa_flash,elsewhere", "--masks", "full,causal", "--baseline", "torch_sdpa")
    status, out, err = lcab(*TINY, *words, "--passes", "fwd", "--out", str(path))
    assert status == 0, err
    legend = "{time per visible pair / causal's, visible pairs / computed ones}"
    assert out.startswith(f"ms  TFLOP/s  (time / torch_sdpa's)  {legend}\n")
    assert "64 tokens, fwd" in out
    causal = next(line for line in out.splitlines() if line.startswith(" causal"))
    assert "(1.000)" in causal
    assert "elsewhere unsupported, 2 cells from causal 64 fwd on: needs another machine" in out
    assert str(path.with_suffix(".csv")) in out
    assert "6 cells, cpu, fp32" in err
    status, out, _ = lcab(
        *TINY, *words, "--passes", "fwd", "--out", str(path), "--resume", "--kernels", "naive", "--json"
    )
    records = json.loads(out)
    assert sorted({record["kernel"] for record in records}) == ["naive", "torch_sdpa"]
    assert len(records) == 4
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 1 + 8


def test_an_interrupted_run_keeps_what_it_measured(
    lcab: Lcab, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_calls = trial.first_calls

    def interrupted(entry: Any, case: Case, *rest: Any) -> None:
        if case.mask == masks.full(64):
            raise KeyboardInterrupt
        first_calls(entry, case, *rest)

    monkeypatch.setattr(trial, "first_calls", interrupted)
    words = ("--kernels", "naive", "--masks", "causal,full", "--passes", "fwd", "--out", str(path))
    status, out, _ = lcab(*TINY, *words)
    assert status == 130
    assert "causal" in out
    assert [record["mask"] for record in cells.read(path)] == ["causal"]
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kernels", "sdpa_flush"), "error: unknown kernel 'sdpa_flush'; did you mean 'sdpa_flash'?"),
        (("--baseline", "torch_sdpb"), "error: unknown kernel 'torch_sdpb'; did you mean 'torch_sdpa'?"),
        (("--masks", "cusal"), "error: unknown mask 'cusal'; did you mean 'causal'?"),
        (("--passes", "fwd,back"), "error: unknown pass 'back'"),
        (("--dtype", "bf17"), "error: unknown dtype 'bf17'; did you mean 'bf16'?"),
        (("--documents", "pyle"), "did you mean 'pile'?"),
        (("--seqlens", "1K"), "error: --seqlens takes integers such as 1024,4096, not '1K'."),
        (("--seqlens", "0"), "must be at least 1"),
        (("--heads", "8:3"), "the heads a multiple of the key/value heads"),
        (("--heads", "8:4:2"), "such as 64:8, not '8:4:2'"),
        (("--masks", ","), "names nothing"),
        (("--cell-seconds", "0"), "must be above 0"),
        (("--blocks", "64,0"), "error: block must be an integer of at least 1, not 0."),
        (("--keeps", "0.5,1.5"), "error: keep must be a number above 0 and at most 1, not 1.5."),
        (("--keeps", "half"), "error: --keeps takes numbers such as 0.1,0.5, not 'half'."),
        (("--masks", "causal", "--keeps", "0.5"), "of block_sparse, which is not among the masks; name it."),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    lcab: Lcab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = lcab(*words)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
